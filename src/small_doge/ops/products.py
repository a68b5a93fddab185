"""Matrix products of QuACK (https://github.com/Dao-AILab/quack, an extra of this package) that end, on Hopper, in what
would be read and written once more around them: RMSNorm (what of it is one number a row), silu(gate) · up, the residual
stream, and all their gradients.

While one tile is ended another is multiplied, so that takes hardly any time. Who puts them together: :mod:`.residual`.
"""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .gpu import dtype_of_products, kernels, usable

try:
    QUACK = version("quack-kernels")
except PackageNotFoundError:
    QUACK = ""
HAS_QUACK = QUACK.startswith("0.6.")  # whose products were measured and tested

# Tiles (rows, columns) and how many programs, of rows or of columns, share what they copy, of what was tried on an H200
# (docs/decisions.md). Two groups of four warps take turns, one at its products and the other at what follows them;
# larger tiles leave too few registers for the longer ends.
_WIDE, _SQUARE = (192, 128, 1, 2), (128, 128, 2, 1)
_TILES = {"plain": _WIDE, "scaled": _WIDE, "gated": _WIDE}
_TILES |= {"gated_backward": _SQUARE, "added": _SQUARE, "carried": _SQUARE}
_FASTER_FROM = 1024  # rows and columns of a weight with which a plain product is faster; fewer were not measured


def can_multiply(x: torch.Tensor, *sizes: int) -> bool:
    """Whether these products take an x (…, C) of its device and dtype (autocast's if that is on), and such sizes."""
    if not (HAS_QUACK and usable(x) and dtype_of_products(x) in (torch.bfloat16, torch.float16)):
        return False
    return _is_hopper(x.device) and all(size % 8 == 0 for size in sizes)  # it copies from multiples of 16 bytes on


def has_products(device: torch.device) -> bool:
    """Whether these products run on the device."""
    return HAS_QUACK and device.type == "cuda" and _is_hopper(device)


def lacks_quack(device: torch.device) -> bool:
    """Whether training on the device would be faster with QuACK installed."""
    return device.type == "cuda" and _is_hopper(device) and not HAS_QUACK


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _quack(name: str) -> Any:
    """A product of QuACK's with its tiles, imported when the first is called, as that takes seconds."""
    from quack.gemm_config import GemmConfig

    sizes = dict(zip(("tile_m", "tile_n", "cluster_m", "cluster_n"), _TILES[name], strict=True))
    config = GemmConfig(**sizes, pingpong=True, device_capacity=9)
    # A counter hands tiles out: mostly faster, never by much slower (docs/decisions.md).
    options = {"config": config, "tuned": False, "dynamic_scheduler": True}
    return functools.partial(getattr(kernels("quack_epilogues"), name), **options)


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, a (N, K), b (K, M), by whichever product is faster."""
    return product(a, b) if min(b.shape) >= _FASTER_FROM and can_multiply(a, *b.shape) else a @ b


@torch.library.custom_op("small_doge::product", mutates_args=(), device_types="cuda")
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, a (N, K), b (K, M)."""
    return _quack("plain")(a.contiguous(), b)["D"]


@torch.library.custom_op("small_doge::scaled_product", mutates_args=(), device_types="cuda")
def scaled_product(x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rstd · x weightᵀ: x (N, C), rstd (N,) float32 of its rows, weight (M, C) → (N, M)."""
    return _quack("scaled")(x.contiguous(), weight.contiguous().T, rstd=rstd.contiguous())["D"]


@torch.library.custom_op("small_doge::gated_product", mutates_args=(), device_types="cuda")
def gated_product(x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, C), rstd (N,) float32, weight (2 I, C) → rstd · x weightᵀ, gates and ups in turn (N, 2 I), and
    silu(gate) · up (N, I)."""
    out = _quack("gated")(x.contiguous(), weight.contiguous().T, rstd=rstd.contiguous())
    return out["D"], out["hidden"]


@torch.library.custom_op("small_doge::gated_product_backward", mutates_args=(), device_types="cuda")
def gated_product_backward(
    grad: torch.Tensor, down: torch.Tensor, gate_up: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad (N, C), down (C, I), gate_up (N, 2 I), rstd (N,) → rstd · the gradient of gate_up, and the products of
    that gradient (without rstd) and gate_up, summed over tiles of columns, (N, tiles) float32."""
    dots = _sums_of_rows("gated_backward", grad, down.shape[1])
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    out = _quack("gated_backward")(grad, down.contiguous(), gate_up, rstd=rstd.contiguous(), dots=dots)
    return out["D"], dots


@torch.library.custom_op("small_doge::added_product", mutates_args=(), device_types="cuda")
def added_product(
    high: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale · (high + low) + x weightᵀ, all of it bfloat16 but scale (C,), which is float32: high and low (N, C),
    x (N, I), weight (C, I) → that to the nearest, and what is left of it, (N, C); and its squares in float32, summed
    over tiles of columns, (N, tiles)."""
    squares = _sums_of_rows("added", high, high.shape[1])
    x, weight, high, low, scale = (a.contiguous() for a in (x, weight, high, low, scale))
    out = _quack("added")(x, weight.T, high, rest=low, scale=scale, squares=squares)
    return out["D"], out["low"], squares


@torch.library.custom_op("small_doge::carried_product", mutates_args=(), device_types="cuda")
def carried_product(
    a: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    scale: torch.Tensor,
    y: torch.Tensor,
    correction: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """a weight + scale · grad + correction · y, and grad · y, summed over tiles of rows, (tiles, C) float32.

    All is bfloat16 and rounded up or down, as in triton_residual.py, in the same bits for the same inputs.

    Args:
        a: (N, K).
        weight: (K, C).
        grad, y: (N, C).
        scale: (C,) and correction (N,) in float32.
    """
    sums = _sums_of_columns("carried", y)
    a, weight, grad, y, scale, correction = (x.contiguous() for x in (a, weight, grad, y, scale, correction))
    out = _quack("carried")(a, weight, grad, y=y, scale=scale, correction=correction, d_scale=sums)
    return out["D"], sums


def _sums_of_rows(name: str, x: torch.Tensor, columns: int) -> torch.Tensor:
    """Uninitialised, of every row of x (N, …) a number for each tile of so many columns."""
    return x.new_empty(x.shape[0], -(-columns // _TILES[name][1]), dtype=torch.float32)


def _sums_of_columns(name: str, x: torch.Tensor) -> torch.Tensor:
    """Uninitialised, of every column of x (N, C) a number for each tile of rows."""
    return x.new_empty(-(-x.shape[0] // _TILES[name][0]), x.shape[1], dtype=torch.float32)


@product.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1])


@scaled_product.register_fake
def _(x, rstd, weight):
    return x.new_empty(x.shape[0], weight.shape[0])


@gated_product.register_fake
def _(x, rstd, weight):
    gate_up = x.new_empty(x.shape[0], weight.shape[0])
    return gate_up, x.new_empty(x.shape[0], weight.shape[0] // 2)


@gated_product_backward.register_fake
def _(grad, down, gate_up, rstd):
    dots = _sums_of_rows("gated_backward", grad, down.shape[1])
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format), dots


@added_product.register_fake
def _(high, low, scale, x, weight):
    z = torch.empty_like(high, memory_format=torch.contiguous_format)
    return z, torch.empty_like(z), _sums_of_rows("added", high, high.shape[1])


@carried_product.register_fake
def _(a, weight, grad, scale, y, correction):
    return torch.empty_like(grad, memory_format=torch.contiguous_format), _sums_of_columns("carried", y)
