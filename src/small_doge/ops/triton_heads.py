"""Triton kernels from the product that is q, k and v to heads whose q and k are normed and rotated, and back.

A program has BLOCK tokens and goes through their heads. The two halves of a head, which rotate against each other, are
tiles (BLOCK, HALF) of their own. N = B·T tokens, D head size; qkv (N, (H + 2 G)·D), q, k and v one behind the other.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tokens(T, N, angle_stride, D: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr):
    """Tokens n (BLOCK, 1), which row and position they are, places d in a half of a head (1, HALF), where their angles
    stand, (BLOCK, HALF), and which of these exist."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, HALF)[None, :]
    b, t = n // T, n % T
    return n, b, t, d, b * angle_stride + t * (D // 2) + d, (n < N) & (d < D // 2)


@triton.jit
def _halves(x, at, here, D: tl.constexpr):
    """Both halves of what stands at ``at``, in float32."""
    first = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    return first, tl.load(x + at + D // 2, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _inverse_rms(first, second, eps, D: tl.constexpr):
    """(BLOCK, 1) of a head's two halves."""
    return tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1))[:, None] / D + eps)


@triton.jit
def _norm_and_rotate(x, x_at, out, out_at, weight, cos, sin, here, d, eps, D: tl.constexpr):
    first, second = _halves(x, x_at, here, D)
    inverse = _inverse_rms(first, second, eps, D)
    weight_1, weight_2 = _halves(weight, d, d < D // 2, D)
    first, second = first * inverse * weight_1, second * inverse * weight_2
    tl.store(out + out_at, (first * cos - second * sin).to(out.dtype.element_ty), mask=here)
    tl.store(out + out_at + D // 2, (second * cos + first * sin).to(out.dtype.element_ty), mask=here)


@triton.jit
def forward(
    qkv, q_norm, k_norm, cos, sin, scorer, q, k, scored,
    N, T, angle_stride, eps, H, G, M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
    WIDTH: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """q (N, H, D) and k (N, G, D) of their parts of qkv, and a layer of v, scored (N, M), by its weight scorer
    (M, G·D), which as a product of its own takes twice as long."""
    n, _, _, d, angle, here = _tokens(T, N, angle_stride, D, BLOCK, HALF)
    cos_t = tl.load(cos + angle, mask=here, other=0.0).to(tl.float32)
    sin_t = tl.load(sin + angle, mask=here, other=0.0).to(tl.float32)
    at = n * (H + 2 * G) * D
    for h in range(H):
        _norm_and_rotate(qkv, at + h * D + d, q, (n * H + h) * D + d, q_norm, cos_t, sin_t, here, d, eps, D)
    for h in range(G):
        _norm_and_rotate(qkv, at + (H + h) * D + d, k, (n * G + h) * D + d, k_norm, cos_t, sin_t, here, d, eps, D)
    c, m = tl.arange(0, WIDTH), tl.arange(0, SCORES)[None, :]
    total = tl.zeros([BLOCK, SCORES], tl.float32)
    for h in range(G):
        value = tl.load(qkv + at + (H + G + h) * D + c[None, :], mask=(n < N) & (c < D)[None, :], other=0.0)
        weight = tl.load(scorer + (m * G + h) * D + c[:, None], mask=(m < M) & (c < D)[:, None], other=0.0)
        total = tl.dot(value, weight, total, input_precision="ieee")
    tl.store(scored + n * M + m, total.to(scored.dtype.element_ty), mask=(n < N) & (m < M))


@triton.jit
def _back(x, grad, grad_at, out, at, weight, cos, sin, rstd, sum_1, sum_2, dots, here, d, eps, D: tl.constexpr):
    """Writes the gradient of one head, times rstd, and adds its tokens' parts of the norm's to the two sums, and to
    dots (BLOCK, 1) those of gradient · x, which are there because of eps alone."""
    first, second = _halves(x, at, here, D)
    inverse = _inverse_rms(first, second, eps, D)
    first, second = first * inverse, second * inverse
    grad_1, grad_2 = _halves(grad, grad_at, here, D)
    grad_1, grad_2 = grad_1 * cos + grad_2 * sin, grad_2 * cos - grad_1 * sin
    sum_1 += grad_1 * first
    sum_2 += grad_2 * second
    weight_1, weight_2 = _halves(weight, d, d < D // 2, D)
    grad_1, grad_2 = grad_1 * weight_1, grad_2 * weight_2
    mean = (tl.sum(grad_1 * first, 1) + tl.sum(grad_2 * second, 1))[:, None] / D
    dots += D * mean * eps * inverse * inverse
    inverse *= rstd
    tl.store(out + at, ((grad_1 - first * mean) * inverse).to(out.dtype.element_ty), mask=here)
    tl.store(out + at + D // 2, ((grad_2 - second * mean) * inverse).to(out.dtype.element_ty), mask=here)
    return sum_1, sum_2, dots


@triton.jit
def backward(
    qkv, q_norm, k_norm, cos, sin, scorer, rstd, dq, dk, dv, d_scored, out, norms, dots,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, s_b, s_t, s_m,
    N, T, angle_stride, eps, H, G, M: tl.constexpr, SCALED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """out, like qkv, and norms (programs, 2, D) float32: the gradients of qkv, and parts of those of both norms.

    dq (B, H, T, D), dk and dv (B, G, T, D) and d_scored (B, T, M) of a layer of v, whose weight scorer is (M, G·D), by
    their strides. SCALED: out is multiplied by rstd (N,), and dots (N,) is the sum over a token's gradients times qkv.
    """
    n, b, t, d, angle, here = _tokens(T, N, angle_stride, D, BLOCK, HALF)
    cos_t = tl.load(cos + angle, mask=here, other=0.0).to(tl.float32)
    sin_t = tl.load(sin + angle, mask=here, other=0.0).to(tl.float32)
    at = n * (H + 2 * G) * D + d
    norms += tl.program_id(0).to(tl.int64) * 2 * D
    places, there = tl.arange(0, HALF), tl.arange(0, HALF) < D // 2
    sum_1 = tl.zeros([BLOCK, HALF], tl.float32)
    sum_2 = tl.zeros([BLOCK, HALF], tl.float32)
    dot = tl.zeros([BLOCK, 1], tl.float32)
    by = dot + 1.0
    if SCALED:
        by = tl.load(rstd + n, mask=n < N, other=0.0)
    for h in tl.range(H, num_stages=3):
        sum_1, sum_2, dot = _back(
            qkv, dq, b * q_b + h * q_h + t * q_t + d, out, at + h * D, q_norm, cos_t, sin_t, by, sum_1, sum_2, dot,
            here, d, eps, D,
        )  # fmt: skip
    tl.store(norms + places, tl.sum(sum_1, 0), mask=there)
    tl.store(norms + D // 2 + places, tl.sum(sum_2, 0), mask=there)
    sum_1 = tl.zeros([BLOCK, HALF], tl.float32)
    sum_2 = tl.zeros([BLOCK, HALF], tl.float32)
    for h in tl.range(G, num_stages=3):
        sum_1, sum_2, dot = _back(
            qkv, dk, b * k_b + h * k_h + t * k_t + d, out, at + (H + h) * D, k_norm, cos_t, sin_t, by, sum_1, sum_2,
            dot, here, d, eps, D,
        )  # fmt: skip
        value_1, value_2 = _halves(dv, b * v_b + h * v_h + t * v_t + d, here, D)
        for m in range(M):
            grad = tl.load(d_scored + b * s_b + t * s_t + m * s_m, mask=n < N, other=0.0).to(tl.float32)  # (BLOCK, 1)
            weight_1, weight_2 = _halves(scorer, (m * G + h) * D + d, d < D // 2, D)
            value_1, value_2 = value_1 + grad * weight_1, value_2 + grad * weight_2
        value_at = at + (H + G + h) * D
        if SCALED:
            v_1, v_2 = _halves(qkv, value_at, here, D)
            dot += (tl.sum(value_1 * v_1, 1) + tl.sum(value_2 * v_2, 1))[:, None]
        tl.store(out + value_at, (value_1 * by).to(out.dtype.element_ty), mask=here)
        tl.store(out + value_at + D // 2, (value_2 * by).to(out.dtype.element_ty), mask=here)
    tl.store(norms + D + places, tl.sum(sum_1, 0), mask=there)
    tl.store(norms + D + D // 2 + places, tl.sum(sum_2, 0), mask=there)
    if SCALED:
        tl.store(dots + n, dot, mask=n < N)
