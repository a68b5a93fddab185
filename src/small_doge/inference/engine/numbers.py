"""Functions of numbers that a step is made of: norms, activations, softmax, the score, the grid, routes to experts."""

from __future__ import annotations

import math

import numpy as np

from .jit import compiled
from .jit import compiled_in_any_order as _any_order
from .vectors import as_bits, as_float

ARRIVALS = 1 << 32  # as in ``models.cache_layer``
RECENT = 1 << 62
LONGEST = 1 << 19  # as in ``ops.dynamic_mask.window``


@compiled
def exp(x):
    """eˣ of a float32, within 2 in the last bit, without a branch, so that loops over it run in vectors."""
    bounded = max(min(x, np.float32(88.0)), np.float32(-87.0))
    n = (bounded * np.float32(1.44269504) + np.float32(12582912.0)) - np.float32(12582912.0)  # nearest integer
    f = bounded - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * f + np.float32(1.3981999507e-3)
    y = y * f + np.float32(8.3334519073e-3)
    y = y * f + np.float32(4.1665795894e-2)
    y = y * f + np.float32(1.6666665459e-1)
    y = y * f + np.float32(5.0000001201e-1)
    y = y * f * f + f + np.float32(1.0)
    y = y * as_float((np.int32(n) + np.int32(127)) << np.int32(23))
    return y if x >= np.float32(-87.0) else np.float32(0.0)


@compiled
def silu(x):
    """x / (1 + e⁻ˣ) of a float32."""
    return x / (np.float32(1.0) + exp(-x))


@_any_order
def rms_norm(x, weight, eps, out):
    """out ← x / √(mean x² + ε) · weight (arXiv:1910.07467), float32; n is the length of ``weight`` (n,)."""
    total = np.float32(0.0)
    for i in range(len(weight)):
        total += x[i] * x[i]
    scale = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(len(weight)) + np.float32(eps)))
    for i in range(len(weight)):
        out[i] = x[i] * scale * weight[i]


@_any_order
def dot(a, b):
    """Σ_i a_i · b_i of float32 (n,), added in any order; n is the length of a."""
    total = np.float32(0.0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@_any_order
def softmax_sums(logits, bias, n):
    """n of logits + bias, (slots,) float32, → exp(logit − largest), in place; returns the largest and the sum."""
    top = np.float32(-np.inf)
    for j in range(n):
        logits[j] += bias[j]
        top = max(top, logits[j])
    total = np.float32(0.0)
    for j in range(n):
        p = exp(logits[j] - top)
        logits[j] = p
        total += p
    return top, total


@_any_order
def to_integers(x, n, out):
    """x (n,) → the nearest integers of 16 bits that the largest becomes ± 32,767 among; returns the factor back."""
    largest = np.float32(0.0)
    for i in range(n):
        largest = max(largest, abs(x[i]))
    by = np.float32(32767.0) / largest if largest > 0 else np.float32(0.0)
    for i in range(n):
        y = x[i] * by
        out[i] = np.int16(np.int32(y + (np.float32(0.5) if y >= 0 else np.float32(-0.5))))
    return largest / np.float32(32767.0)


@compiled
def rotate(x, angles, scale, out):
    """Turn the pairs (x_d, x_{d + D/2}) by the angles (2, D/2), and multiply by ``scale``."""
    half = angles.shape[1]
    for d in range(half):
        first, second = x[d], x[d + half]
        out[d] = (first * angles[0, d] - second * angles[1, d]) * scale
        out[d + half] = (second * angles[0, d] + first * angles[1, d]) * scale


@compiled
def score(dt, a):
    """A key's score exp(A · softplus(dt)), computed in float64, as float32."""
    dt = np.float64(dt)
    softplus = dt if dt > 20.0 else math.log1p(math.exp(dt))
    return np.float32(math.exp(np.float64(a) * softplus))


@compiled
def grid(s):
    """The place (int64) of a float32 among floats of 12 bits of mantissa: ``ops.dynamic_mask.window.grid``."""
    bits = as_bits(s + np.float32(0.0))
    ordered = np.int64(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return (ordered + ((1 << 31) + (1 << 10))) >> 11


@compiled
def aged_place(s, lifetime, arrival):
    """``ops.dynamic_mask.window.places`` of one key: its score s ≥ 0 in tokens, and its arrival, int64."""
    bits = (np.int64(as_bits(s + np.float32(0.0))) + (1 << 10)) >> 11 << 11
    worth = np.floor(as_float(np.int32(bits)) * lifetime)
    return np.int64(min(worth, np.float32(LONGEST))) + arrival + 1


@compiled
def lowest(ranks, n):
    """Where the smallest of the first n ``ranks`` (slots,) int64 is."""
    smallest = ranks[0]
    for j in range(n):
        smallest = min(smallest, ranks[j])
    for j in range(n):
        if ranks[j] == smallest:
            return j
    return 0


@compiled
def lowest_old(ranks, n, first_recent):
    """The same, where the keys that arrived from ``first_recent`` on stand above all others."""
    best, smallest = 0, np.int64(0x7FFFFFFFFFFFFFFF)
    for j in range(n):
        order = ranks[j] + RECENT * (ranks[j] % ARRIVALS >= first_recent)
        if order < smallest:
            best, smallest = j, order
    return best


@compiled
def hide_dropped(s, ranks, n, window, first_recent, out):
    """The scores of the ``window`` best of n keys, and of those that arrived from ``first_recent`` on; −∞ else.

    Args:
        s: (slots,) float32.
        ranks: (slots,) int64.
        out: (slots,) float32.
    """
    worst = np.partition(ranks[:n], n - window)[n - window] if n > window else np.int64(-1)
    for j in range(n):
        seen = ranks[j] >= worst or ranks[j] % ARRIVALS >= first_recent
        out[j] = s[j] if seen else np.float32(-np.inf)
    out[n:] = np.float32(-np.inf)


@compiled
def _best_first(values, n, places, best):
    """The n places whose values are largest, in that order, the smaller place first among equals, by insertion."""
    held = 0
    for i in range(len(values)):
        value, place = values[i], places[i]
        at = held
        while at and (value > values[best[at - 1]] or (value == values[best[at - 1]] and place < places[best[at - 1]])):
            at -= 1
        if at >= n:
            continue
        held = min(held + 1, n)
        for j in range(held - 1, at, -1):
            best[j] = best[j - 1]
        best[at] = i
    return held


@compiled
def route(logits, k, chosen, shares):
    """The k best of K × K product keys and the softmax of their scores: ``ops.product_key``, for one token.

    Args:
        logits: (2 K,) float32.
        chosen: out (k,) int64, best first.
        shares: out (k,) float32.
    """
    K = len(logits) // 2
    few = min(k, K)
    a, b, places = np.empty(few, np.int64), np.empty(few, np.int64), np.arange(K)
    _best_first(logits[:K], few, places, a)
    _best_first(logits[K:], few, places, b)
    most = 0
    for i in range(few):
        most += min(k // (i + 1), K)
    sums, pairs, best = np.empty(most, np.float32), np.empty(most, np.int64), np.empty(k, np.int64)
    n = 0
    for i in range(few):
        for j in range(min(k // (i + 1), K)):
            sums[n] = logits[a[i]] + logits[K + b[j]]
            pairs[n] = a[i] * K + b[j]
            n += 1
    _best_first(sums, k, pairs, best)
    total = np.float32(0.0)
    for i in range(k):
        chosen[i] = pairs[best[i]]
        shares[i] = exp(sums[best[i]] - sums[best[0]])
        total += shares[i]
    for i in range(k):
        shares[i] /= total
