"""Preference optimisation: it learns what is preferred, the reference is read once, it resumes and refuses."""

import json

import pytest
import torch
from chats import EXPERTS, conversations, interrupt_at, log_of, preferences, write_model, write_rows
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DataCollatorForPreference

from small_doge import recipe
from small_doge.data.tokenizer import load_tokenizer
from small_doge.errors import UserError
from small_doge.models import load_model
from small_doge.training import dpo as module
from small_doge.training.align import open_model
from small_doge.training.dpo import DogeDPOTrainer, DPOArguments, dpo, encode
from small_doge.training.sft import SFTArguments, sft


@pytest.fixture(scope="module")
def taught(prepared, tmp_path_factory):
    """Folders `dense` and `moe` of models that say `long dog`, and the file `data.jsonl` that prefers `small dog`."""
    root = tmp_path_factory.mktemp("taught")
    data = write_rows(root / "sft.jsonl", conversations(80))
    for name, options in (("dense", {}), ("moe", EXPERTS)):
        base = write_model(root / f"base-{name}", prepared / "tokenizer", **options)
        sft(
            SFTArguments(
                model=str(base), data=data, output_dir=str(root / name), max_length=128, max_steps=30, use_cpu=True,
                learning_rate=1e-2, per_device_train_batch_size=4, validation_fraction=0.2, report_to="none",
            )
        )  # fmt: skip
    write_rows(root / "data.jsonl", preferences())
    return root


@pytest.fixture
def arguments(taught, tmp_path):
    def make(**overrides):
        fields = {
            "model": str(taught / "dense"),
            "data": str(taught / "data.jsonl"),
            "output_dir": str(tmp_path / "run"),
            "max_length": 64,
            "tokens_per_step": 512,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 5,
            "validation_fraction": 0.2,
            "learning_rate": 1e-3,
            "max_steps": 10,
            "logging_steps": 3,
            "eval_steps": 5,
            "use_cpu": True,
        }
        return recipe.build(DPOArguments, {**fields, **overrides})

    return make


def test_the_loss_sees_the_reply_alone(arguments):
    args = arguments(max_steps=-1)
    tokenizer = load_tokenizer(args.model)
    train, held_out, _ = encode(args, tokenizer)
    assert len(train) + len(held_out) == 120
    rows = [train[i] for i in range(6)]
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=64)(rows)
    seen = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert all(text.startswith("small ") and text.endswith(tokenizer.eos_token) for text in seen[:6])
    assert all(text.startswith("long ") and text.endswith(tokenizer.eos_token) for text in seen[6:])
    assert tokenizer.bos_token not in "".join(seen)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_it_learns_what_is_preferred(arguments, taught, kind):
    folder = dpo(arguments(model=str(taught / kind), max_steps=30))
    stage = json.loads((folder / "stage.json").read_text())
    before, after = stage["before"], stage["after"]
    assert before["eval_preference_accuracy"] < 0.2
    assert after["eval_preference_accuracy"] > 0.8
    assert before["eval_reward_margin"] == pytest.approx(0.0, abs=1e-5)
    assert before["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert after["eval_reward_margin"] > 0.1
    assert after["eval_loss"] < before["eval_loss"]
    assert stage["pairs"] + stage["held_out_pairs"] == 120
    rows = log_of(folder)
    assert rows[0]["step"] == 0
    assert before == {name: rows[0][name] for name in before}
    assert rows[-1]["eval_reward_accuracy"] > 0.9
    assert all(("balance_loss" in row) == (kind == "moe") for row in rows if "loss" in row)
    configs = [json.loads((path / "config.json").read_text()) for path in (taught / kind, folder)]
    assert configs[0] == configs[1]


def test_held_out_figures_are_those_of_each_pair(arguments):
    """One pair at a time, without TRL and without padding."""
    args = arguments(max_steps=1)
    folder = dpo(args)
    figures = json.loads((folder / "stage.json").read_text())["after"]
    reference, model, tokenizer = load_model(args.model), load_model(folder), load_tokenizer(folder)
    _, held_out, _ = encode(args, tokenizer)

    def log_prob(model, prompt, reply):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logits.gather(1, torch.tensor(reply)[:, None]).sum().item()

    rows = []
    for pair in held_out:
        chosen, rejected = pair["chosen_ids"], pair["rejected_ids"]
        a, b = (log_prob(model, pair["prompt_ids"], reply) for reply in (chosen, rejected))
        c, d = (log_prob(reference, pair["prompt_ids"], reply) for reply in (chosen, rejected))
        rows.append((a / len(chosen) - b / len(rejected), 0.1 * (a - c - b + d), -a, len(chosen)))
    margins, rewards, losses, lengths = map(torch.tensor, zip(*rows, strict=True))
    assert figures["eval_preference_accuracy"] == pytest.approx((margins > 0).float().mean().item())
    assert figures["eval_preference_margin"] == pytest.approx(margins.mean().item(), abs=1e-5)
    assert figures["eval_reward_margin"] == pytest.approx(rewards.mean().item(), abs=1e-5)
    assert figures["eval_chosen_loss"] == pytest.approx((losses.sum() / lengths.sum()).item(), abs=1e-5)


@pytest.mark.parametrize(("kind", "options"), [("moe", {}), ("dense", {"lora_r": 4})])
def test_interrupted_and_resumed_equals_uninterrupted(arguments, taught, tmp_path, monkeypatch, kind, options):
    options = {"model": str(taught / kind), **options}
    whole = dpo(arguments(output_dir=str(tmp_path / "whole"), **options))
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        dpo(arguments(**options))
    # the data and what the reference says of them are in the run's folder
    monkeypatch.setattr(module, "read_preferences", None)
    monkeypatch.setattr(DogeDPOTrainer, "compute_ref_log_probs", None)
    resumed = dpo(arguments(**options))
    assert log_of(resumed) == log_of(whole)
    ours, theirs = load_model(resumed).state_dict(), load_model(whole).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_only_labelled_positions_are_scored(arguments, monkeypatch):
    """And they get what the model's own logits say; TRL scores a whole batch on a CPU if it is let."""
    scored, original = [], trl_utils._ChunkedLogProbFunction.apply
    spy = staticmethod(lambda hidden, *rest: scored.append(len(hidden)) or original(hidden, *rest))
    args = arguments(max_steps=1)
    model, tokenizer = open_model(args)
    train, *_ = encode(args, tokenizer)
    trainer = DogeDPOTrainer(model, args, train_dataset=train, eval_dataset=train, processing_class=tokenizer)
    ids = torch.randint(5, 60, (3, 11), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) < 0.6, -100)
    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", spy)
    found = trainer.model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert scored == [int((labels[:, 1:] != -100).sum())]
    expected = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    expected = expected.masked_fill(labels[:, 1:] == -100, 0)
    assert (found.log_probs - expected).abs().max() < 1e-5


def test_no_second_model_is_in_memory(arguments, monkeypatch):
    kept, original = [], DogeDPOTrainer.training_step
    monkeypatch.setattr(
        DogeDPOTrainer, "training_step", lambda self, *a, **k: kept.append(self.ref_model) or original(self, *a, **k)
    )
    dpo(arguments(max_steps=1))
    assert kept == [None, None]


def test_the_reference_reads_no_more_than_training(arguments):
    folder = dpo(arguments(max_steps=2, validation_fraction=0.1))
    assert json.loads((folder / "stage.json").read_text())["pairs"] == 16  # two steps of two micro-batches of 4


def test_pairs_that_are_read_in_order_are_the_first_ones(arguments):
    """The demo's two siblings stand one after the other, and are learned from in one step."""
    tokenizer = load_tokenizer(arguments().model)
    every, *_ = encode(arguments(max_steps=-1), tokenizer)
    some, *_ = encode(arguments(max_steps=2, train_sampling_strategy="sequential"), tokenizer)
    mixed, *_ = encode(arguments(max_steps=2), tokenizer)
    first = every.select(range(len(some)))["prompt_ids"]
    assert len(some) == len(mixed) < len(every)
    assert list(some["prompt_ids"]) == list(first) != list(mixed["prompt_ids"])


def test_a_folder_of_another_stage_is_refused(arguments, taught):
    with pytest.raises(UserError, match="holds a sft run"):
        dpo(arguments(output_dir=str(taught / "moe")))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"beta": 0.0}, "`beta` is 0.0"), ({"precompute_ref_log_probs": False}, "expected true")],
)
def test_a_recipe_that_is_wrong_is_refused(arguments, options, match):
    with pytest.raises(UserError, match=match):
        arguments(**options)
