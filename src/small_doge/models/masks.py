"""Which keys a query may see before any score is looked at, described in memory that grows with T, not with T²."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Visibility(NamedTuple):
    """Keyword arguments of ``ops.dynamic_mask.dynamic_mask_attention``; all None is plain causality.

    ``key_mask`` (B, Tk) bool, False for padding; ``documents`` (B, Tk) int64, which count up along a row; or in place
    of the two ``mask`` (B or 1, 1, T, Tk) bool, True where a query sees a key.
    """

    key_mask: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def visibility(
    inputs: torch.Tensor,
    past: int,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> Visibility:
    """What embeddings (B, T, C) after ``past`` cached keys may see, Tk = past + T.

    Args:
        attention_mask: (B, Tk), 0 for padding; or (B or 1, 1, T, Tk), which alone then says what is seen: bool, True
            where a query sees a key, or floating point, 0 there and −∞ (or the dtype's smallest number) elsewhere.
            Future keys stay unseen whatever it says, and a query that it leaves no key sees itself. None: no padding.
        position_ids: (B or 1, T); where they do not go up by one, another document begins. Documents are told apart
            only without a cache. None means one document.

    Raises:
        ValueError: if ``attention_mask`` has another shape, dtype or values.
    """
    B, T = inputs.shape[:2]
    Tk = past + T
    if attention_mask is not None and attention_mask.dim() == 4:
        return Visibility(mask=_causal_mask(attention_mask, B, T, Tk))
    if attention_mask is not None and attention_mask.shape != (B, Tk):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected (B={B}, Tk={Tk}) or "
            f"({B} or 1, 1, T={T}, Tk={Tk})"
        )
    # Looking at values costs a synchronisation on a GPU and cannot be traced. It pays once for a text, whose attention
    # is faster where nothing is hidden, but not for each token that is generated, nor in every step of training.
    looking = T > 1 and not torch.compiler.is_compiling() and not (inputs.is_cuda and inputs.requires_grad)
    key_mask = documents = None
    if attention_mask is not None and not (looking and bool(attention_mask.all())):
        key_mask = attention_mask.bool()
    if position_ids is not None and past == 0 and T > 1:
        restarts = position_ids.diff(dim=-1) != 1  # (B or 1, T − 1)
        if not looking or bool(restarts.any()):
            documents = F.pad(restarts, (1, 0)).cumsum(-1).expand(B, -1)
    return Visibility(key_mask, documents)


def _causal_mask(attention_mask: torch.Tensor, B: int, T: int, Tk: int) -> torch.Tensor:
    """(B or 1, 1, T, Tk) of :func:`visibility` → bool, without future keys and with a key for every query."""
    if attention_mask.shape[1:] != (1, T, Tk) or attention_mask.shape[0] not in (1, B):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected ({B} or 1, 1, T={T}, Tk={Tk})"
        )
    dtype = attention_mask.dtype
    if dtype != torch.bool and not dtype.is_floating_point:
        raise ValueError(f"a 4-D attention_mask is {dtype}, expected bool, or floating point with 0 and -inf")
    mask = attention_mask
    if dtype != torch.bool:
        mask = attention_mask == 0
        if not torch.compiler.is_compiling():
            other = ~mask & (attention_mask > torch.finfo(dtype).min) | attention_mask.isnan()
            if bool(other.any()):
                raise ValueError(
                    f"a 4-D attention_mask holds {attention_mask[other][0].item():g}, expected only 0 where a key is "
                    "seen and -inf elsewhere: biases are not supported"
                )
    causal = torch.ones(T, Tk, dtype=torch.bool, device=mask.device).tril(Tk - T)
    mask = mask & causal
    return mask | (causal.triu(Tk - T) & ~mask.any(-1, keepdim=True))  # a query without a key sees itself
