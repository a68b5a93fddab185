"""A residual stream on its way from one part of a layer to the next: added to, normed, scaled.

A part of a layer makes z = scale · y + F(RMSNorm(y)) of the stream y. Either a norm stands between them, and one kernel
does its backward pass (:func:`norm_and_carry`), or products do all of it: RMSNorm(y) W = 1 / rms(y) · y (weight · W),
so a product can take y as the one before has left it (:class:`Stream`) and be scaled by one number a row at its end,
and the product that gives F's gradient can add to it what norm and scale · y contribute (:func:`gradient_of_stream`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .gpu import dtype_of_products, kernels, power_of_2, usable
from .products import added_product, carried_product, multiply


def can_norm_and_carry(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether :func:`norm_and_carry` has a kernel for x (..., C) and weights of its dtype, and a use for it."""
    dtypes = {x.dtype, *(weight.dtype for weight in weights)}
    known = len(dtypes) == 1 and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and x.shape[-1] <= 4096 and torch.is_grad_enabled() and usable(x)


def norm_and_carry(
    x: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of y = x + update, RMSNorm(y) · weight (arXiv:1910.07467) and what the stream carries on, scale · y.

    The forward pass is left to torch.compile. Backward, one kernel reads y and both gradients once and writes the
    gradient of y, and those of weight and scale. The stream's gradient is in the dtype of the norm's output: under
    autocast half as wide as the stream, with casts around it of which torch.compile leaves none inside a model.

    Args:
        x: (..., C).
        update: (..., C) in any floating dtype, or None for zero.
        weight, scale: (C,) in the dtype of x.

    Returns:
        RMSNorm in the dtype of autocast where that is on, else in that of x, and the stream in that of x.
    """
    return _NormAndCarry.apply(x, update, weight, scale, eps, dtype_of_products(x))


def add_update(x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """x + update in the dtype of x, with the gradient in that of update, which :func:`norm_and_carry` gives it in.

    Where two layers meet, torch.compile then has nothing to cast, and nothing to copy.
    """
    return x + update if x.dtype == update.dtype else _AddUpdate.apply(x, update)


class Stream(NamedTuple):
    """A stream y (…, C) between products, in two numbers of 16 bits: high is what they multiply, and high + low is y
    to 16 bits of mantissa. The gradient of y is that of high, of as many bits as it; the others have none."""

    high: torch.Tensor
    """(…, C), 16 bits: y to the nearest."""
    low: torch.Tensor
    """(…, C), 16 bits: y − high."""
    rstd: torch.Tensor
    """(…), float32: 1 / √(mean(y²) + ε)."""

    @classmethod
    def of(cls, y: torch.Tensor, eps: float) -> Stream:
        """Of y in float32, in the dtype of autocast."""
        high, y = y.to(dtype_of_products(y)), y.detach()
        low = (y - high.detach()).to(high.dtype)
        return cls(high, low, (y.square().mean(-1) + eps).rsqrt())

    @classmethod
    def added(cls, parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor], eps: float) -> Stream:
        """What a product has added up: high, low, and squares summed over tiles, (N, tiles)."""
        high, low, squares = parts
        rstd = (squares.sum(-1) / high.shape[-1] + eps).rsqrt()
        return cls(high, low, rstd.view(high.shape[:-1]))

    def whole(self) -> torch.Tensor:
        """y in float32."""
        return self.high.float() + self.low.float()


def add_product(stream: Stream, scale: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Stream:
    """z = scale · y + x weightᵀ, for a stream y whose gradient and that of scale are another's to give: this one
    gives that of z to :func:`gradient_of_stream`.

    The product of products.py (which says where it runs) adds in float32.

    Args:
        scale: (C,) float32.
        x: (…, I) of 16 bits.
        weight: (C, I), of any dtype.
        eps: of the norm of z that comes next.
    """
    return Stream.added(_AddProduct.apply(stream.high, stream.low, scale, x, weight.to(x.dtype)), eps)


def gradient_of_stream(
    grad: torch.Tensor,
    weight: torch.Tensor,
    carried: torch.Tensor,
    scale: torch.Tensor,
    y: torch.Tensor,
    rstd: torch.Tensor,
    dots: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of y, in its dtype, and of scale (C,) in float32, where z = scale · y + F(u), u = rstd · y weightᵀ.

    With g the gradient of u and dz that of z it is rstd · g weight + scale · dz − rstd² / C · (Σ_k g_k u_k) · y: the
    last is what y does to rstd.

    Args:
        grad: rstd · g, (N, K) of 16 bits.
        weight: (K, C), with that of the norm in it.
        carried: gradient of z, (…, C) of 16 bits.
        y, rstd: (…, C) of 16 bits and (…), of a :class:`Stream`.
        dots: (N,), of each row Σ_k g_k u_k.
    """
    correction = rstd.flatten().square() * dots / -y.shape[-1]
    dy, sums = carried_product(grad, weight, carried.flatten(0, -2), scale, y.flatten(0, -2), correction)
    return dy.view_as(y), sums.sum(0)


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, high: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight)
        rows = (a.flatten(0, -2) for a in (high, low))
        z, rest, squares = added_product(*rows, scale, x.flatten(0, -2), weight)
        rest = rest.view_as(low)
        ctx.mark_non_differentiable(rest, squares)
        return z.view_as(high), rest, squares

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, needs = grads[0], ctx.needs_input_grad
        d_weight = grad.flatten(0, -2).T @ x.flatten(0, -2) if needs[4] else None
        dx = multiply(grad.flatten(0, -2), weight).view_as(x) if needs[3] else None
        return grad, None, None, dx, d_weight


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        ctx.dtypes = x.dtype, update.dtype
        total = x + update
        return total if total.dtype == x.dtype else total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype, update_dtype = ctx.dtypes
        grad = grads[0].to(update_dtype)
        return grad.to(dtype), grad


class _NormAndCarry(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        update: torch.Tensor | None,
        weight: torch.Tensor,
        scale: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y = x if update is None else (x + update).to(x.dtype)
        ctx.save_for_backward(y, weight, scale)
        ctx.eps, ctx.dtypes = eps, (x.dtype, None if update is None else update.dtype)
        normed = F.rms_norm(y, weight.shape, weight, eps)
        # `to` the same dtype is the same tensor, whose gradient torch.compile of PyTorch 2.11 then leaves out
        return normed if normed.dtype == dtype else normed.to(dtype), scale * y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_normed, d_carried), (y, weight, scale) = grads, ctx.saved_tensors
        dy, sums = _backward(d_normed, d_carried.to(d_normed.dtype), y, weight, scale, ctx.eps)
        d_x, d_update = (None if dtype is None else dy.to(dtype) for dtype in ctx.dtypes)
        d_weight, d_scale = sums.to(weight.dtype)
        return d_x, d_update, d_weight, d_scale, None, None


@torch.library.custom_op("small_doge::norm_and_carry_backward", mutates_args=())
def _backward(
    d_normed: torch.Tensor,
    d_carried: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of y in the dtype of both given, and in float32 those of weight and scale (2, C).

    In the same bits for the same inputs on the same kind of GPU: each of n programs has every n-th row.
    """
    d_normed, d_carried, y = d_normed.contiguous(), d_carried.contiguous(), y.contiguous()
    C = y.shape[-1]
    N, width = y.numel() // C, power_of_2(C)
    dy = torch.empty_like(d_normed)
    programs = max(1, min(N, _multiprocessors(y.device) * min(16, max(4, 4096 // width))))
    sums = torch.empty(programs, 2, C, dtype=torch.float32, device=y.device)
    kernels("triton_residual").backward[(programs,)](
        d_normed, d_carried, y, weight.contiguous(), scale.contiguous(), dy, sums,
        N, eps, C=C, WIDTH=width, num_warps=max(1, width // 1024),
    )  # fmt: skip
    return dy, sums.sum(0)


@_backward.register_fake
def _(d_normed, d_carried, y, weight, scale, eps):
    dy = torch.empty_like(d_normed, memory_format=torch.contiguous_format)
    return dy, y.new_empty(2, y.shape[-1], dtype=torch.float32)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
