"""Where things stand: the numbers that describe a model and its work space, in the form that jitted code takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Matrices of a layer. Each has three numbers in the table: address, address of its scales, kind.
QKV, OUT, GATE_UP, DOWN, ROUTER, EXPERT_IN, EXPERT_OUT = range(7)
EMBED, HEAD = 0, 1  # those of the row behind the last layer, whose NORM is the model's
MATRICES = 7
# Vectors of a layer, as float32. Each has one number, its place among the floats of the file, or −1.
NORM, Q_NORM, K_NORM, A, DT, DT_BIAS, QKV_BIAS, OUT_BIAS, KEEP, NORM_2, GATE_UP_BIAS, DOWN_BIAS, KEEP_2 = range(
    3 * MATRICES, 3 * MATRICES + 13
)
COLUMNS = 3 * MATRICES + 13

TOKENS_AT_ONCE = 64  # of a prompt
PARTS = 16  # pieces that the keys of a head are cut into for several threads, at most


def padded(n: int, to: int = 64) -> int:
    """The smallest multiple of ``to`` that is at least n."""
    return -(-n // to) * to


class Shape(NamedTuple):
    """What a model is made of; C, I, D in ``…_padded`` are rounded up to whole blocks of 64."""

    layers: int
    C: int
    C_padded: int
    H: int
    G: int
    M: int
    D: int
    D_padded: int
    inner: int
    inner_padded: int
    vocabulary: int
    window: int
    local_window: int
    lifetime: np.float32  # tokens that a score of 1 is worth, 0 where scores do not age
    slots: int  # of a head, a multiple of 64; window + local_window of them are used
    keys: int  # K of the router, 0 without experts
    experts: int  # k of a token
    eps: float
    cache_kind: int  # of keys and values
    integers: int  # whether weights of 8 or 4 bits are among the matrices


class Slots(NamedTuple):
    """What is held of a text: of every layer and score head its slots."""

    k: np.ndarray  # (L, M, slots / 64, D, 64), float32, or uint16 for bfloat16, as bytes
    v: np.ndarray  # (L, M, slots, D_padded), likewise
    s: np.ndarray  # (L, M, slots) float32, −∞ where nothing is
    ranks: np.ndarray  # (L, M, slots) int64: place · 2³² + arrival, as in ``models.cache_layer``


class Work(NamedTuple):
    """Where a step puts what it works out. T tokens at most ``TOKENS_AT_ONCE``; all float32."""

    x: np.ndarray  # (T, C_padded)
    normed: np.ndarray  # (T, C_padded)
    qkv: np.ndarray  # (T, (H + 2 G) · D)
    q: np.ndarray  # (T, H · D)
    out: np.ndarray  # (T, H · D padded)
    inner: np.ndarray  # (T, inner_padded)
    # For weights of 8 and 4 bits the same once more, as integers and their factors
    normed16: np.ndarray  # (T, C_padded) int16
    out16: np.ndarray  # (T, H · D padded) int16
    inner16: np.ndarray  # (T, inner_padded) int16
    factors: np.ndarray  # (3, T): of normed16, out16 and inner16
    routes: np.ndarray  # (T, 2 K)
    chosen: np.ndarray  # (T, k) int64
    shares: np.ndarray  # (T, k)
    routed: np.ndarray  # (T or parts, C_padded)
    logits: np.ndarray  # (T, vocabulary)
    seen: np.ndarray  # (threads, H / M, slots) logits of keys
    sums: np.ndarray  # (M, T or parts, H / M, D_padded + 2): Σ p v, then the largest logit and Σ p
    bias: np.ndarray  # (threads, slots), with a local window: scores, −∞ for keys that are out of W
    rows: np.ndarray  # (threads, T · rows of a chunk)
    angles: np.ndarray  # (T, 2, D / 2) cos and sin
    sync: np.ndarray  # int64, see ``crew``


ROWS = 128  # of a chunk at most
