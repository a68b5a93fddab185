"""Taking up another run: the very steps it would have taken, no spike, and one sentence where it cannot be."""

import json
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from small_doge import recipe
from small_doge.data.packing import PrepareRecipe, prepare
from small_doge.data.tokenizer import TokenizerRecipe, train_tokenizer
from small_doge.errors import UserError
from small_doge.models import config_for, load_model
from small_doge.models.modeling_doge import DogeForCausalLM
from small_doge.training.continuing import Start, open_model, windows
from small_doge.training.order import StepOrder
from small_doge.training.pretrain import PretrainArguments, pretrain


def lines(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]


def losses(folder):
    return [row["loss"] for row in lines(folder)]


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """A run of 20 steps: warmup to 4, stable to 16, decay to 20; with checkpoints at every second step, and dropout."""
    folder = tmp_path_factory.mktemp("continuing")
    torch.manual_seed(0)
    DogeForCausalLM(config_for("tiny", vocab_size=300, hidden_dropout=0.1)).save_pretrained(folder / "model")
    common = {
        "model": str(folder / "model"),
        "data": str(prepared / "data"),
        "tokenizer": str(prepared / "tokenizer"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 7,  # 28 rows of 168: an epoch is 6 steps, so that there are more than one
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": None,
        "eval_rows": 2,
        "use_cpu": True,
    }
    fields = common | {"output_dir": str(folder / "whole"), "max_steps": 20, "warmup_steps": 4, "decay_steps": 4}
    pretrain(recipe.build(PretrainArguments, fields))
    return folder, common


def go_on(run, name, out, **overrides):
    folder, common = run
    fields = common | {"continue_from": str(folder / "whole" / name), "output_dir": str(out), **overrides}
    return pretrain(recipe.build(PretrainArguments, fields))


def test_it_takes_the_steps_the_run_itself_took(run, tmp_path):
    """Weights, moments, random state and place in the data: 6 steps later dropout and order are still the same."""
    out = go_on(run, "checkpoint-10", tmp_path / "on", max_steps=6, decay_steps=0)
    assert losses(out) == losses(run[0] / "whole")[10:16]
    ours, theirs = (load_model(f).state_dict() for f in (out, run[0] / "whole" / "checkpoint-16"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {row["learning_rate"] for row in lines(out)} == {2e-3}


@pytest.mark.parametrize("lifetime", [None, 64.0])
def test_the_recipe_sets_windows_and_leaves_what_it_does_not_name(tmp_path, lifetime):
    sizes = {"keep_window_size": 9, "local_window": 1}
    DogeForCausalLM(config_for("tiny", vocab_size=300, **sizes)).save_pretrained(tmp_path)
    args = SimpleNamespace(keep_window_size=None, local_window=3, score_lifetime=lifetime)
    assert windows(args) == {"local_window": 3} | ({"score_lifetime": 64.0} if lifetime else {})
    config = open_model(args, Start(str(tmp_path))).config
    assert (config.keep_window_size, config.local_window, config.score_lifetime) == (9, 3, lifetime)


def test_decay_alone_is_the_decay_of_the_run(run, tmp_path):
    out = go_on(run, "checkpoint-16", tmp_path / "on", max_steps=4, decay=True)
    assert losses(out) == losses(run[0] / "whole")[16:]
    rates = [row["learning_rate"] for row in lines(out)]
    assert rates == [row["learning_rate"] for row in lines(run[0] / "whole")][16:]
    assert rates == sorted(rates, reverse=True)


def test_without_the_optimiser_there_is_a_short_warmup(run, tmp_path, capsys):
    """And the rate is this recipe's. The folder is a copy that was loaded and saved, as a published one is."""
    load_model(run[0] / "whole" / "checkpoint-10").save_pretrained(tmp_path / "published")
    out = go_on(
        run, tmp_path / "published", tmp_path / "on", max_steps=6, decay_steps=0, rewarmup_steps=2, learning_rate=1e-3
    )
    assert [row["learning_rate"] for row in lines(out)] == [0.0, 5e-4, 1e-3, 1e-3, 1e-3, 1e-3]
    assert "with a fresh optimiser (it has none)" in capsys.readouterr().out


def test_another_optimiser_starts_afresh(run, tmp_path, capsys):
    go_on(run, "checkpoint-10", tmp_path / "on", max_steps=2, muon_learning_rate=1e-2)
    assert "its own is adamw_torch_fused, the recipe says muon" in capsys.readouterr().out


def test_a_run_that_continues_is_resumed_without_what_it_came_from(run, tmp_path, monkeypatch):
    from small_doge.training import pretrain as module

    shutil.copytree(run[0] / "whole" / "checkpoint-10", tmp_path / "from")
    original = module.SaveOnInterrupt.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        self.interrupted = state.global_step == 2
        return original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(module.SaveOnInterrupt, "on_step_begin", on_step_begin)
        with pytest.raises(KeyboardInterrupt):
            go_on(run, tmp_path / "from", tmp_path / "on", max_steps=6, decay_steps=0)
    shutil.rmtree(tmp_path / "from")
    out = go_on(run, tmp_path / "from", tmp_path / "on", max_steps=6, decay_steps=0)
    assert losses(out) == losses(run[0] / "whole")[10:16]


def test_a_checkpoint_says_where_it_is(run):
    record = json.loads((run[0] / "whole" / "checkpoint-10" / "checkpoint.json").read_text())
    assert record["schedule"] == {"stage": "stable", "step": 10, "total": 20, "stable_from": 4, "stable_to": 16}
    assert record["data"]["rows_seen"] == 10 * 28
    assert record["recipe"]["learning_rate"] == 2e-3
    assert {"small-doge", "torch", "transformers", "python"} <= record["versions"].keys()
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"} <= record["files"].keys()


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("checkpoint-18", {}, r"is at step 18, past its stable stage \(it decays after step 16\), expected .* 4 to 16"),
        ("checkpoint-2", {}, r"is at step 2, still warming up, expected one of its run from steps 4 to 16"),
        (".", {}, r"is at step 20, past its stable stage"),
        ("checkpoint-10", {"model": "20m"}, r"has hidden_size 192, expected 256 as in `model: 20m`"),
        (
            "checkpoint-10",
            {"model": "tiny", "continue_from": "nobody/nothing"},
            "is neither a folder here nor a model on",
        ),
        ("checkpoint-11", {}, r"checkpoint-11 does not exist, expected a checkpoint-N folder or a model folder"),
    ],
)
def test_what_cannot_be_continued_is_said_in_one_sentence(run, tmp_path, monkeypatch, name, fields, sentence):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nobody waits for a hub
    with pytest.raises(UserError, match=sentence):
        go_on(run, name, tmp_path / "on", max_steps=2, **fields)
    assert not (tmp_path / "on").exists()


def test_other_vocabularies_cut_checkpoints_and_half_written_ones_are_refused(run, tmp_path):
    other = tmp_path / "other"
    DogeForCausalLM(config_for("tiny", vocab_size=77)).save_pretrained(other)
    with pytest.raises(UserError, match="has a vocabulary of 77 and the data .* one of 300"):
        go_on(run, other, tmp_path / "on", max_steps=2)
    cut = shutil.copytree(run[0] / "whole" / "checkpoint-10", tmp_path / "cut")
    (cut / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="cut is cut short: optimizer.pt has 4 bytes"):
        go_on(run, cut, tmp_path / "on", max_steps=2)
    (cut / "checkpoint.json").unlink()
    with pytest.raises(UserError, match="has no checkpoint.json: its run was stopped while it was written"):
        go_on(run, cut, tmp_path / "on", max_steps=2)
    with pytest.raises(UserError, match="`decay` is set without `continue_from`"):
        recipe.build(PretrainArguments, run[1] | {"output_dir": str(tmp_path / "on"), "decay": True})
    assert not (tmp_path / "on").exists()


def test_the_order_of_rows_is_one_sequence():
    """Ten rows, four a step: steps cross permutations, none is short, and starting later continues the sequence."""

    def rows(epochs, **options):
        order = StepOrder(10, 4, seed=3, **options)
        for epoch in range(epochs):
            order.set_epoch(epoch)
            yield from order

    sequence = list(rows(5))
    assert len(sequence) == 40
    assert all(sorted(sequence[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))
    assert sequence[:10] != sequence[10:20]
    assert list(rows(3, start=12)) == sequence[12:36]
    assert list(StepOrder(3, 8, seed=0, shuffle=False)) == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    """Two parts of the standard library, packed for one tokenizer, and 120 steps at a constant rate on the first."""
    root = tmp_path_factory.mktemp("stdlib")
    source = Path(sysconfig.get_path("stdlib"))
    for name, parts in {"one": ("email", "json", "logging", "http"), "two": ("asyncio", "unittest")}.items():
        for part in parts:
            for file in (source / part).glob("*.py"):
                (root / name / part).mkdir(parents=True, exist_ok=True)
                (root / name / part / f"{file.stem}.txt").write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    tokenizer = str(root / "tokenizer")
    train_tokenizer(TokenizerRecipe(output_dir=tokenizer, corpus=str(root / "one"), vocab_size=512))
    for name in ("one", "two"):
        options = {"corpus": str(root / name), "row_length": 32, "validation_fraction": 0.1}
        prepare(PrepareRecipe(output_dir=str(root / f"{name}-data"), tokenizer=tokenizer, **options))
    common = {"model": "tiny", "tokenizer": tokenizer, "learning_rate": 8e-3, "decay_steps": 0, "logging_steps": 1}
    common |= {"per_device_train_batch_size": 16, "save_steps": 120, "eval_rows": 2, "use_cpu": True}
    fields = {"data": str(root / "one-data"), "output_dir": str(root / "first"), "max_steps": 121, "warmup_steps": 16}
    pretrain(recipe.build(PretrainArguments, common | fields))
    return root, common


def above_running_mean(before, after, window=40):
    """By how many standard deviations each loss of ``after`` exceeds the mean of those before it, the largest."""
    curve = np.array([*before, *after])
    worst = -np.inf
    for i in range(len(before), len(curve)):
        recent = curve[max(0, i - window) : i]
        worst = max(worst, (curve[i] - recent.mean()) / recent.std())
    return worst


@pytest.mark.slow  # some fifteen seconds each
@pytest.mark.parametrize("data", ["one", "two"])
def test_continuing_shows_no_spike(stdlib, tmp_path, data):
    """At the rate of the stable stage, with moments and without. On new data the mean is that of its first steps."""
    root, common = stdlib
    checkpoint = root / "first" / "checkpoint-120"
    load_model(checkpoint).save_pretrained(tmp_path / "published")

    def worst(source, **overrides):
        fields = {"continue_from": str(source), "data": str(root / f"{data}-data"), "max_steps": 40}
        fields |= {"output_dir": str(tmp_path / f"on{len(overrides)}-{source.name}"), "rewarmup_steps": 20, **overrides}
        after = losses(pretrain(recipe.build(PretrainArguments, common | fields)))
        if data == "one":
            return above_running_mean(losses(root / "first")[80:120], after)
        return above_running_mean(after[:10], after[10:])

    assert worst(checkpoint) < 3
    assert worst(tmp_path / "published") < 3
    if data == "one":  # what a spike would look like
        jump = worst(tmp_path / "published", rewarmup_steps=0, learning_rate=0.05, max_steps=4, on_bad_step="ignore")
        assert jump > 3
