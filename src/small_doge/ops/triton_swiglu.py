"""Triton kernels of the SwiGLU: gate and up stand side by side, as one matrix product gives them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(gate_up, out, total, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out (N, I) ← silu(gate) · up of gate_up (N, 2 I), N · I = total."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate_at = at // WIDTH * 2 * WIDTH + at % WIDTH
    g = tl.load(gate_up + gate_at, mask=at < total).to(tl.float32)
    u = tl.load(gate_up + gate_at + WIDTH, mask=at < total).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=at < total)


@triton.jit
def backward(gate_up, grad, out, total, WIDTH: tl.constexpr, BLOCK: tl.constexpr, AGAIN: tl.constexpr):
    """out (N, 2 I) ← gradients of gate and up side by side, from gate_up (N, 2 I) and grad (N, I).

    ``AGAIN``: grad ← silu(gate) · up, computed again, where the gradient was.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate_at = at // WIDTH * 2 * WIDTH + at % WIDTH
    g = tl.load(gate_up + gate_at, mask=at < total).to(tl.float32)
    u = tl.load(gate_up + gate_at + WIDTH, mask=at < total).to(tl.float32)
    d = tl.load(grad + at, mask=at < total).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    gate = d * u * sigmoid * (1 + g * (1 - sigmoid))
    tl.store(out + gate_at, gate.to(out.dtype.element_ty), mask=at < total)
    tl.store(out + gate_at + WIDTH, (d * g * sigmoid).to(out.dtype.element_ty), mask=at < total)
    if AGAIN:
        tl.store(grad + at, (g * sigmoid * u).to(grad.dtype.element_ty), mask=at < total)
