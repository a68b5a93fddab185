"""Where Triton's kernels run, and in what."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None  # it is not there on every system


def usable(x: torch.Tensor) -> bool:
    """Whether kernels run on the device of ``x``: an NVIDIA GPU from Ampere on, with Triton installed."""
    if not (HAS_TRITON and x.is_cuda and torch.version.cuda):
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def dtype_of_products(x: torch.Tensor) -> torch.dtype:
    """In which x is multiplied: autocast's where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest that is below neither n nor ``least``, itself one: what the sides of Triton's tiles have to be."""
    return max(least, 1 << (n - 1).bit_length())


@functools.cache
def kernels(name: str) -> ModuleType:
    """A module of kernels below ``ops``, imported when the first of them is called: Triton takes a while."""
    return importlib.import_module(f".{name}", __package__)
