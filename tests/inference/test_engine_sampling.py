"""Sampling of the engine: the probabilities are those that transformers' processors give, and draws follow them."""

import numpy as np
import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

pytest.importorskip("numba")

from small_doge.inference.engine import GREEDY, Sampling
from small_doge.inference.engine.sampling import choose, draw, likeliest, probabilities

V = 1000


def some_logits(spread=3.0, seed=0):
    return (torch.randn(V, generator=torch.Generator().manual_seed(seed)) * spread).numpy()


def theirs(logits, temperature, top_k, top_p):
    x = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits.copy())[None].double())
    if top_k:
        x = TopKLogitsWarper(top_k)(None, x)
    if top_p < 1:
        x = TopPLogitsWarper(top_p)(None, x)
    return x.softmax(-1)[0].numpy()


def ours(logits, temperature, top_k, top_p):
    p = np.zeros(V, np.float32)
    probabilities(logits, temperature, top_k, top_p, p)
    return p / p.sum(dtype=np.float64)


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 30.0])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.5, 40, 1.0), (0.3, 7, 0.5), (1.0, 1, 1.0), (2.0, 0, 0.01), (1.0, 0, 0.999),
     (1.0, 5000, 1.0), (0.01, 0, 0.9)],
)  # fmt: skip
def test_probabilities_are_those_of_transformers(spread, temperature, top_k, top_p):
    logits = some_logits(spread)
    want, found = theirs(logits, temperature, top_k, top_p), ours(logits, temperature, top_k, top_p)
    # At the edge of top-p one token more or less: sums of float32 and float64 differ there.
    differ = (want > 1e-30) != (found > 1e-30)
    assert want[differ].sum() + found[differ].sum() <= 3e-3 / (1 if spread >= 1 else 0.5)
    assert differ.sum() <= 1 + (temperature < 0.1)
    assert np.abs(want - found)[~differ].max() < 3e-3 if differ.any() else np.abs(want - found).max() < 1e-5


def test_equal_logits():
    logits = np.zeros(V, np.float32)
    logits[:10] = 1.0
    assert (ours(logits, 1.0, 3, 1.0) > 0).sum() == 10  # as transformers: those as likely as the third
    assert (ours(logits, 1.0, 10, 0.25) > 0).sum() == 3  # a tenth each: the fewest that make up a quarter
    assert likeliest(logits) == 0


def test_repetition_penalty_is_that_of_transformers():
    logits, ids = some_logits(), [3, 8, 8, 999]
    want = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), torch.from_numpy(logits.copy())[None])[0]
    used, space = np.zeros(V, np.uint8), np.empty(V, np.float32)
    used[ids] = 1
    found = logits.copy()
    assert choose(found, used, 0.0, 0, 1.0, 1.3, 0.0, space) == int(want.argmax())
    assert np.abs(found - want.numpy()).max() < 1e-6


def test_draws_follow_the_probabilities():
    p = np.array([0, 0.5, 0, 0.2, 0.3, 0], np.float32)
    random = np.random.default_rng(0)
    counts = np.bincount([draw(p, u) for u in random.random(20000)], minlength=6) / 20000
    assert np.abs(counts - p).max() < 0.012
    assert draw(p, 0.0) == 1
    assert draw(p, 0.9999999999) == 4


def test_options_out_of_range():
    for name, value in (
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0),
    ):
        with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
            Sampling(**{name: value})
    assert GREEDY.temperature == 0
