"""SwiGLU: silu(gate) · up, of gates and ups that one matrix product put side by side, or whole with its products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .gpu import dtype_of_products, kernels, usable
from .products import added_product, gated_product, gated_product_backward, multiply
from .residual import Narrow, gradient_of_stream, rstd_of

_BLOCK = 1024


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """(..., 2 I), gates before ups, → (..., I): silu(gate) · up (arXiv:2002.05202).

    On an NVIDIA GPU its backward pass reads and writes everything once. Left to torch.compile, which joins the two
    gradients in a kernel that reads its inputs for each, a training step takes 2 % longer.
    """
    if _fused(gate_up):
        return _forward(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_linear(gate_up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """:func:`swiglu` and a linear layer: (..., 2 I), weight (C, I) of any dtype → (..., C) in the dtype of gate_up.

    On an NVIDIA GPU nothing but gate_up waits for the backward pass, a third less of what a SwiGLU keeps: its product
    is computed again by the kernel that reads gate and up anyway, in the place of its gradient.
    """
    weight = weight.to(gate_up.dtype)
    if _fused(gate_up):
        return _SwigluLinear.apply(gate_up, weight)
    return F.linear(swiglu(gate_up), weight)


def _fused(gate_up: torch.Tensor) -> bool:
    return usable(gate_up) and gate_up.dtype in (torch.bfloat16, torch.float16, torch.float32)


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up, weight)
        return _forward(gate_up) @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_up, weight = ctx.saved_tensors
        hidden = grads[0] @ weight  # its gradient, until the kernel puts it there
        gate_up_grad = _backward_in_place(gate_up, hidden)
        if not ctx.needs_input_grad[1]:
            return gate_up_grad, None
        return gate_up_grad, grads[0].flatten(0, -2).T @ hidden.flatten(0, -2)


def swiglu_mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """down (silu(gate x) · up x), by the products of products.py (which says where they run), in the dtype of x or,
    where it is on, of autocast.

    silu(gate x) · up x is computed from gates and ups in float32, and waits for the backward pass with them.

    Args:
        x: (…, C), 16 bits with autocast or without.
        gate, up: (I, C).
        down: (C, I).

    Returns:
        (…, C).
    """
    dtype = dtype_of_products(x)
    return _SwigluMLP.apply(x.to(dtype), _in_turn(gate, up).to(dtype), down.to(dtype))


def swiglu_into_stream(
    y: torch.Tensor,
    narrow: Narrow,
    norm: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, Narrow]:
    """scale · y + :func:`swiglu_mlp` of RMSNorm(y) · norm, whose products do all of it; see residual.py.

    Args:
        y: (…, C) float32, and ``narrow`` what products take for its norm.
        norm, scale: (C,), of the norm and of the stream.
        eps: of the norm that comes next.

    Returns:
        The stream (…, C) float32, and what products take for its norm.
    """
    weight = _in_turn(gate, up) * norm
    z, after, squares = _SwigluIntoStream.apply(y, *narrow, weight.to(narrow.y.dtype), down.to(narrow.y.dtype), scale)
    return z, Narrow(after, rstd_of(squares, z, eps))


def _in_turn(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """(2 I, C): a tile of a product then has gates and ups of the same units."""
    return torch.stack((gate, up), 1).flatten(0, 1)


class _SwigluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        ones = rows.new_ones(rows.shape[0], dtype=torch.float32)
        gate_up, hidden = gated_product(rows, ones, weight)
        ctx.save_for_backward(x, weight, down, gate_up, hidden, ones)
        return (hidden @ down.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, down, gate_up, hidden, ones = ctx.saved_tensors
        grad, needs = grads[0].to(x.dtype).flatten(0, -2), ctx.needs_input_grad
        d_gate_up, _ = gated_product_backward(grad, down, gate_up, ones)
        dx = multiply(d_gate_up, weight).view_as(x) if needs[0] else None
        d_weight = d_gate_up.T @ x.flatten(0, -2) if needs[1] else None
        return dx, d_weight, grad.T @ hidden if needs[2] else None


class _SwigluIntoStream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        narrow: torch.Tensor,
        rstd: torch.Tensor,
        weight: torch.Tensor,
        down: torch.Tensor,
        scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate_up, hidden = gated_product(narrow.flatten(0, -2), rstd.flatten(), weight)
        z, after, squares = added_product(y.flatten(0, -2), scale, hidden, down)
        after = after.view_as(narrow)
        ctx.save_for_backward(narrow, rstd, weight, down, scale, gate_up, hidden)
        ctx.mark_non_differentiable(after, squares)
        return z.view_as(y), after, squares

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *narrow, weight, down, scale, gate_up, hidden = ctx.saved_tensors
        stream, needs = Narrow(*narrow), ctx.needs_input_grad
        grad = grads[0].to(stream.y.dtype).flatten(0, -2)
        d_gate_up, dots = gated_product_backward(grad, down, gate_up, stream.rstd.flatten())
        dy, d_scale = gradient_of_stream(d_gate_up, weight, grad, scale, stream, dots.sum(-1))
        d_weight = d_gate_up.T @ stream.y.flatten(0, -2) if needs[3] else None
        return dy.to(grads[0].dtype), None, None, d_weight, grad.T @ hidden if needs[4] else None, d_scale


@torch.library.custom_op("small_doge::swiglu", mutates_args=())
def _forward(gate_up: torch.Tensor) -> torch.Tensor:
    gate_up = gate_up.contiguous()
    out = _half(gate_up)
    run: Any = kernels("triton_swiglu")
    run.forward[(-(-out.numel() // _BLOCK),)](gate_up, out, out.numel(), WIDTH=out.shape[-1], BLOCK=_BLOCK)
    return out


@torch.library.custom_op("small_doge::swiglu_backward", mutates_args=())
def _backward(gate_up: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return _gradient(gate_up, grad.contiguous(), again=False)


@torch.library.custom_op("small_doge::swiglu_backward_in_place", mutates_args=("grad",))
def _backward_in_place(gate_up: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of gate_up; ``grad``, contiguous, becomes silu(gate) · up."""
    return _gradient(gate_up, grad, again=True)


def _gradient(gate_up: torch.Tensor, grad: torch.Tensor, again: bool) -> torch.Tensor:
    gate_up = gate_up.contiguous()
    out, total = torch.empty_like(gate_up), grad.numel()
    run: Any = kernels("triton_swiglu")
    options = {"WIDTH": grad.shape[-1], "BLOCK": _BLOCK, "AGAIN": again}
    run.backward[(-(-total // _BLOCK),)](gate_up, grad, out, total, **options)
    return out


def _half(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


_forward.register_fake(_half)
for _operator in (_backward, _backward_in_place):
    _operator.register_fake(lambda gate_up, grad: torch.empty_like(gate_up, memory_format=torch.contiguous_format))
_forward.register_autograd(
    lambda ctx, grad: _backward(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)
