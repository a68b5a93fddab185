"""Dynamic Mask Attention of a few new tokens over the slots of a layer, and how these take a new key.

The rule is that of ``models.cache_layer``: slots are filled in order of arrival; once all are taken, a new key takes
the slot of the one that ranks lowest, if it ranks higher itself.
"""

from __future__ import annotations

import math

import numpy as np

from .jit import compiled
from .layout import DT, DT_BIAS, K_NORM, PARTS, Q_NORM, QKV_BIAS, A
from .numbers import (
    ARRIVALS,
    aged_place,
    dot,
    exp,
    grid,
    hide_dropped,
    lowest,
    lowest_old,
    rms_norm,
    rotate,
    score,
    softmax_sums,
    to_integers,
)
from .products import key_products, put, value_sums
from .vectors import BLOCK, FLOAT32


@compiled
def insert(shape, floats, row, slots, layer, m, k, v, values, arrival):
    """Take a key into the slots of score head m.

    Args:
        k, v: (D,) of the head, k rotated.
        values: (G · D,) of all key/value heads, from which the score comes.
        arrival: how many tokens came before it.
    """
    D, width = shape.D, shape.G * shape.D
    weights = floats[row[DT] + m * width : row[DT] + (m + 1) * width]
    dt = dot(weights, values)
    if row[DT_BIAS] >= 0:
        dt += floats[row[DT_BIAS] + m]
    s = score(dt, floats[row[A] + m])
    place = aged_place(s, shape.lifetime, arrival) if shape.lifetime > 0.0 else grid(s)
    rank = place * ARRIVALS + arrival
    ranks, room = slots.ranks[layer, m], shape.window + shape.local_window
    slot = arrival
    if arrival >= room:
        if shape.local_window:
            slot = lowest_old(ranks, room, arrival + 1 - shape.local_window)
        else:
            slot = lowest(ranks, room)
            if ranks[slot] > rank:
                return
    slots.s[layer, m, slot] = s
    ranks[slot] = rank
    first = layer * shape.M + m
    keys = (first * shape.slots + slot // BLOCK * BLOCK) * D + slot % BLOCK
    held = (first * shape.slots + slot) * shape.D_padded
    for d in range(D):
        put(shape.cache_kind, slots.k.ctypes.data, keys + d * BLOCK, k[d])
        put(shape.cache_kind, slots.v.ctypes.data, held + d, v[d])


@compiled
def attend(shape, slots, layer, m, q, first, last, came, bias, seen, sums):
    """Σ p v over the slots ``first`` ≤ j < ``last`` for the query heads of score head m.

    Args:
        q: address of (H / M, D) queries, rotated and divided by √D.
        first: a multiple of 64.
        came: how many tokens have come, the newest included.
        bias: (slots,) work space, for a local window.
        seen: (H / M, slots) work space.
        sums: (H / M, D_padded + 2): Σ p v, the largest logit, and Σ p, where p = exp(logit − largest).
    """
    heads, kind, n = shape.H // shape.M, shape.cache_kind, last - first
    size = 4 if kind == FLOAT32 else 2
    scores = slots.s[layer, m]
    if shape.local_window and came > shape.window:
        held = min(came, shape.window + shape.local_window)
        hide_dropped(scores, slots.ranks[layer, m], held, shape.window, came - shape.local_window, bias)
        scores = bias
    base = (layer * shape.M + m) * shape.slots + first
    blocks = (n + BLOCK - 1) // BLOCK
    key_products(
        kind, heads, q, shape.D, slots.k.ctypes.data + base * shape.D * size, shape.D, blocks,
        seen.ctypes.data, shape.slots,
    )  # fmt: skip
    for h in range(heads):
        top, total = softmax_sums(seen[h], scores[first:], n)
        sums[h, : shape.D_padded] = np.float32(0.0)
        sums[h, shape.D_padded], sums[h, shape.D_padded + 1] = top, total
    value_sums(
        kind, heads, seen.ctypes.data, shape.slots, slots.v.ctypes.data + base * shape.D_padded * size, n,
        shape.D_padded, sums.ctypes.data, shape.D_padded + 2,
    )  # fmt: skip


@compiled
def combine(shape, sums, parts, out):
    """The parts of one head, (parts, D_padded + 2) of :func:`attend`, → their softmax's Σ p v, (D,)."""
    top = np.float32(-np.inf)
    for i in range(parts):
        top = max(top, sums[i, shape.D_padded])
    total = np.float32(0.0)
    out[: shape.D] = np.float32(0.0)
    for i in range(parts):
        weight = exp(sums[i, shape.D_padded] - top)
        total += weight * sums[i, shape.D_padded + 1]
        for d in range(shape.D):
            out[d] += weight * sums[i, d]
    for d in range(shape.D):
        out[d] /= total


@compiled
def parts_of(came, shape, threads):
    """How many parts of how many slots the keys of a head are cut into, for one query."""
    held = min(came, shape.window + shape.local_window)
    wanted = 1 if threads == 1 else max(1, 2 * threads // shape.M)
    size = max((held + wanted - 1) // wanted, 256)
    size = (size + 63) // 64 * 64
    return min((held + size - 1) // size, PARTS), max(size, (held + PARTS * 64 - 1) // (PARTS * 64) * 64)


@compiled
def take_heads(shape, floats, row, slots, work, layer, T, past):
    """Norm and rotate queries, keys and values of a layer, ``work.qkv`` (T, (H + 2 G) · D).

    Queries go to ``work.q`` (T, H · D), divided by √D; keys and values to their slots, unless several come that do not
    all fit: those :func:`attend_chunk` takes in one at a time.
    """
    H, G, M, D = shape.H, shape.G, shape.M, shape.D
    scale = np.float32(1.0 / math.sqrt(D))
    for t in range(T):
        line, angles = work.qkv[t], work.angles[t]
        if row[QKV_BIAS] >= 0:
            for i in range((H + 2 * G) * D):
                line[i] += floats[row[QKV_BIAS] + i]
        for h in range(H + G):
            head, norm = line[h * D : (h + 1) * D], row[Q_NORM] if h < H else row[K_NORM]
            if norm >= 0:
                rms_norm(head, floats[norm : norm + D], shape.eps, head)
            if h < H:
                rotate(head, angles, scale, work.q[t, h * D : (h + 1) * D])
            else:
                rotate(head, angles, np.float32(1.0), head)
    if past + T <= shape.window + shape.local_window or T == 1:
        for t in range(T):
            for m in range(M):
                insert_token(shape, floats, row, slots, work, layer, m, t, past)


@compiled
def insert_token(shape, floats, row, slots, work, layer, m, t, past):
    """Take key and value of token t, in ``work.qkv`` (T, (H + 2 G) · D), into the slots of score head m."""
    H, G, D, line = shape.H, shape.G, shape.D, work.qkv[t]
    k = (H + m * G // shape.M) * D
    values = line[(H + G) * D : (H + 2 * G) * D]
    insert(shape, floats, row, slots, layer, m, line[k : k + D], line[k + G * D : k + (G + 1) * D], values, past + t)


@compiled
def attend_chunk(shape, floats, row, slots, work, layer, T, past, threads, thread, chunk):
    """A chunk of attention: of one query some of a head's keys; of more all keys for one of them, or all in turn.

    What :func:`attend` finds goes to ``work.sums`` (M, T or parts, H / M, D_padded + 2).
    """
    M, room = shape.M, shape.window + shape.local_window
    width, q = shape.H // M * shape.D, work.q.ctypes.data
    if T == 1:
        parts, size = parts_of(past + 1, shape, threads)
        m, part = chunk // parts, chunk % parts
        last = min((part + 1) * size, min(past + 1, room))
        attend(
            shape, slots, layer, m, q + 4 * m * width, part * size, last, past + 1, work.bias[thread],
            work.seen[thread], work.sums[m, part],
        )  # fmt: skip
        return
    # While all fit, each sees those that came before it; then the slots are those of one query at a time.
    fit = past + T <= room
    zero = np.int64(0)  # not a literal, for which attention would be compiled once more
    first, last = (chunk % T, chunk % T + 1) if fit else (zero, T)
    m = chunk // T if fit else chunk
    for t in range(first, last):
        if not fit:
            insert_token(shape, floats, row, slots, work, layer, m, t, past)
        attend(
            shape, slots, layer, m, q + 4 * (t * work.q.shape[1] + m * width), zero, min(past + t + 1, room),
            past + t + 1, work.bias[thread], work.seen[thread], work.sums[m, t],
        )  # fmt: skip


@compiled
def combine_all(shape, work, T, parts):
    """Σ p v of all heads: ``work.sums`` (M, T or parts, H / M, D_padded + 2) → ``work.out`` (T, H · D), and out16."""
    heads = shape.H // shape.M
    for h in range(shape.H):
        sums = work.sums[h // heads]
        for t in range(T):
            first, last = (0, parts) if T == 1 else (t, t + 1)
            combine(shape, sums[first:last, h % heads], last - first, work.out[t, h * shape.D : (h + 1) * shape.D])
    for t in range(T if shape.integers else 0):
        work.factors[1, t] = to_integers(work.out[t], shape.H * shape.D, work.out16[t])
