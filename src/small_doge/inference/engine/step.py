"""One step of a Doge model on a CPU: T new tokens in, their logits out, the slots moved on. All of it is jitted.

Every thread of a crew runs :func:`step`; see ``crew`` for the regions that a layer consists of here: queries, keys and
values · attention · output · gate and up · down. What follows a region (norms, rotation, the new key's slot) is done by
whoever finishes it.
"""

from __future__ import annotations

import numpy as np

from .attention import attend_chunk, combine_all, parts_of, take_heads
from .crew import LINE, TOO_LATE, finish, open_next, take, wait
from .jit import compiled
from .layout import (
    DOWN,
    DOWN_BIAS,
    EMBED,
    EXPERT_IN,
    EXPERT_OUT,
    GATE_UP,
    GATE_UP_BIAS,
    HEAD,
    KEEP,
    KEEP_2,
    NORM,
    NORM_2,
    OUT,
    OUT_BIAS,
    QKV,
    ROUTER,
    ROWS,
)
from .numbers import rms_norm, route, silu, to_integers
from .products import add_row, multiply_rows

REGIONS = 5  # of a layer; the head is one more


@compiled
def chunks_of(rows, n, T, threads):
    """How many chunks of how many rows, a multiple of 4: some four for each thread, none too small to be worth it."""
    if threads == 1:
        size = ROWS
    else:
        worth = (16384 // (n * T) + 4) // 4 * 4  # weights that take a thread a microsecond
        size = min(max(rows // (4 * threads) // 4 * 4, worth, 4), ROWS)
    return (rows + size - 1) // size, size


@compiled
def norm_all(shape, floats, weight, work, T):
    """normed (T, C_padded) and normed16 of ``work`` ← the RMSNorm of its x; ``weight`` is a place among the floats."""
    for t in range(T):
        rms_norm(work.x[t], floats[weight : weight + shape.C], shape.eps, work.normed[t])
        if shape.integers:
            work.factors[0, t] = to_integers(work.normed[t], shape.C, work.normed16[t])


@compiled
def times(row, matrix, first, last, n, x, t, T, y, step):
    """:func:`multiply_rows` for a matrix of the table and T tokens from t on.

    Args:
        x: (…, n) float32, (…, n) int16 and (…,) factors.
    """
    wide, short, factors = x
    multiply_rows(
        row[3 * matrix + 2], row[3 * matrix], row[3 * matrix + 1], first, last, n, wide.ctypes.data + 4 * t * n,
        short.ctypes.data + 2 * t * n, factors.ctypes.data + 4 * t, T, y, step,
    )  # fmt: skip


@compiled
def add_to_x(shape, floats, keep, bias, work, rows, first, last, T):
    """x ← keep · x + rows + bias, in the channels first ≤ c < last of ``work.x`` (T, C_padded).

    ``keep`` and ``bias`` are places among the floats, ``bias`` −1 for none; ``rows`` (≥ T · (last − first),) float32.
    """
    n = last - first
    for t in range(T):
        x, new = work.x[t, first:last], rows[t * n : (t + 1) * n]
        for i in range(n):
            x[i] = floats[keep + first + i] * x[i] + new[i]
        if bias >= 0:
            for i in range(n):
                x[i] += floats[bias + first + i]


@compiled
def add_experts(shape, row, work, t, first, last, routed):
    """routed (C_padded,) ← Σ p_e · silu(x · down_embed[e]) · up_embed[e] over some of the experts of token t."""
    n, one, product = shape.C_padded, np.int64(1), np.empty(1, np.float32)
    x = (work.normed, work.normed16, work.factors[0])
    routed[:] = np.float32(0.0)
    for i in range(first, last):
        expert = work.chosen[t, i]
        times(row, EXPERT_IN, expert, expert + 1, n, x, t, one, product.ctypes.data, one)
        factor = work.shares[t, i] * silu(product[0])
        add_row(row[3 * EXPERT_OUT + 2], row[3 * EXPERT_OUT], row[3 * EXPERT_OUT + 1], expert, n, factor,
                routed.ctypes.data)  # fmt: skip


@compiled
def expert_chunks(shape, T, threads):
    """How many chunks the experts of T tokens are: a token each, or some experts of the one."""
    if shape.keys == 0:
        return 0
    return T if T > 1 else min(2 * threads if threads > 1 else 1, shape.experts)


@compiled
def start(shape, table, floats, work, ids, T):
    """Embeddings of ``ids`` (T,) int64 in ``work.x`` (T, C_padded), and the norm of the first layer."""
    ends = table[shape.layers]
    for t in range(T):
        work.x[t] = np.float32(0.0)
        add_row(ends[3 * EMBED + 2], ends[3 * EMBED], ends[3 * EMBED + 1], ids[t], shape.C_padded, np.float32(1.0),
                work.x.ctypes.data + 4 * t * shape.C_padded)  # fmt: skip
    norm_all(shape, floats, table[0, NORM], work, T)


@compiled
def step(shape, table, floats, slots, work, T, past, outputs, generation, threads, thread, spin):
    """Run the layers and the head; :func:`start` has been called by one thread.

    Args:
        T: new tokens.
        past: tokens that came before.
        outputs: how many of the last tokens get logits.
        generation: number of this step, larger than any before with the same ``work``.
        threads: in the crew; every one of them may call this, and the one that must is number 0.
        spin: nanoseconds that a thread looks for the others' chunks before it sleeps.

    Returns:
        The nanoseconds that this thread waited for others beyond ``spin`` in each region: those in which it slept.
    """
    C, Cp, Ip, D = shape.C, shape.C_padded, shape.inner_padded, shape.D
    sync, mine = work.sync.ctypes.data, work.rows[thread]
    temporary = mine.ctypes.data
    normed = (work.normed, work.normed16, work.factors[0])
    attended = (work.out, work.out16, work.factors[1])
    inner = (work.inner, work.inner16, work.factors[2])
    region, asleep, zero = sync, 0, np.int64(0)  # not a literal, for which all below would be compiled once more
    for layer in range(shape.layers):
        row = table[layer]
        # Queries, keys and values
        rows = (shape.H + 2 * shape.G) * D
        n, size = chunks_of(rows, Cp, T, threads)
        while True:
            c = take(region, generation, n)
            if c < 0:
                break
            first, last = c * size, min((c + 1) * size, rows)
            times(row, QKV, first, last, Cp, normed, zero, T, work.qkv.ctypes.data + 4 * first, rows)
            if finish(region, n):
                take_heads(shape, floats, row, slots, work, layer, T, past)
                open_next(region, generation)
        if c == TOO_LATE:
            return asleep
        asleep += wait(region, generation, spin)
        region += LINE

        # Attention
        parts, _ = parts_of(past + T, shape, threads)
        if T == 1:
            n = shape.M * parts
        else:
            n = shape.M * T if past + T <= shape.window + shape.local_window else shape.M
        while True:
            c = take(region, generation, n)
            if c < 0:
                break
            attend_chunk(shape, floats, row, slots, work, layer, T, past, threads, thread, c)
            if finish(region, n):
                combine_all(shape, work, T, parts)
                open_next(region, generation)
        if c == TOO_LATE:
            return asleep
        asleep += wait(region, generation, spin)
        region += LINE

        # Its output
        width = work.out.shape[1]
        n, size = chunks_of(C, width, T, threads)
        while True:
            c = take(region, generation, n)
            if c < 0:
                break
            first, last = c * size, min((c + 1) * size, C)
            times(row, OUT, first, last, width, attended, zero, T, temporary, last - first)
            add_to_x(shape, floats, row[KEEP], row[OUT_BIAS], work, mine, first, last, T)
            if finish(region, n):
                norm_all(shape, floats, row[NORM_2], work, T)
                open_next(region, generation)
        if c == TOO_LATE:
            return asleep
        asleep += wait(region, generation, spin)
        region += LINE

        # Gate and up, whose rows stand in turn; and the router
        rows = 2 * shape.inner
        n, size = chunks_of(rows, Cp, T, threads)
        routers = 1 if shape.keys else 0
        while True:
            c = take(region, generation, n + routers)
            if c < 0:
                break
            if c < routers:
                times(row, ROUTER, zero, 2 * shape.keys, Cp, normed, zero, T, work.routes.ctypes.data, 2 * shape.keys)
                for t in range(T):
                    route(work.routes[t], shape.experts, work.chosen[t], work.shares[t])
            else:
                first, last = (c - routers) * size, min((c - routers + 1) * size, rows)
                times(row, GATE_UP, first, last, Cp, normed, zero, T, temporary, last - first)
                bias = row[GATE_UP_BIAS]
                for t in range(T):
                    pairs = mine[t * (last - first) : (t + 1) * (last - first)]
                    if bias >= 0:
                        for i in range(last - first):
                            pairs[i] += floats[bias + first + i]
                    products = work.inner[t, first // 2 : last // 2]
                    for i in range((last - first) // 2):
                        products[i] = silu(pairs[2 * i]) * pairs[2 * i + 1]
            if finish(region, n + routers):
                for t in range(T if shape.integers else 0):
                    work.factors[2, t] = to_integers(work.inner[t], shape.inner, work.inner16[t])
                open_next(region, generation)
        if c == TOO_LATE:
            return asleep
        asleep += wait(region, generation, spin)
        region += LINE

        # Down, and the experts
        n, size = chunks_of(C, Ip, T, threads)
        extra = expert_chunks(shape, T, threads)
        while True:
            c = take(region, generation, n + extra)
            if c < 0:
                break
            if c < extra:
                if T > 1:
                    add_experts(shape, row, work, c, zero, shape.experts, work.routed[c])
                else:
                    first, last = c * shape.experts // extra, (c + 1) * shape.experts // extra
                    add_experts(shape, row, work, zero, first, last, work.routed[c])
            else:
                first, last = (c - extra) * size, min((c - extra + 1) * size, C)
                times(row, DOWN, first, last, Ip, inner, zero, T, temporary, last - first)
                add_to_x(shape, floats, row[KEEP_2], row[DOWN_BIAS], work, mine, first, last, T)
            if finish(region, n + extra):
                for j in range(extra):
                    x, routed = work.x[j if T > 1 else 0], work.routed[j]
                    for i in range(C):
                        x[i] += routed[i]
                norm_all(shape, floats, table[layer + 1, NORM], work, T)
                open_next(region, generation)
        if c == TOO_LATE:
            return asleep
        asleep += wait(region, generation, spin)
        region += LINE

    if outputs == 0:
        return asleep
    ends = table[shape.layers]
    n, size = chunks_of(shape.vocabulary, Cp, outputs, threads)
    while True:
        c = take(region, generation, n)
        if c < 0:
            break
        first, last = c * size, min((c + 1) * size, shape.vocabulary)
        logits = work.logits.ctypes.data + 4 * first
        times(ends, HEAD, first, last, Cp, normed, T - outputs, outputs, logits, shape.vocabulary)
        if finish(region, n):
            open_next(region, generation)
    if c != TOO_LATE:
        asleep += wait(region, generation, spin)
    return asleep
