"""The backward pass of RMSNorm and a scaled residual stream, in one Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def backward(
    d_normed, d_carried, y, weight, scale, dy, copy, sums,
    N, eps, C: tl.constexpr, WIDTH: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """dy (N, C) and, with COPY, the same in another dtype; sums (programs, 2, C), parts of the weights' gradients.

    Of rows y, d_normed and d_carried (N, C), with x̂ = y / rms(y) and g = d_normed · weight:
    dy = (g − x̂ · mean(g · x̂)) / rms(y) + d_carried · scale.
    """
    c = tl.arange(0, WIDTH)
    there = c < C
    w = tl.load(weight + c, mask=there, other=0.0).to(tl.float32)
    r = tl.load(scale + c, mask=there, other=0.0).to(tl.float32)
    d_weight = tl.zeros([WIDTH], tl.float32)
    d_scale = tl.zeros([WIDTH], tl.float32)
    program, programs = tl.program_id(0), tl.num_programs(0)
    at = program.to(tl.int64) * C + c
    for _ in range(program, N, programs):
        y_n = tl.load(y + at, mask=there, other=0.0).to(tl.float32)
        g = tl.load(d_normed + at, mask=there, other=0.0).to(tl.float32)
        carried = tl.load(d_carried + at, mask=there, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(y_n * y_n) / C + eps)
        hat = y_n * inverse
        d_weight += g * hat
        d_scale += carried * y_n
        g *= w
        grad = (g - hat * (tl.sum(g * hat) / C)) * inverse + carried * r
        tl.store(dy + at, grad.to(dy.dtype.element_ty), mask=there)
        if COPY:
            tl.store(copy + at, grad.to(copy.dtype.element_ty), mask=there)
        at += programs * C
    sums += program.to(tl.int64) * 2 * C
    tl.store(sums + c, d_weight, mask=there)
    tl.store(sums + C + c, d_scale, mask=there)
