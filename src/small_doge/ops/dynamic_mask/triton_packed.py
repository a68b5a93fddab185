"""Triton kernels of attention to all keys of a document, each with its score as a bias, forward and backward.

Documents lie one behind the other in a row, so the keys of a query are one run of positions, start_i ≤ j ≤ i, and the
queries of a key another, j ≤ i < end_j. Tiles outside are not touched, and those that all of a tile see need no mask.
A kernel has one loop over all its tiles, as each loop fills and drains a pipeline of its own, and from several loops
one after the other Triton 3.6 makes products that wait for each other (tests/ops/compile_kernels.py counts them).

Shapes: B rows, H = M·N query heads on M heads of keys, T positions, D head size. q, k, v and do are descriptors of
(B, H or M, T, D), s and, where they are read in a loop, lse and delta of (B·M or B·H, T): blocks that Hopper copies by
itself and which give zeros past the end. out, dq, dk and dv are (B, T, H or M, D). Rows of lse, delta and db are
``stride`` apart. Logits are in base 2, as exp2 is what the hardware has: log₂ e is in ``scale`` and in s.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _dot(a, b, acc, EXACT: tl.constexpr):
    return tl.dot(a, b, acc, input_precision="ieee" if EXACT else "tf32")


@triton.jit
def _places(b, h, t, T, H, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where (BLOCK, BLOCK_D) numbers of head h at positions t stand in (B, T, H, D), and which of them exist."""
    d = tl.arange(0, BLOCK_D)
    at = ((b.to(tl.int64) * T + t) * H + h) * D
    return at[:, None] + d[None, :], (t[:, None] < T) & (d[None, :] < D)


@triton.jit
def _tile(M, N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row b, query head h on the head of keys m, and the first query of a program: the longest rows of keys first."""
    h = tl.program_id(1) % (M * N)
    return tl.program_id(1) // (M * N), h, h // N, (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M


@triton.jit
def _keys_of(i0, b, starts, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions of keys for the queries i0 … i0 + BLOCK_M − 1: from `first` on some of them see some, from `inner` to
    `diagonal` all see all, up to `last` some see some again."""
    last = tl.minimum(i0 + BLOCK_M, T)
    diagonal = i0 // BLOCK_N * BLOCK_N
    first = tl.load(starts + b * T + i0) // BLOCK_N * BLOCK_N
    inner = tl.minimum(tl.cdiv(tl.load(starts + b * T + last - 1), BLOCK_N) * BLOCK_N, diagonal)
    return first, inner, diagonal, last


@triton.jit
def forward(
    q, k, v, s, starts, out, lse,
    T, stride, scale, M, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Online softmax; one program a tile of queries. lse: (B·H, T) float32, in base 2."""
    b, h, m, i0 = _tile(M, N, BLOCK_M)
    i = i0 + tl.arange(0, BLOCK_M)
    first, inner, diagonal, last = _keys_of(i0, b, starts, T, BLOCK_M, BLOCK_N)
    start = tl.load(starts + b * T + i, mask=i < T, other=0)
    q_tile = q.load([b, h, i0, 0]).reshape(BLOCK_M, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for j0 in range(first, last, BLOCK_N):
        k_tile = k.load([b, m, j0, 0]).reshape(BLOCK_N, BLOCK_D)
        bias = s.load([b * M + m, j0])
        logits = _dot(q_tile, tl.trans(k_tile), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), EXACT)
        logits = logits * scale + bias
        if (j0 < inner) | (j0 >= diagonal):
            j = j0 + tl.arange(0, BLOCK_N)
            logits = tl.where((j[None, :] <= i[:, None]) & (j[None, :] >= start[:, None]), logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet
        p = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        v_tile = v.load([b, m, j0, 0]).reshape(BLOCK_N, BLOCK_D)
        acc = _dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], EXACT)
        top = new_top
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    at, here = _places(b, h, i, T, M * N, D, BLOCK_D)
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=here)
    at = (b * M * N + h).to(tl.int64) * stride + i
    tl.store(lse + at, tl.where(nothing, 0.0, top + tl.log2(total)), mask=i < T)


@triton.jit
def backward_queries(
    q, k, v, s, starts, out, lse, do, delta, dq,
    T, stride, scale, M, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """As `forward`: dq, and delta = Σ_d do·out (B·H, T) float32 for `backward_keys`."""
    b, h, m, i0 = _tile(M, N, BLOCK_M)
    i = i0 + tl.arange(0, BLOCK_M)
    first, inner, diagonal, last = _keys_of(i0, b, starts, T, BLOCK_M, BLOCK_N)
    start = tl.load(starts + b * T + i, mask=i < T, other=0)
    at, here = _places(b, h, i, T, M * N, D, BLOCK_D)
    out_tile = tl.load(out + at, mask=here, other=0.0)
    row = (b * M * N + h).to(tl.int64) * stride + i
    lse_i = tl.load(lse + row, mask=i < T, other=float("inf"))
    q_tile = q.load([b, h, i0, 0]).reshape(BLOCK_M, BLOCK_D)
    do_tile = do.load([b, h, i0, 0]).reshape(BLOCK_M, BLOCK_D)
    delta_i = tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + row, delta_i, mask=i < T)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for j0 in range(first, last, BLOCK_N):
        k_tile = k.load([b, m, j0, 0]).reshape(BLOCK_N, BLOCK_D)
        v_tile = v.load([b, m, j0, 0]).reshape(BLOCK_N, BLOCK_D)
        bias = s.load([b * M + m, j0])
        logits = _dot(q_tile, tl.trans(k_tile), zeros, EXACT) * scale + (bias - lse_i[:, None])
        if (j0 < inner) | (j0 >= diagonal):
            j = j0 + tl.arange(0, BLOCK_N)
            logits = tl.where((j[None, :] <= i[:, None]) & (j[None, :] >= start[:, None]), logits, float("-inf"))
        p = tl.exp2(logits)
        ds = p * (_dot(do_tile, tl.trans(v_tile), zeros, EXACT) - delta_i[:, None])
        acc = _dot(ds.to(k_tile.dtype), k_tile, acc, EXACT)
    tl.store(dq + at, (acc * (scale * LN_2)).to(dq.dtype.element_ty), mask=here)


@triton.jit
def backward_keys(
    q, k, v, s, ends, lse, do, delta, dk, dv, db,
    T, stride, scale, M, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program a tile of keys and head of keys: dk, dv (B, T, M, D) and db (B·M, T) float32, each written once.

    Everything stands transposed, keys along the first dimension. One loop goes through the query heads of the keys,
    and the tiles of queries of each: a pipeline is filled and drained once.
    """
    row = tl.program_id(1)
    b, m = row // M, row % M
    j0 = tl.program_id(0) * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    after = tl.minimum(j0 + BLOCK_N, T)  # the keys of this tile end here
    ends += b * T
    stop = tl.load(ends + j, mask=j < T, other=0)
    whole, last = tl.load(ends + j0), tl.load(ends + after - 1)
    # Masked up to `inner`, where the diagonal is past, seen by all up to `outer`, where a document ends, then masked.
    first = j0 // BLOCK_M * BLOCK_M
    inner = tl.cdiv(after, BLOCK_M) * BLOCK_M
    outer = tl.maximum(whole // BLOCK_M * BLOCK_M, inner)
    tiles = tl.cdiv(last - first, BLOCK_M)
    bias = s.load([row, j0]).reshape(BLOCK_N)
    k_tile = k.load([b, m, j0, 0]).reshape(BLOCK_N, BLOCK_D)
    v_tile = v.load([b, m, j0, 0]).reshape(BLOCK_N, BLOCK_D)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    db_tile = tl.zeros([BLOCK_N], tl.float32)
    zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(N * tiles):
        n = step // tiles
        i0 = first + (step - n * tiles) * BLOCK_M
        q_tile = q.load([b, m * N + n, i0, 0]).reshape(BLOCK_M, BLOCK_D)
        do_tile = do.load([b, m * N + n, i0, 0]).reshape(BLOCK_M, BLOCK_D)
        lse_i = lse.load([row * N + n, i0])
        delta_i = delta.load([row * N + n, i0])
        logits = _dot(k_tile, tl.trans(q_tile), zeros, EXACT)
        dp = _dot(v_tile, tl.trans(do_tile), zeros, EXACT)
        logits = logits * scale + (bias[:, None] - lse_i)
        if (i0 < inner) | (i0 >= outer):
            i = i0 + tl.arange(0, BLOCK_M)
            logits = tl.where((j[:, None] <= i[None, :]) & (i[None, :] < stop[:, None]), logits, float("-inf"))
        p = tl.exp2(logits)
        dv_tile = _dot(p.to(do_tile.dtype), do_tile, dv_tile, EXACT)
        ds = p * (dp - delta_i)
        db_tile += tl.sum(ds, 1)
        dk_tile = _dot(ds.to(q_tile.dtype), q_tile, dk_tile, EXACT)
    at, there = _places(b, m, j, T, M, D, BLOCK_D)
    tl.store(dk + at, (dk_tile * (scale * LN_2)).to(dk.dtype.element_ty), mask=there)
    tl.store(dv + at, dv_tile.to(dv.dtype.element_ty), mask=there)
    tl.store(db + row.to(tl.int64) * stride + j, db_tile * LN_2, mask=j < T)
