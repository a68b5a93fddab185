"""Several linear layers of the same input as one matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_ENOUGH = 1 << 20  # elements of the input


def project(x: torch.Tensor, *layers: nn.Linear) -> list[torch.Tensor]:
    """What each layer makes of x (..., C): tensors (..., out_features), views of one tensor if it was one product."""
    together = project_together(x, *layers)
    if together is None:
        return [layer(x) for layer in layers]
    return list(together.split([layer.out_features for layer in layers], dim=-1))


def project_together(x: torch.Tensor, *layers: nn.Linear) -> torch.Tensor | None:
    """What all layers make of x (..., C), side by side (..., Σ out_features); None where they are better called alone.

    On a GPU one wide product keeps the chip busier than several narrow ones, and its backward pass gives the gradient
    of x at once instead of as a sum. Weights are joined on every call, so this is for many rows; parameters keep the
    names and shapes that checkpoints have. Anything that has taken a layer's place (an adapter, a quantised or sharded
    weight) or listens to it (a hook) is called as it is.
    """
    return F.linear(x, *joined(*layers)) if better_together(x, *layers) else None


def better_together(x: torch.Tensor, *layers: nn.Linear) -> bool:
    """Whether one product is faster, and the weights of the layers are all there is to them."""
    return x.is_cuda and x.numel() >= _ENOUGH and all(plain(layer) for layer in layers)


def joined(*layers: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases of several layers, one below the other."""
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return torch.cat([layer.weight for layer in layers]), bias


def plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether its weight can be used in its place: nothing stands for the layer or its weight, or listens to it."""
    return type(layer) is kind and not listened_to(layer) and type(layer.weight) in (nn.Parameter, torch.Tensor)


def listened_to(layer: nn.Module) -> bool:
    """Whether a hook wants to know what goes into the layer or comes out of it."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
