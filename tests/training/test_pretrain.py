"""Pretraining: it learns, it stops and continues to the bit, and it says what is wrong in one sentence."""

import json
import math
import os
import signal

import pytest
import torch

from small_doge.errors import UserError
from small_doge.models import config_for, load_model
from small_doge.models.modeling_doge import DogeForCausalLM
from small_doge.training import pretrain as module
from small_doge.training.checkpoints import newest
from small_doge.training.optimizer import decayed_parameters
from small_doge.training.pretrain import pretrain
from small_doge.training.schedule import steps_in


def log_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(row["step"], row["loss"], row["learning_rate"], row["grad_norm"]) for row in history if "loss" in row]


def interrupt_at(monkeypatch, *steps):
    """Send this process SIGINT when training reaches each of the steps, as Ctrl-C does."""
    waiting = list(steps)
    original = module.SaveOnInterrupt.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        if waiting and state.global_step == waiting[0]:
            waiting.pop(0)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(module.SaveOnInterrupt, "on_step_begin", on_step_begin)


def test_it_learns_and_leaves_a_model_that_opens(arguments, capsys):
    folder = pretrain(arguments(max_steps=40, learning_rate=3e-3, sample_prompts=["the dog"], sample_at=[0.1, 1.0]))
    losses = [loss for _, loss, *_ in log_of(folder)]
    assert losses[0] > 5.0  # about ln 300 at the start
    assert losses[-1] < losses[0] - 1.0
    stage = json.loads((folder / "stage.json").read_text())
    assert stage["stage"] == "pretrain"
    assert stage["parameters"] == sum(p.numel() for p in load_model(folder).parameters())
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [4, 40]
    printed = capsys.readouterr().out
    assert "parameters, 40 steps of 64 tokens = 2,560 tokens" in printed
    assert "MiB on cpu" in printed
    assert "bits/byte" in printed
    assert "left" in printed


def test_bits_per_byte_in_the_log_are_those_of_the_loss(arguments, prepared):
    folder = pretrain(arguments())
    split = json.loads((prepared / "data" / "manifest.json").read_text())["splits"]["train"]
    tokens_per_byte = (split["tokens"] - split["documents"]) / split["bytes"]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    for row in history:
        if "loss" in row:
            assert math.isclose(row["bits_per_byte"], row["loss"] / math.log(2) * tokens_per_byte)
            assert row["tokens_per_second"] > 0
    assert "eval_bits_per_byte" in history[-1]


@pytest.mark.parametrize(("steps", "muon"), [((3,), None), ((1, 6, 11), None), ((5, 7), 0.01)])
def test_interrupted_and_resumed_equals_uninterrupted(arguments, tmp_path, monkeypatch, steps, muon):
    options = {"tokens_per_step": 128, "max_steps": 13, "muon_learning_rate": muon}  # two micro-batches a step
    whole = pretrain(arguments(output_dir=str(tmp_path / "whole"), **options))
    interrupt_at(monkeypatch, *steps)
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            pretrain(arguments(**options))
        assert newest(tmp_path / "run").name == f"checkpoint-{step + 1}"  # the step in progress is finished first
        assert not (tmp_path / "run" / "stage.json").exists()
    resumed = pretrain(arguments(**options))
    assert log_of(resumed) == log_of(whole)
    ours, theirs = load_model(resumed).state_dict(), load_model(whole).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_killed_while_saving_continues_from_the_checkpoint_before(arguments, tmp_path, monkeypatch):
    whole = pretrain(arguments(output_dir=str(tmp_path / "whole")))

    class Killed(BaseException):
        pass

    def killed(checkpoint, **facts):
        if checkpoint.name == "checkpoint-10":
            (checkpoint / "optimizer.pt").write_bytes(b"half")
            raise Killed
        original(checkpoint, **facts)

    original = module.seal
    monkeypatch.setattr(module, "seal", killed)
    with pytest.raises(Killed):
        pretrain(arguments())
    monkeypatch.setattr(module, "seal", original)
    assert newest(tmp_path / "run").name == "checkpoint-5"
    assert log_of(pretrain(arguments())) == log_of(whole)


def test_a_finished_run_is_not_done_again(arguments, capsys):
    folder = pretrain(arguments())
    written = (folder / "model.safetensors").stat().st_mtime_ns
    pretrain(arguments())
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert "finished" in capsys.readouterr().out


def snapshot(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_a_different_run_in_the_output_folder_is_refused(arguments, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        pretrain(arguments())
    before = snapshot(tmp_path / "run")
    with pytest.raises(UserError, match=r"different run: `learning_rate` is .* there and 0.001 here"):
        pretrain(arguments(learning_rate=1e-3))
    assert snapshot(tmp_path / "run") == before


def test_a_step_may_be_shared_out_otherwise_when_resumed_but_not_be_another(arguments, tmp_path, monkeypatch):
    whole = pretrain(arguments(output_dir=str(tmp_path / "whole"), tokens_per_step=128))
    interrupt_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        pretrain(arguments(tokens_per_step=128))
    with pytest.raises(UserError, match="different run: `rows_per_step` is 4 there and 8 here"):
        pretrain(arguments(tokens_per_step=256))
    resumed = pretrain(arguments(tokens_per_step=128, per_device_train_batch_size=1))
    for ours, theirs in zip(log_of(resumed), log_of(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_folder_of_something_else_is_refused(arguments, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not of this run"):
        pretrain(arguments())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_checkpoint_cut_short_is_named(arguments, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        pretrain(arguments())
    file = tmp_path / "run" / "checkpoint-7" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    before = snapshot(tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoint-7 is cut short: model.safetensors has 1,000 bytes, expected"):
        pretrain(arguments())
    assert snapshot(tmp_path / "run") == before


def test_a_model_of_another_vocabulary_is_refused(arguments, tmp_path):
    DogeForCausalLM(config_for("tiny", vocab_size=77)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="has a vocabulary of 77 and the data .* one of 300"):
        pretrain(arguments(model=str(tmp_path / "other")))
    assert not (tmp_path / "run").exists()


def test_tokens_per_step_must_divide(arguments, tmp_path):
    with pytest.raises(UserError, match=r"`tokens_per_step` is 100, expected a multiple of the 64 tokens"):
        pretrain(arguments(tokens_per_step=100))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_noticed_before_the_first_step(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(module.artifacts.shutil, "disk_usage", lambda _: type("", (), {"free": 1000})())
    with pytest.raises(UserError, match="MiB free, and this run needs about"):
        pretrain(arguments())
    assert not (tmp_path / "run").exists()


def test_it_starts_from_a_model_folder(arguments, tmp_path):
    """And both have the windows that their recipes ask for."""
    fields = {"output_dir": str(tmp_path / "first"), "max_steps": 30, "learning_rate": 3e-3}
    first = pretrain(arguments(**fields, keep_window_size=16, local_window=4, score_lifetime=24))
    second = pretrain(arguments(model=str(first), keep_window_size=8))
    assert log_of(second)[0][1] < log_of(first)[0][1] - 0.5
    configs = [load_model(folder).config for folder in (first, second)]
    windows = [(c.keep_window_size, c.local_window, c.score_lifetime) for c in configs]
    assert windows == [(16, 4, 24), (8, 4, 24)]


def test_a_gpu_for_which_there_are_faster_products_is_told_of(arguments, tmp_path, capsys, monkeypatch):
    for lacking in (True, False):
        monkeypatch.setattr(module, "lacks_quack", lambda device, lacking=lacking: lacking)
        pretrain(arguments(output_dir=str(tmp_path / str(lacking)), max_steps=1, bf16=True))
        assert ('`pip install "small-doge[hopper]"`' in capsys.readouterr().out) == lacking


def test_rows_that_have_outgrown_the_window_are_told_of(arguments, tmp_path, capsys):
    for field, told in ({}, True), ({"score_lifetime": 32}, False), ({"local_window": 1}, False):
        pretrain(arguments(output_dir=str(tmp_path / str(field)), max_steps=1, keep_window_size=4, **field))
        said = "rows of 32 tokens are far longer than the window of 4 keys" in capsys.readouterr().out
        assert said == told


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("keep_window_size", 0, "at least 1"),
        ("local_window", -1, "0 or more"),
        ("score_lifetime", 0.0, "1 to 1e9 tokens"),
        ("score_lifetime", -3.5, "1 to 1e9 tokens"),
        ("score_lifetime", float("inf"), "1 to 1e9 tokens"),
    ],
)
def test_a_window_that_cannot_be_is_refused(arguments, field, value, expected):
    with pytest.raises(UserError, match=f"`{field}` is {value}, expected {expected}"):
        arguments(**{field: value})


def test_weight_decay_spares_norms_residual_weights_biases_and_A():
    model = DogeForCausalLM(config_for("tiny", vocab_size=300, attention_bias=True))
    names = set(decayed_parameters(model))
    for name, p in model.named_parameters():
        spared = any(word in name for word in ("norm", "residual", ".A", "bias"))
        assert (name in names) == (not spared), name
        assert (p.dim() == 2) == (name in names), name


def test_the_schedule_warms_up_stays_and_decays(arguments):
    folder = pretrain(
        arguments(
            max_steps=20, warmup_steps=0.2, decay_steps=0.5, decay_type="linear", learning_rate=1e-3, logging_steps=1
        )
    )
    rates = [rate for _, _, rate, _ in log_of(folder)]
    assert rates[0] == 0
    assert rates[4:10] == [1e-3] * 6
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert math.isclose(rates[15], 0.5e-3)
    assert math.isclose(rates[19], 0.1e-3)


def test_timing_steps_leaves_model_and_random_state_alone():
    torch.manual_seed(0)
    model = DogeForCausalLM(config_for("tiny", vocab_size=300, hidden_dropout=0.1))
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "labels": torch.zeros(1, 8, dtype=torch.long)}
    assert steps_in(0.05, model, [batch] * 4, 1, lambda m: torch.optim.AdamW(m.parameters())) > 0
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_max_minutes_becomes_steps_that_a_resumed_run_keeps(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "steps_in", lambda *_: 9)
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        pretrain(arguments(max_steps=-1, max_minutes=1, logging_steps=3))
    monkeypatch.setattr(module, "steps_in", lambda *_: 1000)
    assert log_of(pretrain(arguments(max_steps=-1, max_minutes=1, logging_steps=3)))[-1][0] == 9
