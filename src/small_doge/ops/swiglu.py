"""SwiGLU: silu(gate) · up, of gates and ups that one matrix product put side by side, or whole with its products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .gpu import dtype_of_products, kernels, usable
from .products import added_product, gated_product, gated_product_backward, multiply
from .residual import Stream, gradient_of_stream

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
    stream: Stream,
    norm: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    eps: float,
) -> Stream:
    """scale · y + :func:`swiglu_mlp` of RMSNorm(y) · norm, of a stream y, whose products do all of it; see residual.py.

    Args:
        norm, scale: (C,), of the norm and of the stream.
        eps: of the norm that comes next.
    """
    weights = (weight.to(stream.high.dtype) for weight in (_in_turn(gate, up) * norm, down))
    return Stream.added(_SwigluIntoStream.apply(*stream, *weights, scale), eps)


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
        high: torch.Tensor,
        low: torch.Tensor,
        rstd: torch.Tensor,
        weight: torch.Tensor,
        down: torch.Tensor,
        scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = high.flatten(0, -2)
        gate_up, hidden = gated_product(rows, rstd.flatten(), weight)
        z, rest, squares = added_product(rows, low.flatten(0, -2), scale, hidden, down)
        rest = rest.view_as(low)
        ctx.save_for_backward(high, rstd, weight, down, scale, gate_up, hidden)
        ctx.mark_non_differentiable(rest, squares)
        return z.view_as(high), rest, squares

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, rstd, weight, down, scale, gate_up, hidden = ctx.saved_tensors
        grad, needs = grads[0].flatten(0, -2), ctx.needs_input_grad
        d_gate_up, dots = gated_product_backward(grad, down, gate_up, rstd.flatten())
        dy, d_scale = gradient_of_stream(d_gate_up, weight, grad, scale, y, rstd, dots.sum(-1))
        d_weight = d_gate_up.T @ y.flatten(0, -2) if needs[3] else None
        return dy, None, None, d_weight, grad.T @ hidden if needs[4] else None, d_scale


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
