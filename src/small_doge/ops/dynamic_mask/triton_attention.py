"""Triton kernels of Dynamic Mask Attention: the mask is an interval j ≤ i < e_j a key, and only its tiles are touched.

Shapes: R = B·M rows of keys, each with N = H/M query heads; T positions; D head size. Logits are in base 2, as exp2 is
what the hardware has: log₂ e is in ``scale`` and in the listed scores, and the log-sum-exp is stored so.

Queries find their keys in the lists of ``triton_window.list_keys``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, EXACT: tl.constexpr):
    return tl.dot(a, b, acc, input_precision="ieee" if EXACT else "tf32")


@triton.jit
def _hide(logits, i, j, x, ends):
    """Logits (BLOCK_M, BLOCK_N) of queries i and the keys j in slots x, −∞ where the key is not seen."""
    return tl.where((j[None, :] <= i[:, None]) & (i[:, None] < tl.load(ends + x)[None, :]), logits, float("-inf"))


@triton.jit
def _ranges(i0, row, ranges, T, OLD, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the list of the queries i0 … i0 + BLOCK_M − 1 begins, and how many tiles of it they see: `whole` that all
    of them see, `old` with those that some of them do, and `new`, which begin at OLD and some of them see."""
    base = (row * tl.cdiv(T, CHUNK) + i0 // CHUNK) * (OLD + CHUNK)
    ranges += (row * tl.cdiv(T, BLOCK_M) + i0 // BLOCK_M) * 3
    old, new = tl.cdiv(tl.load(ranges + 1), BLOCK_N), tl.cdiv(tl.load(ranges + 2), BLOCK_N)
    return base, tl.load(ranges) // BLOCK_N, old, new


@triton.jit
def forward(
    q, k, v, keys, ends, scores, ranges, out, lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, T, scale,
    M, OLD, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries and query head. out: (B, H, T, D) by its strides; lse: (B·H, T) float32."""
    head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    b, h = (head // (M * N)).to(tl.int64), head % (M * N)
    row = (head // N).to(tl.int64)
    m = h // N
    i0 = tile * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    here = (i[:, None] < T) & (d[None, :] < D)
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + m * stride_kh
    v += b * stride_vb + m * stride_vh
    q_tile = tl.load(q + i[:, None] * stride_qt + d[None, :], mask=here, other=0.0)
    base, whole, old, new = _ranges(i0, row, ranges, T, OLD, CHUNK, BLOCK_M, BLOCK_N)
    keys += base
    ends += base
    scores += base
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for step in range(old + new):
        begin = tl.where(step < old, step * BLOCK_N, OLD + (step - old) * BLOCK_N)
        x = begin + tl.arange(0, BLOCK_N)
        j, bias = tl.load(keys + x), tl.load(scores + x)
        k_tile = tl.load(k + j[:, None] * stride_kt + d[None, :], mask=d[None, :] < D, other=0.0)
        logits = _dot(q_tile, tl.trans(k_tile), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), EXACT) * scale + bias[None, :]
        if step >= whole:
            logits = _hide(logits, i, j, x, ends)
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet
        p = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        v_tile = tl.load(v + j[:, None] * stride_vt + d[None, :], mask=d[None, :] < D, other=0.0)
        acc = _dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], EXACT)
        top = new_top
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    acc = acc / total[:, None]
    out += b * stride_ob + h * stride_oh
    tl.store(out + i[:, None] * stride_ot + d[None, :], acc.to(out.dtype.element_ty), mask=here)
    tl.store(lse + head.to(tl.int64) * T + i, tl.where(nothing, 0.0, top + tl.log2(total)), mask=i < T)


@triton.jit
def backward_queries(
    q, k, v, keys, ends, scores, ranges, out, lse, do, delta, dq,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_db, stride_dh, stride_dt, T, scale,
    M, OLD, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries and query head: dq, and delta = Σ_d do·out (B·H, T) float32 for `backward_keys`.

    dq has the strides of q; out and do their own.
    """
    head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = (head // (M * N)).to(tl.int64), head % (M * N)
    row = (head // N).to(tl.int64)
    m = h // N
    i0 = tile * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    here = (i[:, None] < T) & (d[None, :] < D)
    at_q = b * stride_qb + h * stride_qh + i[:, None] * stride_qt + d[None, :]
    q_tile = tl.load(q + at_q, mask=here, other=0.0)
    out_tile = tl.load(out + b * stride_ob + h * stride_oh + i[:, None] * stride_ot + d[None, :], mask=here, other=0.0)
    do_tile = tl.load(do + b * stride_db + h * stride_dh + i[:, None] * stride_dt + d[None, :], mask=here, other=0.0)
    delta_i = tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    at = head.to(tl.int64) * T + i
    tl.store(delta + at, delta_i, mask=i < T)
    lse_i = tl.load(lse + at, mask=i < T, other=float("inf"))
    k += b * stride_kb + m * stride_kh
    v += b * stride_vb + m * stride_vh
    base, whole, old, new = _ranges(i0, row, ranges, T, OLD, CHUNK, BLOCK_M, BLOCK_N)
    keys += base
    ends += base
    scores += base
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(old + new):
        begin = tl.where(step < old, step * BLOCK_N, OLD + (step - old) * BLOCK_N)
        x = begin + tl.arange(0, BLOCK_N)
        j, bias = tl.load(keys + x), tl.load(scores + x)
        k_tile = tl.load(k + j[:, None] * stride_kt + d[None, :], mask=d[None, :] < D, other=0.0)
        logits = _dot(q_tile, tl.trans(k_tile), zeros, EXACT) * scale + (bias[None, :] - lse_i[:, None])
        if step >= whole:
            logits = _hide(logits, i, j, x, ends)
        p = tl.exp2(logits)
        v_tile = tl.load(v + j[:, None] * stride_vt + d[None, :], mask=d[None, :] < D, other=0.0)
        ds = p * (_dot(do_tile, tl.trans(v_tile), zeros, EXACT) - delta_i[:, None])
        acc = _dot(ds.to(k_tile.dtype), k_tile, acc, EXACT)
    acc *= scale * 0.6931471805599453
    tl.store(dq + at_q, acc.to(dq.dtype.element_ty), mask=here)


@triton.jit
def backward_keys(
    q, k, v, keys, ends, scores, sizes, lse, do, delta, dk, dv, db,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt, T, scale,
    M, OLD, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program a tile of keys, chunk of queries and row: adds to dk, dv (R, T, D) and db (R, T), all float32.

    dk, dv and db start at zero and every chunk adds its part, in no order that repeats.
    """
    row = tl.program_id(1).to(tl.int64)
    b, m = row // M, row % M
    d = tl.arange(0, BLOCK_D)
    tiles = (OLD + CHUNK) // BLOCK_N
    chunks = tl.cdiv(T, CHUNK)
    chunk = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    size = tl.load(sizes + (row * chunks + chunk) * 2)
    if tile * BLOCK_N >= OLD:
        size = OLD + tl.load(sizes + (row * chunks + chunk) * 2 + 1)
    if tile * BLOCK_N >= size:
        return
    base = (row * chunks + chunk) * (OLD + CHUNK)
    x = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.load(keys + base + x)
    end = tl.load(ends + base + x)
    bias = tl.load(scores + base + x)
    there = (end[:, None] > 0) & (d[None, :] < D)
    first = chunk * CHUNK
    limit = tl.minimum(first + CHUNK, T)
    low = tl.min(tl.where(end > 0, j, T), 0)
    start = tl.maximum(first, low // BLOCK_M * BLOCK_M)
    stop = tl.minimum(limit, tl.max(end, 0))
    # Old keys are all seen, and need no mask, until the first of them leaves.
    middle = tl.where(low < first, tl.minimum(tl.min(end, 0), limit) // BLOCK_M * BLOCK_M, start)
    middle = tl.maximum(middle, start)
    q += b * stride_qb + m * N * stride_qh
    do += b * stride_db + m * N * stride_dh
    lse += row * N * T
    delta += row * N * T
    k_tile = tl.load(k + b * stride_kb + m * stride_kh + j[:, None] * stride_kt + d[None, :], mask=there, other=0.0)
    v_tile = tl.load(v + b * stride_vb + m * stride_vh + j[:, None] * stride_vt + d[None, :], mask=there, other=0.0)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    db_tile = tl.zeros([BLOCK_N], tl.float32)
    zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    steps = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    for step in range(N * steps):
        n = step // steps
        begin = start + (step - n * steps) * BLOCK_M
        i = begin + tl.arange(0, BLOCK_M)
        here = (i[:, None] < T) & (d[None, :] < D)
        q_tile = tl.load(q + n * stride_qh + i[:, None] * stride_qt + d[None, :], mask=here, other=0.0)
        do_tile = tl.load(do + n * stride_dh + i[:, None] * stride_dt + d[None, :], mask=here, other=0.0)
        lse_i = tl.load(lse + n * T + i, mask=i < T, other=float("inf"))  # past the end: p is 0
        delta_i = tl.load(delta + n * T + i, mask=i < T, other=0.0)
        logits = _dot(k_tile, tl.trans(q_tile), zeros, EXACT) * scale + (bias[:, None] - lse_i[None, :])
        if begin >= middle:
            logits = tl.where((j[:, None] <= i[None, :]) & (i[None, :] < end[:, None]), logits, float("-inf"))
        p = tl.exp2(logits)
        dv_tile = _dot(p.to(do_tile.dtype), do_tile, dv_tile, EXACT)
        ds = p * (_dot(v_tile, tl.trans(do_tile), zeros, EXACT) - delta_i[None, :])
        db_tile += tl.sum(ds, 1)
        dk_tile = _dot(ds.to(q_tile.dtype), q_tile, dk_tile, EXACT)
    dk_tile *= scale * 0.6931471805599453
    at = (row * T + j)[:, None] * D + d[None, :]
    tl.atomic_add(dk + at, dk_tile, mask=there, sem="relaxed")
    tl.atomic_add(dv + at, dv_tile, mask=there, sem="relaxed")
    tl.atomic_add(db + row * T + j, db_tile, mask=end > 0, sem="relaxed")
