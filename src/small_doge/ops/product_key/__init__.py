"""Experts found by product keys: which of K² each token takes, what they compute, and how evenly they are used.

Shapes, here and in every path: N tokens of size C, E = K² experts of one hidden unit each, k experts a token.
"""

from __future__ import annotations

import os

import torch

from .balance import balance
from .experts import gathered, grouped
from .fused import fused_experts, usable
from .reference import reference
from .retrieval import retrieve, route

__all__ = [
    "FORCE",
    "PATHS",
    "balance",
    "choose_path",
    "experts",
    "fused_experts",
    "gathered",
    "grouped",
    "reference",
    "retrieve",
    "route",
]

PATHS = ("fused", "grouped", "gathered")
FORCE = "DOGE_EXPERTS"  # environment variable that forces a path
FEW_TOKENS = 2  # up to so many, taking all their rows costs less than what `grouped` sets up


def experts(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of what each token's experts compute.

    out_n = Σ_e weights[n, e] · silu(x_n · down[indices[n, e]]) · up[indices[n, e]].

    Under autocast x, down and up are cast to its dtype; 16 bit floats are summed in float32.

    Args:
        x: (N, C).
        down, up: (E, C).
        indices: (N, k) int64, 0 ≤ index < E; an expert may come more than once.
        weights: (N, k) floating point; float32 whatever the others are, to lose nothing.

    Returns:
        (N, C) in the dtype of x. Gradients reach x, down, up (dense) and weights.

    Raises:
        ValueError: if shapes or dtypes do not fit together, or the path that the environment variable ``DOGE_EXPERTS``
            names does not exist or cannot compute this call.
    """
    _check(x, down, up, indices, weights)
    x, down, up = _cast(x, down, up)
    gradients = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in (x, down, up, weights))
    path, _ = choose_path(x, gradients)
    compute = {"fused": fused_experts, "grouped": grouped, "gathered": gathered}[path]
    return compute(x, down, up, indices, weights)


def choose_path(x: torch.Tensor, gradients: bool) -> tuple[str, str]:
    """Which of ``PATHS`` :func:`experts` takes for x (N, C), and why; it looks at shapes, not at values.

    Args:
        x: as there, after the cast of autocast.
        gradients: whether any are needed.

    Raises:
        ValueError: if the environment variable ``DOGE_EXPERTS`` names no path, or one that cannot compute this call.
    """
    forced = os.environ.get(FORCE)
    if forced:
        if forced not in PATHS:
            raise ValueError(f"{FORCE} is {forced!r}, which cannot be: expected one of {', '.join(PATHS)}")
        if forced == "fused" and not usable(x):
            raise ValueError(
                f"{FORCE} is {forced!r}, which cannot be: `fused` needs Triton and an NVIDIA GPU of compute capability "
                f"8.0 or more, and takes 16 and 32 bit floats"
            )
        return forced, f"{FORCE} says so"
    if usable(x):
        return "fused", "an NVIDIA GPU with Triton"
    if x.shape[0] <= FEW_TOKENS and not gradients:
        return "gathered", f"few tokens: {x.shape[0]}"
    return "grouped", "gradients are needed" if gradients else f"many tokens: {x.shape[0]}"


def _cast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _check(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> None:
    fits = x.dim() == down.dim() == indices.dim() == 2 and down.shape[1] == x.shape[1] and up.shape == down.shape
    if not fits or indices.shape[0] != x.shape[0] or weights.shape != indices.shape:
        raise ValueError(
            f"x {tuple(x.shape)}, down {tuple(down.shape)}, up {tuple(up.shape)}, indices {tuple(indices.shape)} and "
            f"weights {tuple(weights.shape)} do not fit: expected (N, C), (E, C) twice, (N, k) twice"
        )
    if indices.dtype != torch.int64:
        raise ValueError(f"indices are {indices.dtype}, expected torch.int64")
