"""Steps that go wrong: the run stops with a good checkpoint kept, or leaves them out to the bit."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from small_doge.errors import UserError
from small_doge.training import pretrain as module
from small_doge.training.bad_steps import ENOUGH, IN_A_ROW, BadSteps
from small_doge.training.checkpoints import newest
from small_doge.training.pretrain import pretrain


def lines(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]


def poison(monkeypatch, steps, gradient=None, loss=0.0):
    """Put a number into the gradients of the first parameter at some steps (the first is 1), and add to their loss."""
    original = module.PretrainTrainer.training_step

    def training_step(self, model, inputs, *args):
        found = original(self, model, inputs, *args)
        if self.state.global_step + 1 in steps:
            if gradient is not None:
                next(model.parameters()).grad.view(-1)[0] = gradient
            return found + loss
        return found

    monkeypatch.setattr(module.PretrainTrainer, "training_step", training_step)


def states(monkeypatch, kept):
    """Keep weights and moments around each step: kept[step] = before, after."""

    def now(trainer):
        optimizer = trainer.optimizer.optimizer
        moments = [x for state in optimizer.state.values() for x in state.values()]
        return [x.detach().clone() for x in (*trainer.model.parameters(), *moments)]

    original = module.PretrainTrainer._get_grad_norm

    def before(self, model, grad_norm=None):
        kept[self.state.global_step + 1] = [now(self)]
        return original(self, model, grad_norm)

    def after(self, args, state, control, **kwargs):
        kept[state.global_step].append(now(self.trainer))

    monkeypatch.setattr(module.PretrainTrainer, "_get_grad_norm", before)
    monkeypatch.setattr(module.LossSinceLastLog, "on_step_end", after)


def test_it_stops_before_a_checkpoint_holds_it_and_goes_on_by_skipping(arguments, monkeypatch, tmp_path, capsys):
    """Step 7 of 12 is bad, a checkpoint is due at 8 and a line at 10."""
    poison(monkeypatch, {7}, gradient=math.nan)
    options = {"logging_steps": 5, "save_steps": 4}
    with pytest.raises(UserError, match=r"step 7 has gradients whose norm is nan, .*checkpoint-4 is from before"):
        pretrain(arguments(**options))
    assert newest(tmp_path / "run").name == "checkpoint-4"
    assert not (tmp_path / "run" / "checkpoint-8").exists()
    assert not (tmp_path / "run" / "stage.json").exists()
    folder = pretrain(arguments(**options, on_bad_step="skip"))
    assert lines(folder)[1]["skipped_steps"] == 1
    assert all(math.isfinite(row["loss"]) for row in lines(folder))
    assert "1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(("muon", "number"), [(None, math.nan), (0.01, math.inf)])
def test_a_skipped_step_touches_nothing(arguments, monkeypatch, muon, number):
    kept = {}
    poison(monkeypatch, {1, 5}, gradient=number)
    states(monkeypatch, kept)
    folder = pretrain(arguments(on_bad_step="skip", muon_learning_rate=muon, max_steps=7, logging_steps=7))
    parameters = len(kept[1][0])  # no moments yet
    for step in (1, 5):
        before, after = kept[step]
        assert all(torch.equal(a, b) for a, b in zip(before, after[: len(before)], strict=True))
    assert not any(x.any() for x in kept[1][1][parameters:])  # nor are the first moments, their count included
    assert not all(torch.equal(a, b) for a, b in zip(*kept[6], strict=True))
    assert lines(folder)[0]["skipped_steps"] == 2


def test_the_log_is_the_mean_of_the_steps_that_were_taken(arguments, monkeypatch, tmp_path):
    poison(monkeypatch, {3}, gradient=math.nan, loss=math.nan)
    each = pretrain(arguments(on_bad_step="skip", logging_steps=1, output_dir=str(tmp_path / "each")))
    losses = [row["loss"] for row in lines(each)]
    assert [math.isnan(x) for x in losses].index(True) == 2
    assert sum(map(math.isnan, losses)) == 1
    folder = pretrain(arguments(on_bad_step="skip"))
    good = [x for x in losses[:4] if not math.isnan(x)]
    assert lines(folder)[0]["loss"] == pytest.approx(sum(good) / 3, rel=1e-6)


def test_a_skipped_step_is_remembered_by_a_checkpoint(arguments, monkeypatch, tmp_path):
    """Stopped at step 6 between lines at 4 and 8, after step 5 was skipped."""
    poison(monkeypatch, {5}, gradient=math.nan)
    whole = pretrain(arguments(on_bad_step="skip", output_dir=str(tmp_path / "whole")))
    original = module.SaveOnInterrupt.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        self.interrupted = state.global_step == 5
        return original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(module.SaveOnInterrupt, "on_step_begin", on_step_begin)
        with pytest.raises(KeyboardInterrupt):
            pretrain(arguments(on_bad_step="skip"))
    assert newest(tmp_path / "run").name == "checkpoint-6"
    resumed = pretrain(arguments(on_bad_step="skip"))
    names = ("step", "loss", "grad_norm", "skipped_steps")
    ours, theirs = ([[row.get(n) for n in names] for row in lines(f)] for f in (resumed, whole))
    assert ours[0] == theirs[0]
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("action", ["stop", "skip", "ignore"])
def test_a_loss_that_jumps(arguments, monkeypatch, action):
    """By 50, at the steps from 36 on to stop, at one of them to skip."""
    kept = {}
    poison(monkeypatch, range(36, 41) if action == "stop" else {36}, loss=50.0)
    states(monkeypatch, kept)
    options = {"on_bad_step": action, "max_steps": 40, "logging_steps": 5, "save_strategy": "no"}
    if action == "stop":
        with pytest.raises(UserError, match=r"is 5\d.* at step 40, which is more than 6 standard .*no checkpoint yet"):
            pretrain(arguments(**options))
        return
    folder = pretrain(arguments(**options))
    assert all(torch.equal(a, b) for a, b in zip(*kept[36], strict=True)) == (action == "skip")
    assert not any(all(torch.equal(a, b) for a, b in zip(*kept[step], strict=True)) for step in range(2, 36))
    assert lines(folder)[-1].get("skipped_steps") == (1 if action == "skip" else None)
    assert (lines(folder)[-1]["loss"] > 10) == (action == "ignore")


def test_a_run_that_skips_and_skips_stops(arguments, monkeypatch):
    poison(monkeypatch, range(2, 99), gradient=math.nan)
    with pytest.raises(UserError, match=rf"the {IN_A_ROW + 1} steps up to 12 were skipped one after the other"):
        pretrain(arguments(on_bad_step="skip"))


def trainer(**fields):
    accelerator = SimpleNamespace(num_processes=1)
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    made = {"accelerator": accelerator, "state": state, "_globalstep_last_logged": 0, "control": SimpleNamespace()}
    return SimpleNamespace(**made, optimizer=SimpleNamespace(), **fields)


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_no_step_waits_for_the_device(action):
    """A tensor without values raises where anything asks for one."""
    bad = BadSteps(action, 6.0)
    with FakeTensorMode():
        bad.trainer = trainer(_tr_loss=torch.zeros(()))
        bad.on_train_begin(None, bad.trainer.state, None)
        for _ in range(3):
            bad.trainer._tr_loss += 1.0
            bad.step(torch.ones(()))
        assert len(bad._steps) == 3
        with pytest.raises(DataDependentOutputException):
            bad.look()


def test_what_a_jump_is():
    bad = BadSteps("stop", 6.0)
    bad.losses.extend([3.0, 3.2] * (ENOUGH // 2 - 1))
    assert bad._threshold() == math.inf
    bad.losses.extend([3.0, 3.2])
    assert bad._threshold() == pytest.approx(3.1 + 6 * 0.1)
    bad.losses.extend([4.0] * 100)
    assert bad._threshold() == pytest.approx(4.0 + 6 * 0.02)  # a deviation of nothing counts as half a percent
