"""Triton kernels of attention to all keys of a document, each with its score as a bias, forward and backward.

Documents lie one behind the other in a row, so the keys of a query are one run of positions, start_i ≤ j ≤ i, and the
queries of a key another, j ≤ i < end_j. Tiles outside are not touched, and those that all of a tile see need no mask.

Shapes: B rows, H = M·N query heads on M heads of keys, T positions, D head size. q, k, v and do are descriptors of
(B, H or M, T, D), whose blocks Hopper copies by itself and which give zeros past the end; out, dq, dk and dv are
(B, T, H or M, D). Logits are in base 2, as exp2 is what the hardware has: log₂ e is in ``scale``, and the log-sum-exp
is stored so.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


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
def _keys_of(i0, b, starts, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions of keys for the queries i0 … i0 + BLOCK_M − 1: from `first` on some of them see some, from `inner` to
    `diagonal` all see all, up to `last` some see some again; and where the document of each begins, (BLOCK_M,)."""
    i = i0 + tl.arange(0, BLOCK_M)
    last = tl.minimum(i0 + BLOCK_M, T)
    diagonal = i0 // BLOCK_N * BLOCK_N
    starts += b * T
    start = tl.load(starts + i, mask=i < T, other=0)
    first = tl.load(starts + i0) // BLOCK_N * BLOCK_N
    inner = tl.minimum(tl.cdiv(tl.load(starts + last - 1), BLOCK_N) * BLOCK_N, diagonal)
    return start, first, inner, diagonal, last


@triton.jit
def _attend(
    acc, top, total, q, i, start, begin, end, s, k, v, b, m, T, scale,
    MASKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One pass of online softmax over the keys begin ≤ j < end."""
    for j0 in range(begin, end, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        k_tile = k.load([b, m, j0, 0]).reshape(BLOCK_N, BLOCK_D)
        bias = tl.load(s + j, mask=j < T, other=0.0) if MASKED else tl.load(s + j)
        logits = _dot(q, tl.trans(k_tile), tl.zeros([q.shape[0], BLOCK_N], tl.float32), EXACT)
        logits = logits * scale + (bias * LOG2_E)[None, :]
        if MASKED:
            logits = tl.where((j[None, :] <= i[:, None]) & (j[None, :] >= start[:, None]), logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet
        p = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        v_tile = v.load([b, m, j0, 0]).reshape(BLOCK_N, BLOCK_D)
        acc = _dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], EXACT)
        top = new_top
    return acc, top, total


@triton.jit
def forward(
    q, k, v, s, starts, out, lse,
    T, scale, M, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries and query head. lse: (B·H, T) float32."""
    head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    b, h = head // (M * N), head % (M * N)
    m = h // N
    i0 = tile * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    s += (b * M + m).to(tl.int64) * T
    q_tile = q.load([b, h, i0, 0]).reshape(BLOCK_M, BLOCK_D)
    start, first, inner, diagonal, last = _keys_of(i0, b, starts, T, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, top, total = _attend(
        acc, top, total, q_tile, i, start, first, inner, s, k, v, b, m, T, scale, True, BLOCK_D, BLOCK_N, EXACT,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q_tile, i, start, inner, diagonal, s, k, v, b, m, T, scale, False, BLOCK_D, BLOCK_N, EXACT,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q_tile, i, start, diagonal, last, s, k, v, b, m, T, scale, True, BLOCK_D, BLOCK_N, EXACT,
    )  # fmt: skip
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    at, here = _places(b, h, i, T, M * N, D, BLOCK_D)
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=here)
    tl.store(lse + head.to(tl.int64) * T + i, tl.where(nothing, 0.0, top + tl.log2(total)), mask=i < T)


@triton.jit
def _collect_dq(
    dq, q, do, lse, delta, i, start, begin, end, s, k, v, b, m, T, scale,
    MASKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds the part of the keys begin ≤ j < end."""
    for j0 in range(begin, end, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        k_tile = k.load([b, m, j0, 0]).reshape(BLOCK_N, BLOCK_D)
        v_tile = v.load([b, m, j0, 0]).reshape(BLOCK_N, BLOCK_D)
        bias = tl.load(s + j, mask=j < T, other=0.0) if MASKED else tl.load(s + j)
        zeros = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        logits = _dot(q, tl.trans(k_tile), zeros, EXACT) * scale + ((bias * LOG2_E)[None, :] - lse[:, None])
        if MASKED:
            logits = tl.where((j[None, :] <= i[:, None]) & (j[None, :] >= start[:, None]), logits, float("-inf"))
        p = tl.exp2(logits)
        ds = p * (_dot(do, tl.trans(v_tile), zeros, EXACT) - delta[:, None])
        dq = _dot(ds.to(k_tile.dtype), k_tile, dq, EXACT)
    return dq


@triton.jit
def backward_queries(
    q, k, v, s, starts, out, lse, do, delta, dq,
    T, scale, M, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries and query head: dq, and delta = Σ_d do·out (B·H, T) float32 for `backward_keys`."""
    head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = head // (M * N), head % (M * N)
    m = h // N
    i0 = tile * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    at, here = _places(b, h, i, T, M * N, D, BLOCK_D)
    q_tile = q.load([b, h, i0, 0]).reshape(BLOCK_M, BLOCK_D)
    out_tile = tl.load(out + at, mask=here, other=0.0)
    do_tile = do.load([b, h, i0, 0]).reshape(BLOCK_M, BLOCK_D)
    delta_i = tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    row = head.to(tl.int64) * T
    tl.store(delta + row + i, delta_i, mask=i < T)
    lse_i = tl.load(lse + row + i, mask=i < T, other=float("inf"))
    s += (b * M + m).to(tl.int64) * T
    start, first, inner, diagonal, last = _keys_of(i0, b, starts, T, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = _collect_dq(
        acc, q_tile, do_tile, lse_i, delta_i, i, start, first, inner, s, k, v, b, m, T, scale, True, BLOCK_D, BLOCK_N,
        EXACT,
    )  # fmt: skip
    acc = _collect_dq(
        acc, q_tile, do_tile, lse_i, delta_i, i, start, inner, diagonal, s, k, v, b, m, T, scale, False, BLOCK_D,
        BLOCK_N, EXACT,
    )  # fmt: skip
    acc = _collect_dq(
        acc, q_tile, do_tile, lse_i, delta_i, i, start, diagonal, last, s, k, v, b, m, T, scale, True, BLOCK_D,
        BLOCK_N, EXACT,
    )  # fmt: skip
    acc *= scale * 0.6931471805599453
    tl.store(dq + at, acc.to(dq.dtype.element_ty), mask=here)


@triton.jit
def _collect_dkv(
    dk, dv, db, k_tile, v_tile, bias, j, stop, begin, end, q, do, lse, delta, b, h, T, scale,
    MASKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds the part of the queries begin ≤ i < end; everything stands transposed, keys along the first dimension."""
    for i0 in range(begin, end, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        q_tile = q.load([b, h, i0, 0]).reshape(BLOCK_M, BLOCK_D)
        lse_i = tl.load(lse + i, mask=i < T, other=float("inf")) if MASKED else tl.load(lse + i)
        zeros = tl.zeros([k_tile.shape[0], BLOCK_M], tl.float32)
        logits = _dot(k_tile, tl.trans(q_tile), zeros, EXACT) * scale + (bias[:, None] - lse_i[None, :])
        if MASKED:
            logits = tl.where((j[:, None] <= i[None, :]) & (i[None, :] < stop[:, None]), logits, float("-inf"))
        p = tl.exp2(logits)
        do_tile = do.load([b, h, i0, 0]).reshape(BLOCK_M, BLOCK_D)
        dv = _dot(p.to(do_tile.dtype), do_tile, dv, EXACT)
        delta_i = tl.load(delta + i, mask=i < T, other=0.0) if MASKED else tl.load(delta + i)
        ds = p * (_dot(v_tile, tl.trans(do_tile), zeros, EXACT) - delta_i[None, :])
        db += tl.sum(ds, 1)
        dk = _dot(ds.to(q_tile.dtype), q_tile, dk, EXACT)
    return dk, dv, db


@triton.jit
def backward_keys(
    q, k, v, s, ends, lse, do, delta, dk, dv, db,
    T, scale, M, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """One program a tile of keys and head of keys: dk, dv (B, T, M, D) and db (B, M, T) float32, each written once."""
    row = tl.program_id(1)
    b, m = row // M, row % M
    j0 = tl.program_id(0) * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    after = tl.minimum(j0 + BLOCK_N, T)  # the keys of this tile end here
    ends += b * T
    stop = tl.load(ends + j, mask=j < T, other=0)
    whole, last = tl.load(ends + j0), tl.load(ends + after - 1)
    # Masked up to `inner`, where the diagonal is past, seen by all up to `outer`, where a document ends, then masked.
    inner = tl.cdiv(after, BLOCK_M) * BLOCK_M
    outer = tl.maximum(whole // BLOCK_M * BLOCK_M, inner)
    s += row.to(tl.int64) * T
    bias = tl.load(s + j, mask=j < T, other=0.0) * LOG2_E
    k_tile = k.load([b, m, j0, 0]).reshape(BLOCK_N, BLOCK_D)
    v_tile = v.load([b, m, j0, 0]).reshape(BLOCK_N, BLOCK_D)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    db_tile = tl.zeros([BLOCK_N], tl.float32)
    for n in range(N):
        h = m * N + n
        rows = (row * N + n).to(tl.int64) * T
        dk_tile, dv_tile, db_tile = _collect_dkv(
            dk_tile, dv_tile, db_tile, k_tile, v_tile, bias, j, stop, j0 // BLOCK_M * BLOCK_M, tl.minimum(inner,
            last), q, do, lse + rows, delta + rows, b, h, T, scale, True, BLOCK_D, BLOCK_M, EXACT,
        )  # fmt: skip
        dk_tile, dv_tile, db_tile = _collect_dkv(
            dk_tile, dv_tile, db_tile, k_tile, v_tile, bias, j, stop, inner, outer, q, do, lse + rows, delta + rows,
            b, h, T, scale, False, BLOCK_D, BLOCK_M, EXACT,
        )  # fmt: skip
        dk_tile, dv_tile, db_tile = _collect_dkv(
            dk_tile, dv_tile, db_tile, k_tile, v_tile, bias, j, stop, outer, last, q, do, lse + rows, delta + rows, b,
            h, T, scale, True, BLOCK_D, BLOCK_M, EXACT,
        )  # fmt: skip
    dk_tile *= scale * 0.6931471805599453
    at, there = _places(b, m, j, T, M, D, BLOCK_D)
    tl.store(dk + at, dk_tile.to(dk.dtype.element_ty), mask=there)
    tl.store(dv + at, dv_tile.to(dv.dtype.element_ty), mask=there)
    tl.store(db + row.to(tl.int64) * T + j, db_tile, mask=j < T)
