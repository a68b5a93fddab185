"""From logits to the next token, in transformers' order: repetition penalty, temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .jit import compiled
from .numbers import exp
from .vectors import as_bits

_BUCKETS = 1 << 12  # of probabilities: their exponent and upper bits of the mantissa


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, under transformers' names.

    Attributes:
        temperature: 0 takes the likeliest token; below 1 sharper, above 1 flatter.
        top_k: the k likeliest tokens only, and those as likely as the last of them; 0 for all.
        top_p: the fewest likeliest tokens that make up this mass; 1 for all.
        repetition_penalty: logits of tokens that came before are divided by it, or multiplied if negative.

    Raises:
        ValueError: for a number out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, expected 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, expected more than 0")


GREEDY = Sampling(temperature=0.0)


@compiled
def likeliest(logits):
    """The first of the largest of ``logits`` (V,)."""
    top = logits[0]
    for i in range(len(logits)):
        top = max(top, logits[i])
    for i in range(len(logits)):
        if logits[i] == top:
            return i
    return 0


@compiled
def penalise(logits, used, penalty):
    """In place, for the tokens whose place in ``used`` (V,) is not 0."""
    penalty = np.float32(penalty)
    for i in range(len(logits)):
        if used[i]:
            logits[i] = logits[i] * penalty if logits[i] < 0 else logits[i] / penalty


@compiled
def _bucket(p):
    """Larger for larger p; 0 ≤ p ≤ 1 has bits up to 0x3F800000."""
    return np.int64(as_bits(p)) >> 18


@compiled
def _keep(p, at_least, fewest, mass, ties):
    """Set to 0 all but the largest of p: as few as are ``fewest``, or weigh ``mass``, whichever is asked for (> 0).

    Args:
        at_least: numbers below cannot be among them.
        ties: whether numbers that equal the last one stay too.
    """
    counts, masses = np.zeros(_BUCKETS, np.int64), np.zeros(_BUCKETS, np.float64)
    for i in range(len(p)):
        if p[i] >= at_least and p[i] > 0:
            b = _bucket(p[i])
            counts[b] += 1
            masses[b] += p[i]
    bucket, count, weight = _BUCKETS - 1, 0, 0.0
    while bucket > 0:
        enough = count + counts[bucket] >= fewest if fewest > 0 else weight + masses[bucket] >= mass
        if enough:
            break
        count += counts[bucket]
        weight += masses[bucket]
        bucket -= 1
    inside, n = np.empty(counts[bucket], np.float32), 0
    for i in range(len(p)):
        if p[i] >= at_least and p[i] > 0 and _bucket(p[i]) == bucket:
            inside[n] = p[i]
            n += 1
    inside = np.sort(inside)
    last, equal = np.float32(0.0), 0  # the smallest that stays, and how many of its equals do
    for i in range(n - 1, -1, -1):
        equal = equal + 1 if inside[i] == last else 1
        last = inside[i]
        count += 1
        weight += inside[i]
        if (count >= fewest) if fewest > 0 else (weight >= mass):
            break
    for i in range(len(p)):
        if p[i] == last:
            equal -= 1
            if equal < 0 and not ties:
                p[i] = np.float32(0.0)
        elif p[i] < last:
            p[i] = np.float32(0.0)


@compiled
def probabilities(logits, temperature, top_k, top_p, p):
    """What each token is likely after temperature, top-k and top-p, up to a factor: logits (V,) → p (V,)."""
    top = logits[likeliest(logits)]
    by = np.float32(1.0 / temperature)
    for i in range(len(logits)):
        p[i] = exp((logits[i] - top) * by)
    if 0 < top_k < len(p):
        _keep(p, np.float32(0.0), top_k, 0.0, True)
    if top_p < 1:
        total = 0.0
        for i in range(len(p)):
            total += p[i]
        # Those that weigh less than the part left over, even if all were as heavy, are none of the likeliest.
        _keep(p, np.float32((1 - top_p) * total / len(p) * 0.999), 0, top_p * total, False)


@compiled
def draw(p, uniform):
    """The token where the sum of p (V,) from the left first exceeds ``uniform`` (0 ≤ u < 1) of the whole."""
    total = 0.0
    for i in range(len(p)):
        total += p[i]
    wanted, so_far, last = uniform * total, 0.0, 0
    for i in range(len(p)):
        if p[i] > 0:
            so_far += p[i]
            last = i
            if so_far > wanted:
                break
    return last


@compiled
def choose(logits, used, temperature, top_k, top_p, penalty, uniform, p):
    """The next token. ``used`` (V,) marks those that came before, ``p`` (V,) float32 is work space."""
    if penalty != 1:
        penalise(logits, used, penalty)
    if temperature == 0:
        return likeliest(logits)
    probabilities(logits, temperature, top_k, top_p, p)
    return draw(p, uniform)
