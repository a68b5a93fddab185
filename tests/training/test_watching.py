"""What a run shows: what attention keeps, in numbers counted by hand, and by name to reporters."""

import json
import math

import numpy as np
import pytest
import torch

from small_doge.data.packing import PackedTokens
from small_doge.errors import UserError
from small_doge.models import DogeForCausalLM, config_for, load_model
from small_doge.training import pretrain as module
from small_doge.training.pretrain import pretrain
from small_doge.training.watching import NAMES, ROWS, statistics


@pytest.fixture
def kept(tmp_path):
    """A folder with a model whose scores differ and whose window is shorter than a row."""
    torch.manual_seed(0)
    model = DogeForCausalLM(config_for("tiny", vocab_size=300, keep_window_size=6, num_hidden_layers=2))
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.A.fill_(0.5 + i)
            layer.self_attn.dt_proj.weight.mul_(20)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def by_hand(s, A, documents, window, lifetime=None):
    """Each query's window counted key by key."""
    gone, distances, spreads = [], [], []
    for b, document in enumerate(documents.tolist()):
        for scores in s[b]:
            spreads.append(scores.std())
            order = scores.tolist()
            if lifetime:
                order = [math.floor(x * lifetime) + j for j, x in enumerate(order)]
            last = {}  # the last query that sees a key
            for i, mine in enumerate(document):
                keys = [j for j in range(i + 1) if document[j] == mine]
                best = sorted(keys, key=lambda j, order=order: (order[j], j), reverse=True)[:window]
                distances += [i - j for j in best]
                last |= dict.fromkeys(best, i)
            ends = {mine: i for i, mine in enumerate(document)}
            gone += [last.get(j, -1) < ends[mine] for j, mine in enumerate(document)]
    return [A.abs().mean().item(), torch.stack(spreads).mean().item(), sum(gone) / len(gone), np.mean(distances)]


@pytest.mark.parametrize("lifetime", [None, 5.0])
def test_the_statistics_are_those_counted_by_hand(kept, lifetime):
    torch.manual_seed(1)
    attention = load_model(kept).model.layers[0].self_attn
    attention.config.score_lifetime = lifetime
    positions = torch.tensor([[*range(12), *range(8)], [*range(3, 23)]])
    documents = torch.tensor([[0] * 12 + [1] * 8, [0] * 20])
    s = torch.rand(2, 2, 20).exp()
    found = statistics(attention, s, positions).tolist()
    assert found == pytest.approx(by_hand(s, attention.A, documents, 6, lifetime), rel=1e-5)
    assert 0.1 < found[2] < 0.9


def test_they_stand_in_the_log_at_every_look_and_change_nothing(arguments, kept, prepared, monkeypatch):
    options = {"model": str(kept), "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    folder = pretrain(arguments(**options))
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    looks = [row for row in history if "eval_loss" in row]
    assert [row["step"] for row in looks] == [2, 4]
    model = load_model(folder)
    rows = [PackedTokens(prepared / "data", "validation")[i * 19 // 4] for i in range(4)][:ROWS]
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "position_ids")}
    scores = []
    for layer in model.model.layers:
        layer.self_attn.dt_proj.register_forward_hook(lambda m, i, dt: scores.append(dt))
    with torch.no_grad():
        model(**batch)
    for i, layer in enumerate(model.model.layers):
        A = layer.self_attn.A
        assert looks[-1][f"eval_A/layer_{i}"] == pytest.approx(A.abs().mean().item())
        s = torch.exp(A * torch.nn.functional.softplus(scores[i])).transpose(1, 2)
        assert looks[-1][f"eval_score_spread/layer_{i}"] == pytest.approx(s.std(-1).mean().item(), rel=1e-4)
        assert 0 < looks[-1][f"eval_evicted/layer_{i}"] < 1
        assert 0 < looks[-1][f"eval_seen_distance/layer_{i}"] < 32
    monkeypatch.setattr(module, "attention_statistics", lambda *_: {})
    without = pretrain(arguments(**options, output_dir=str(folder) + "-without"))
    ours, theirs = (load_model(f).state_dict() for f in (folder, without))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_tensorboard_is_told_and_the_gradient_is_printed(arguments, capsys):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = pretrain(arguments(max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=1))
    told = events.EventAccumulator(str(min(folder.rglob("events.out.tfevents.*")))).Reload()
    names = told.Tags()["scalars"]
    assert {f"eval/{name}/layer_3" for name in NAMES} | {"train/grad_norm", "train/bits_per_byte"} <= set(names)
    printed = capsys.readouterr().out
    assert f"gradient {told.Scalars('train/grad_norm')[0].value:.2f}" in printed


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tensorbord", r"names 'tensorbord' \(did you mean `tensorboard`\?\), expected tensorboard, trackio"),
        ("wandb", r"names wandb, which is not installed, expected it from `pip install wandb`"),
    ],
)
def test_reporters_that_are_not_there(arguments, tmp_path, monkeypatch, name, sentence):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=sentence):
        pretrain(arguments(report_to=name))
    assert not (tmp_path / "run").exists()
