"""Triton kernels of decoding: one new key takes the slot of the worst, and one query attends to all slots.

Shapes: R = B·M rows of slots, each with H/M query heads; N slots, standing one after the other in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def replace_worst(
    k, v, s, ranks,  # (R, N, D) twice, (R, N) float32, (R, N) int64
    new_k, new_v, new_s, new_ranks,  # one key a row, by the strides of its B and M
    stride_kb, stride_km, stride_vb, stride_vm, stride_sb, stride_sm, stride_rb, stride_rm, N, M,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program a row. Unless the new key is itself the worst."""
    row = tl.program_id(0).to(tl.int64)
    b, m = row // M, row % M
    rank = tl.load(new_ranks + b * stride_rb + m * stride_rm)
    ranks += row * N
    worst, slot = rank, -1
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        held = tl.load(ranks + n, mask=n < N, other=9223372036854775807)
        lowest = tl.min(held, 0)
        if lowest < worst:
            worst = lowest
            slot = tl.min(tl.where(held == lowest, n, N), 0)
    if slot >= 0:
        d = tl.arange(0, BLOCK_D)
        at = (row * N + slot) * D + d
        new_key = tl.load(new_k + b * stride_kb + m * stride_km + d, mask=d < D)
        new_value = tl.load(new_v + b * stride_vb + m * stride_vm + d, mask=d < D)
        tl.store(k + at, new_key, mask=d < D)
        tl.store(v + at, new_value, mask=d < D)
        tl.store(s + row * N + slot, tl.load(new_s + b * stride_sb + m * stride_sm))
        tl.store(ranks + slot, rank)


@triton.jit
def attend(
    q, k, v, s, tops, totals, parts,  # q (B, H, 1, D) by its strides; k, v, s as above
    stride_qb, stride_qh, stride_kr, stride_vr, stride_sr, N, M, scale,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program a row and tile of slots: each query head's largest logit (base 2), total and sum of values there.

    tops, totals (R, HEADS, tiles) and parts (R, HEADS, tiles, D), float32.
    """
    row, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    b, m = row // M, row % M
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    there = (n < N)[:, None] & (d < D)[None, :]
    k_tile = tl.load(k + row * stride_kr + n[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
    v_tile = tl.load(v + row * stride_vr + n[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
    bias = tl.load(s + row * stride_sr + n, mask=n < N, other=float("-inf")) * 1.4426950408889634
    for h in tl.static_range(HEADS):
        q_h = tl.load(q + b * stride_qb + (m * HEADS + h) * stride_qh + d, mask=d < D, other=0.0).to(tl.float32)
        logits = tl.sum(k_tile * q_h[None, :], 1) * scale + bias
        top = tl.max(logits, 0)
        p = tl.exp2(logits - tl.where(top == float("-inf"), 0.0, top))
        at = (row * HEADS + h) * tiles + tile
        tl.store(tops + at, top)
        tl.store(totals + at, tl.sum(p, 0))
        tl.store(parts + at * D + d, tl.sum(p[:, None] * v_tile, 0), mask=d < D)


@triton.jit
def combine(
    tops, totals, parts, out, tiles,  # out (R·HEADS, D)
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program a query head: the softmax over all tiles."""
    head = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, TILES)
    d = tl.arange(0, BLOCK_D)
    top = tl.load(tops + head * tiles + x, mask=x < tiles, other=float("-inf"))
    share = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(share * tl.load(totals + head * tiles + x, mask=x < tiles, other=0.0), 0)
    at = (head * tiles + x)[:, None] * D + d[None, :]
    part = tl.load(parts + at, mask=(x < tiles)[:, None] & (d < D)[None, :], other=0.0)
    mixed = tl.sum(share[:, None] * part, 0) / total
    tl.store(out + head * D + d, mixed.to(out.dtype.element_ty), mask=d < D)
