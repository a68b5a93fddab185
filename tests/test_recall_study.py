"""The mixers of experiments/recall_study.py: each is causal and learns, and computes what its formula says."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from small_doge.evaluation.recall import RecallRecipe

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
sys.path[:0] = [str(EXPERIMENTS), str(EXPERIMENTS.parent / "benchmarks")]
import mixers  # noqa: E402
import recall_study  # noqa: E402

T = 40  # no multiple of a chunk


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(mixers, "CHUNK", 16)


def model_of(mixer: str, window: int = 8):
    recipe = RecallRecipe("", lengths=[T], pairs=[4], vocab_size=64, hidden_size=32, keep_window_size=window, seed=1)
    return mixers.build(mixer, recipe)


@pytest.mark.parametrize("mixer", mixers.MIXERS)
def test_a_later_token_changes_no_earlier_output_and_every_weight_learns(mixer):
    model = model_of(mixer, T if mixer == "full" else 8)
    torch.manual_seed(0)
    for parameter in model.parameters():  # from the first values nothing would flow into some of them
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    ids = torch.randint(64, (2, T))
    out = model(input_ids=ids, use_cache=False).logits
    changed = ids.clone()
    changed[:, 25:] = (ids[:, 25:] + 1) % 64
    other = model(input_ids=changed, use_cache=False).logits
    torch.testing.assert_close(out[:, :25], other[:, :25], rtol=1e-4, atol=1e-4)
    assert (out[:, 25] - other[:, 25]).abs().amax() > 0.1
    out.logsumexp(-1).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


@pytest.mark.parametrize("mixer", ["dma", "sliding", "query_topk"])
def test_a_window_over_the_whole_row_is_full_attention(mixer):
    """Of ``dma`` before it has learnt anything."""
    full, windowed = model_of("full", T), model_of(mixer, T)
    windowed.load_state_dict(full.state_dict(), strict=mixer != "query_topk")
    ids = torch.randint(64, (2, T))
    outs = (m(input_ids=ids, use_cache=False).logits for m in (full, windowed))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_query_topk_sees_the_keys_it_agrees_with_most():
    attention, angles = model_of("query_topk").model.layers[0].self_attn, (torch.ones(1), torch.zeros(1))
    x = torch.randn(1, T, 32)
    out, _ = attention(x, angles)
    q, k, v = (p(x).view(1, T, 2, 16).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = attention.q_norm(q), attention.k_norm(k)
    i, head = 30, 1
    products = k[0, head, : i + 1] @ q[0, head, i] / math.sqrt(16)
    kept = products.argsort()[-8:]
    by_hand = products[kept].softmax(0) @ v[0, head, kept]
    whole = torch.linalg.lstsq(attention.o_proj.weight, out[0, i]).solution
    torch.testing.assert_close(whole[16:], by_hand, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("length", [1, 16, 40])
def test_decayed_sums_are_those_of_a_state_that_decays(length):
    q, k, v = torch.randn(2, length, 3, 4), torch.randn(2, length, 3, 4), torch.randn(2, length, 3, 5)
    decay = -torch.rand(2, length, 3)
    state, found = torch.zeros(2, 3, 4, 5), []
    for t in range(length):
        state = decay[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        found.append((q[:, t, :, :, None] * state).sum(2))
    torch.testing.assert_close(mixers.decayed_sums(q, k, v, decay), torch.stack(found, 1), rtol=1e-4, atol=1e-5)


def test_taylor_attention_has_the_weights_of_its_expansion():
    q, k, v = torch.randn(2, T, 3, 16), torch.randn(2, T, 3, 16), torch.randn(2, T, 3, 5)
    s = torch.einsum("bihd,bjhd->bhij", q, k) / 4
    weights = (1 + s + s**2 / 2).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bhij,bjhv->bihv", weights, v)
    torch.testing.assert_close(mixers.taylor_attention(q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_the_widths_at_the_middle_rate_come_first_and_no_point_twice():
    named = ["dma", "full", "sliding", "query_topk", "ssd", "based"]
    args = SimpleNamespace(mixers=named, dimensions=[32, 64], learning_rates=[1e-3, 3e-3, 1e-2])
    args.lengths, args.seeds, args.window, args.windows = [256, 2048], [0], 512, [64, 512, 2048]
    found = recall_study.plan(args)
    assert len({tuple(p.values()) for p in found}) == len(found) == 2 * 3 * 6 + 3 * 3 * 2
    assert {(p["hidden_size"], p["learning_rate"]) for p in found[:12]} == {(32, 3e-3), (64, 3e-3)}
    assert {p["window"] for p in found[:12]} == {512, 2048, 0, 64}
    assert [p["learning_rate"] for p in found[:36:12]] == [3e-3, 1e-2, 1e-3]
    assert {(p["hidden_size"], p["window"]) for p in found[36:]} == {(64, 64), (64, 2048)}


def test_a_point_has_a_row_for_each_length_and_what_dma_keeps():
    point = {"mixer": "dma", "hidden_size": 64, "window": 16, "learning_rate": 1e-2, "seed": 0}
    rows = recall_study.measured(point, lengths=[32, 64], steps=1, tokens_per_step=64, test_rows=2, filler="random")
    assert [(row["length"], row["pairs"]) for row in rows] == [(32, 4), (64, 8)]
    assert "kept" not in rows[0]
    # Nothing is learnt yet: the window slides, and its keys are the last ones.
    assert rows[1]["kept"].startswith("[[[0.0, ")
