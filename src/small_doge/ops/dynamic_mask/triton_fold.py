"""Triton kernel of the folded path: rows that become a little wider, in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(
    x, s, out,  # (B, N, T, D) and (B, N, T, W) by their strides; s (B, N, T) float32, or None
    stride_xb, stride_xn, stride_xt, stride_ob, stride_on, stride_ot, T, N, root,
    D: tl.constexpr, BLOCK_D: tl.constexpr, W: tl.constexpr, EXTRA: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copies x and appends, for keys, √D·s in two parts, for queries (s None) two ones; then zeros up to W."""
    head = tl.program_id(1)
    b, n = (head // N).to(tl.int64), (head % N).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    real = t < T
    here = real[:, None] & (d < D)[None, :]
    x_tile = tl.load(x + b * stride_xb + n * stride_xn + t[:, None] * stride_xt + d[None, :], mask=here)
    out += b * stride_ob + n * stride_on + t[:, None] * stride_ot
    tl.store(out + d[None, :], x_tile, mask=here)
    c = tl.arange(0, EXTRA)[None, :]
    if s is None:
        columns = tl.where(c < 2, 1.0, 0.0) + tl.zeros([ROWS, 1], tl.float32)
    else:
        bias = tl.load(s + head.to(tl.int64) * T + t, mask=real, other=0.0) * root
        high = bias.to(x_tile.dtype).to(tl.float32)
        low = tl.where(tl.abs(bias) == float("inf"), 0.0, bias - high)
        columns = tl.where(c == 0, high[:, None], tl.where(c == 1, low[:, None], 0.0))
    tl.store(out + D + c, columns.to(x_tile.dtype), mask=real[:, None] & (c < W - D))
