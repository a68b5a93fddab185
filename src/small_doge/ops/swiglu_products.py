"""A SwiGLU whole, on Hopper: silu(gate) · up and its gradient are computed where matrix products end.

The products are QuACK's (https://github.com/Dao-AILab/quack), an extra of this package. While one tile is ended another
is multiplied, so what a kernel for the SwiGLU alone would read and write takes hardly any time.
"""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .gpu import usable

try:
    QUACK = version("quack-kernels")
except PackageNotFoundError:
    QUACK = ""
HAS_QUACK = QUACK.startswith("0.6.")  # whose products were measured and tested


def lacks_quack(device: torch.device) -> bool:
    """Whether training on the device would be faster with QuACK installed."""
    return not HAS_QUACK and device.type == "cuda" and _is_hopper(device)


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def can_multiply(x: torch.Tensor, hidden_size: int, intermediate_size: int) -> bool:
    """Whether :func:`swiglu_mlp` has products for the device, the dtype (autocast's if that is on) and such sizes."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if not (HAS_QUACK and usable(x) and dtype in (torch.bfloat16, torch.float16)):
        return False
    aligned = hidden_size % 8 == 0 and intermediate_size % 8 == 0  # rows of 16 bytes, which Hopper's copies want
    return aligned and _is_hopper(x.device)


def swiglu_mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """down (silu(gate x) · up x) (arXiv:2002.05202), in the dtype of x or, where it is on, of autocast.

    silu(gate x) · up x is computed from gates and ups in float32. Only x, gates and ups wait for the backward pass.

    Args:
        x: (…, C), 16 bits with autocast or without.
        gate, up: (I, C).
        down: (C, I).

    Returns:
        (…, C).
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    gate_up = torch.stack((gate, up), 1).flatten(0, 1)  # a tile has gates and ups of the same units
    return _SwigluMLP.apply(x.to(dtype), gate_up.to(dtype), down.to(dtype))


class _SwigluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate_up, hidden = _forward(x.flatten(0, -2), weight)
        ctx.save_for_backward(x, weight, down, gate_up)
        return (hidden @ down.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, down, gate_up = ctx.saved_tensors
        grad, needs = grads[0].flatten(0, -2), ctx.needs_input_grad
        d_gate_up, hidden = _backward(grad, down, gate_up)
        dx = (d_gate_up @ weight).view_as(x) if needs[0] else None
        d_weight = d_gate_up.T @ x.flatten(0, -2) if needs[1] else None
        return dx, d_weight, grad.T @ hidden if needs[2] else None


# Tiles, and how many programs share a copied one, of what was tried on an H200 (benchmarks/swiglu.py): in each, two
# groups of four warps take turns, one at its products and the other at what follows them.
_FORWARD = {"tile_m": 192, "tile_n": 128, "cluster_m": 1, "cluster_n": 2, "pingpong": True}
_BACKWARD = {"tile_m": 128, "tile_n": 128, "cluster_m": 1, "cluster_n": 2, "pingpong": True}


@functools.cache
def _product(backward: bool) -> Any:
    """QuACK's product that gives silu(gate) · up beside gates and ups, or their gradients."""
    from quack.epilogue.library import dgated_mod, linear_act_mod
    from quack.gemm_config import GemmConfig

    if backward:
        product, tiles = dgated_mod("swiglu", has_scale=False, has_reduce=False), _BACKWARD
    else:
        product = linear_act_mod("swiglu", gated=True, has_c=False, has_rowvec=False, has_colvec=False)
        tiles = _FORWARD
    # Tiles are handed out by a counter: programs that share the GPU's memory do not stay in step.
    options = {"config": GemmConfig(**tiles, device_capacity=9), "tuned": False, "dynamic_scheduler": True}
    return functools.partial(product, **options)


@torch.library.custom_op("small_doge::gated_product", mutates_args=(), device_types="cuda")
def _forward(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, C), weight (2 I, C) → gates and ups in turn (N, 2 I), silu(gate) · up (N, I)."""
    out = _product(backward=False)(x.contiguous(), weight.contiguous().T)
    return out["D"], out["mAuxOut"]


@torch.library.custom_op("small_doge::gated_product_backward", mutates_args=(), device_types="cuda")
def _backward(grad: torch.Tensor, down: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """grad (N, C), down (C, I), gate_up (N, 2 I) → the gradient of gate_up, and silu(gate) · up (N, I) again."""
    out = _product(backward=True)(grad.contiguous(), down.contiguous(), gate_up)
    return out["D"], out["mAuxOut"]


@_forward.register_fake
def _(x, weight):
    gate_up = x.new_empty(x.shape[0], weight.shape[0])
    return gate_up, x.new_empty(x.shape[0], weight.shape[0] // 2)


@_backward.register_fake
def _(grad, down, gate_up):
    return torch.empty_like(gate_up), grad.new_empty(grad.shape[0], down.shape[1])
