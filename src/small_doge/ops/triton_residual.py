"""The backward pass of RMSNorm and a scaled residual stream, in one Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dithered(x, seed):
    """x, float32, as a number that bfloat16 has: its last 16 bits go, after a random number as long has been added."""
    noise = (seed * 0x9E3779B1) >> 16  # Knuth's multiplicative hashing
    rounded = ((x.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # the bits of a NaN could overflow


@triton.jit
def backward(
    d_normed, d_carried, y, weight, scale, dy, sums,
    N, eps, C: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dy (N, C) and sums (programs, 2, C), parts of the weights' gradients.

    Of rows y, d_normed and d_carried (N, C), with x̂ = y / rms(y) and g = d_normed · weight:
    dy = (g − x̂ · mean(g · x̂)) / rms(y) + d_carried · scale, rounded up or down in bfloat16 with the probabilities
    that make its mean exact. To the nearest, what a layer adds would be lost wherever it is less than half of the last
    place, in every layer alike.
    """
    c = tl.arange(0, WIDTH)
    there = c < C
    w = tl.load(weight + c, mask=there, other=0.0).to(tl.float32)
    r = tl.load(scale + c, mask=there, other=0.0).to(tl.float32)
    d_weight = tl.zeros([WIDTH], tl.float32)
    d_scale = tl.zeros([WIDTH], tl.float32)
    program, programs = tl.program_id(0), tl.num_programs(0)
    at = program.to(tl.int64) * C + c
    for _ in tl.range(program, N, programs, num_stages=3):  # the next rows are on their way already
        y_n = tl.load(y + at, mask=there, other=0.0).to(tl.float32)
        g = tl.load(d_normed + at, mask=there, other=0.0).to(tl.float32)
        carried = tl.load(d_carried + at, mask=there, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(y_n * y_n) / C + eps)
        hat = y_n * inverse
        d_weight += g * hat
        d_scale += carried * y_n
        g *= w
        grad = (g - hat * (tl.sum(g * hat) / C)) * inverse + carried * r
        if dy.dtype.element_ty == tl.bfloat16:
            grad = _dithered(grad, y_n.to(tl.uint32, bitcast=True) + at.to(tl.uint32))
        tl.store(dy + at, grad.to(dy.dtype.element_ty), mask=there)
        at += programs * C
    sums += program.to(tl.int64) * 2 * C
    tl.store(sums + c, d_weight, mask=there)
    tl.store(sums + C + c, d_scale, mask=there)
