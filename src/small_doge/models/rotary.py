"""Rotary position embedding (RoFormer, arXiv:2104.09864) from transformers' parameters, without any state.

transformers keeps the frequencies in a buffer that a long text changes for the texts after it; here they are a
function of the configuration and the positions alone.
"""

from __future__ import annotations

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_doge import DogeConfig


def grows_with_length(config: DogeConfig) -> bool:
    """Whether a key's angle depends on how long the text has become, so that keys must be cached unrotated."""
    return config.rope_parameters["rope_type"] in ("dynamic", "longrope")


def text_length(config: DogeConfig, position_ids: torch.Tensor) -> int | None:
    """How long the text is whose angles to use: the largest position + 1; None where angles do not depend on it.

    Args:
        position_ids: (B, T) integers.
    """
    return int(position_ids.max()) + 1 if grows_with_length(config) else None


def rotary_angles(
    config: DogeConfig, position_ids: torch.Tensor, dtype: torch.dtype, length: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position · frequency: positions (B, T) → two tensors (B, 1, T, D/2) in ``dtype``.

    Positions (B, M, T) that differ between heads → (B, M, T, D/2). ``length`` is that of :func:`text_length`: with
    scaling of type ``dynamic`` or ``longrope`` the frequencies are those of a text of that length.
    """
    device, rope_type, scaling = position_ids.device, config.rope_parameters["rope_type"], 1.0
    if rope_type == "default":
        D = config.heads[-1]
        exponents = torch.arange(0, D, 2, device=device, dtype=torch.float32) / D
        inverse_frequencies = config.rope_parameters["rope_theta"] ** -exponents
    else:
        inverse_frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, device, seq_len=length)
    if position_ids.dim() == 2:
        position_ids = position_ids[:, None]
    angles = position_ids[..., None].float() * inverse_frequencies.float()  # (B, 1 or M, T, D/2)
    cos, sin = _cos_and_sin(angles) if torch.compiler.is_compiling() else (angles.cos(), angles.sin())
    return (cos * scaling).to(dtype), (sin * scaling).to(dtype)


# Left to itself, torch.compile computes them anew in every kernel of every layer that reads them, forward and backward:
# a tenth of a training step at 20M. What an operator of its own gives back is kept.
@torch.library.custom_op("small_doge::cos_and_sin", mutates_args=())
def _cos_and_sin(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return angles.cos(), angles.sin()


@_cos_and_sin.register_fake
def _(angles):
    return torch.empty_like(angles), torch.empty_like(angles)


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the pairs (x_d, x_{d+D/2}) of x (B, heads, T, D) by the two tensors of :func:`rotary_angles`."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotate_to(config: DogeConfig, length: int | None, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, M, T, D) to ``positions`` (B, M, T) in a text of ``length``."""
    return rotate(x, rotary_angles(config, positions, x.dtype, length))
