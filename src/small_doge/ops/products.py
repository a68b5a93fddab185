"""Matrix products of QuACK (https://github.com/Dao-AILab/quack, an extra of this package) that end, on Hopper, in what
would be read and written once more after them: silu(gate) · up, its gradient, a sum with the residual stream.

While one tile is ended another is multiplied, so that takes hardly any time. Gradients are the business of what calls
these: :func:`.swiglu.swiglu_mlp`, :func:`.residual.add_product`, :func:`.heads.projected_heads`.
"""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .gpu import dtype_of_products, usable

try:
    QUACK = version("quack-kernels")
except PackageNotFoundError:
    QUACK = ""
HAS_QUACK = QUACK.startswith("0.6.")  # whose products were measured and tested

# Tiles, and how many programs share a copied one, of what was tried on an H200 (docs/decisions.md): in each, two groups
# of four warps take turns, one at its products and the other at what follows them.
_WIDE = {"tile_m": 192, "tile_n": 128, "cluster_m": 1, "cluster_n": 2, "pingpong": True}
_TILES = {"gated": _WIDE, "gated_backward": _WIDE | {"tile_m": 128}, "added": _WIDE, "plain": _WIDE}
_FASTER_FROM = 1024  # rows and columns of a weight with which a plain product is faster; fewer were not measured


def can_multiply(x: torch.Tensor, *sizes: int) -> bool:
    """Whether these products take an x (…, C) of its device and dtype (autocast's if that is on), and such sizes."""
    if not (HAS_QUACK and usable(x) and dtype_of_products(x) in (torch.bfloat16, torch.float16)):
        return False
    return _is_hopper(x.device) and all(size % 8 == 0 for size in sizes)  # it copies from multiples of 16 bytes on


def lacks_quack(device: torch.device) -> bool:
    """Whether training on the device would be faster with QuACK installed."""
    return not HAS_QUACK and device.type == "cuda" and _is_hopper(device)


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _quack(name: str) -> Any:
    """A product of QuACK's with its tiles, imported when the first is called, as that takes seconds."""
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.library import dgated_mod, linear_act_mod
    from quack.epilogue.ops import RowVecLoad
    from quack.gemm_config import GemmConfig

    if name == "gated":
        made = linear_act_mod("swiglu", gated=True, has_c=False, has_rowvec=False, has_colvec=False)
    elif name == "gated_backward":
        made = dgated_mod("swiglu", has_scale=False, has_reduce=False)
    elif name == "added":
        made = gemm_epilogue(ops={"scale": RowVecLoad("scale")})(_scaled_and_added)
    else:  # plain
        made = gemm_epilogue()(_as_it_is)
    # A counter hands tiles out: mostly faster, never by much slower (docs/decisions.md).
    options = {"config": GemmConfig(**_TILES[name], device_capacity=9), "tuned": False, "dynamic_scheduler": True}
    return functools.partial(made, **options)


def _scaled_and_added(acc, c, scale):
    return {"D": acc + c * scale}


def _as_it_is(acc):
    return {"D": acc}


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, a (N, K), b (K, M), by whichever product is faster."""
    return product(a, b) if min(b.shape) >= _FASTER_FROM and can_multiply(a, *b.shape) else a @ b


@torch.library.custom_op("small_doge::product", mutates_args=(), device_types="cuda")
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, a (N, K), b (K, M)."""
    return _quack("plain")(a.contiguous(), b)["D"]


@torch.library.custom_op("small_doge::gated_product", mutates_args=(), device_types="cuda")
def gated_product(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, C), weight (2 I, C) → gates and ups in turn (N, 2 I), silu(gate) · up (N, I)."""
    out = _quack("gated")(x.contiguous(), weight.contiguous().T)
    return out["D"], out["mAuxOut"]


@torch.library.custom_op("small_doge::gated_product_backward", mutates_args=(), device_types="cuda")
def gated_product_backward(
    grad: torch.Tensor, down: torch.Tensor, gate_up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad (N, C), down (C, I), gate_up (N, 2 I) → the gradient of gate_up, and silu(gate) · up (N, I) again."""
    out = _quack("gated_backward")(grad.contiguous(), down.contiguous(), gate_up)
    return out["D"], out["mAuxOut"]


@torch.library.custom_op("small_doge::added_product", mutates_args=(), device_types="cuda")
def added_product(y: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """scale · y + x weightᵀ, y (N, C) and scale (C,) in float32, x (N, I), weight (C, I)."""
    x, weight, y = x.contiguous(), weight.contiguous(), y.contiguous()
    return _quack("added")(x, weight.T, y, scale=scale.contiguous(), out_dtype=y.dtype)["D"]


@product.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1])


@gated_product.register_fake
def _(x, weight):
    gate_up = x.new_empty(x.shape[0], weight.shape[0])
    return gate_up, x.new_empty(x.shape[0], weight.shape[0] // 2)


@gated_product_backward.register_fake
def _(grad, down, gate_up):
    return torch.empty_like(gate_up), grad.new_empty(grad.shape[0], down.shape[1])


@added_product.register_fake
def _(y, scale, x, weight):
    return torch.empty_like(y, memory_format=torch.contiguous_format)
