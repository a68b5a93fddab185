"""The log of a model with experts: the balance loss apart, bits per byte of the cross-entropy alone."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from processes import together
from transformers import TrainerState

from small_doge import recipe
from small_doge.data.packing import PackedTokens
from small_doge.models import DogeForCausalLM, config_for
from small_doge.training import callbacks
from small_doge.training import pretrain as module
from small_doge.training.callbacks import BalanceLoss
from small_doge.training.pretrain import PretrainArguments, pretrain

N, K, k = 64, 8, 3
COEFFICIENT = 0.5  # so large that a log with the wrong loss in it is seen


@pytest.fixture
def experts(prepared, tmp_path):
    """A folder with a small model that uses its experts unevenly."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "router_aux_loss_coef": COEFFICIENT}
    model = DogeForCausalLM(config_for("tiny", **sizes, is_moe=True, num_experts=N, num_experts_per_tok=k))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router_gate.weight[:3] *= 20
    model.save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


def balance_by_hand(router_logits):
    """N · Σ f·P with all tokens × N probabilities, mean of the layers."""
    losses = []
    for r in router_logits:
        scores = (r[:, :K, None] + r[:, None, K:]).flatten(1)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0)
        losses.append(N * (chosen.mean(0) / k * scores.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def measured(model, batch):
    """Nats, balance loss and how many tokens carry a loss, of one micro-batch."""
    out = model(**{name: x for name, x in batch.items() if name != "labels"}, output_router_logits=True)
    targets = batch["labels"][:, 1:].flatten()
    nats = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    return nats.item(), balance_by_hand(out.router_logits).item(), (targets != -100).sum().item()


def lines(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]


def test_the_log_is_that_of_the_model_on_the_same_micro_batches(arguments, experts, prepared, monkeypatch, capsys):
    """Nothing is learnt at a rate of 0, so the model on disk can be asked what each step should have logged."""
    batches, original = [], module.PretrainTrainer.training_step

    def training_step(self, model, inputs, *args):
        batches.append(inputs)
        return original(self, model, inputs, *args)

    monkeypatch.setattr(module.PretrainTrainer, "training_step", training_step)
    options = {"tokens_per_step": 128, "max_steps": 6, "logging_steps": 3, "learning_rate": 0.0}
    folder = pretrain(arguments(model=str(experts), **options))
    model = DogeForCausalLM.from_pretrained(folder).eval()
    assert len(batches) == 12
    bytes_per_token = PackedTokens(prepared / "data", "train").bytes_per_token()
    for line, part in zip(lines(folder), (batches[:6], batches[6:]), strict=True):
        steps = []
        for i in range(0, 6, 2):
            nats, balance, tokens = torch.tensor([measured(model, batch) for batch in part[i : i + 2]]).T
            steps.append([nats.sum() / tokens.sum(), (balance * tokens).sum() / tokens.sum()])
        cross_entropy, balance_loss = torch.tensor(steps).mean(dim=0).tolist()
        assert line["balance_loss"] == pytest.approx(balance_loss, rel=1e-4)
        assert balance_loss > 1.1
        assert line["loss"] == pytest.approx(cross_entropy + COEFFICIENT * balance_loss, rel=1e-4)
        assert line["bits_per_byte"] == pytest.approx(cross_entropy / math.log(2) / bytes_per_token, rel=1e-4)
    printed = capsys.readouterr().out
    assert f"balance {lines(folder)[0]['balance_loss']:.3f}" in printed


def test_tensorboard_is_told(arguments, experts):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = pretrain(arguments(model=str(experts), max_steps=2, logging_steps=1))
    first = min(folder.rglob("events.out.tfevents.*"))  # the last validation has a file of its own
    told = events.EventAccumulator(str(first)).Reload().Scalars("train/balance_loss")
    assert [event.value for event in told] == pytest.approx([line["balance_loss"] for line in lines(folder)])


def test_a_dense_model_logs_no_balance_loss(arguments, capsys):
    assert all("balance_loss" not in line for line in lines(pretrain(arguments(max_steps=2, logging_steps=1))))
    assert "balance" not in capsys.readouterr().out


def test_the_first_line_after_resuming_is_whole(arguments, experts, tmp_path, monkeypatch):
    """Stopped at step 3, between the lines of steps 2 and 4."""
    options = {"model": str(experts), "max_steps": 6, "logging_steps": 2, "tokens_per_step": 128}
    whole = pretrain(arguments(output_dir=str(tmp_path / "whole"), **options))
    original = module.SaveOnInterrupt.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        self.interrupted = state.global_step == 2
        return original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(module.SaveOnInterrupt, "on_step_begin", on_step_begin)
        with pytest.raises(KeyboardInterrupt):
            pretrain(arguments(**options))
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    resumed = pretrain(arguments(**options))
    names = ("step", "loss", "balance_loss", "bits_per_byte")
    assert [[line[n] for n in names] for line in lines(resumed)] == [[line[n] for n in names] for line in lines(whole)]


def test_micro_batches_weigh_in_by_their_labels():
    balance, labels = BalanceLoss(), torch.zeros(1, 9, dtype=torch.long)
    assert balance.take(lambda x: x) is None
    few = labels.clone()
    few[:, 3:] = -100  # 2 of 10 labels
    balance.add(torch.tensor(1.0), labels, torch.tensor(10))
    balance.add(torch.tensor(3.0), few, torch.tensor(10))
    assert balance.take(lambda x: x) == pytest.approx(1.4)
    assert balance.take(lambda x: x) is None
    balance.add(torch.tensor(1.0), labels)
    balance.add(torch.tensor([2.0, 4.0]), few)  # two replicas
    assert balance.take(lambda x: torch.cat([x, x])) == pytest.approx(2.0)


def worker(_rank, fields):
    """One of two processes that train together."""
    pretrain(recipe.build(PretrainArguments, fields))


def test_two_processes_log_what_one_logs_of_two_micro_batches(arguments, experts, prepared, tmp_path):
    fields = {"model": str(experts), "data": str(prepared / "data"), "tokenizer": str(prepared / "tokenizer")}
    fields |= {"max_steps": 4, "logging_steps": 2, "tokens_per_step": 128, "per_device_train_batch_size": 2}
    fields |= {"learning_rate": 0.0, "use_cpu": True, "eval_rows": 4, "report_to": "none"}
    together(worker, fields | {"output_dir": str(tmp_path / "two")})
    alone = lines(pretrain(arguments(**fields, output_dir=str(tmp_path / "one"))))
    for one, two in zip(alone, lines(tmp_path / "two"), strict=True):
        for name in ("loss", "balance_loss", "bits_per_byte"):
            assert two[name] == pytest.approx(one[name], rel=1e-4)


def test_the_time_left_is_not_that_of_compilation(monkeypatch, capsys):
    """A clock of our own: the first step takes 40 s, every other 2."""
    now = 0.0
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now)
    log = {"loss": 1.0, "bits_per_byte": 1.0, "learning_rate": 1e-3, "tokens_per_second": 1.0}
    for begun, expected in ((0, ["1 h 6 min", "3 min 4 s", "1 min 4 s"]), (60, ["26 min 0 s", "1 min 4 s"])):
        state, printing = TrainerState(global_step=begun, max_steps=100), callbacks.PrintLog()
        printing.on_train_begin(None, state, None)
        for state.global_step in range(begun + 1, 69):
            now += 40.0 if state.global_step == begun + 1 else 2.0
            printing.on_step_end(None, state, None)
            if state.global_step in (begun + 1, 8, 68):
                printing.on_log(None, state, None, log)
        lines = capsys.readouterr().out.splitlines()
        assert [line.rsplit("  ", 1)[1] for line in lines] == [f"{x} left" for x in expected]
