"""Which keys a query may see: causality, padding and document boundaries, before any score is looked at."""

from __future__ import annotations

import torch


def visible_keys(
    inputs: torch.Tensor,
    past: int,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> torch.Tensor | None:
    """(B, 1, T, past + T) bool for embeddings (B, T, C) after ``past`` cached keys; None where plain causal says it.

    A query that is itself padding sees itself alone, so that its softmax is defined.

    Args:
        attention_mask: (B, past + T), 0 for padding; or None.
        position_ids: (B, T); where they do not go up by one, another document begins. Documents are told apart only
            without a cache. None means one document.

    Raises:
        ValueError: if ``attention_mask`` has another shape.
    """
    B, T = inputs.shape[:2]
    Tk, device = past + T, inputs.device
    if attention_mask is not None and attention_mask.shape != (B, Tk):
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected (B={B}, Tk={Tk})")
    # Looking at values costs a synchronisation on a GPU and cannot be traced; there the mask is always built.
    tracing = torch.compiler.is_compiling()
    if attention_mask is not None and not tracing and bool(attention_mask.all()):
        attention_mask = None
    documents = None
    if position_ids is not None and past == 0 and T > 1:
        restarts = position_ids.diff(dim=-1) != 1  # (B, T − 1)
        if tracing or bool(restarts.any()):
            documents = torch.nn.functional.pad(restarts, (1, 0)).cumsum(-1)  # (B, T), counts up
    if attention_mask is None and documents is None:
        return None
    causal = torch.ones(T, Tk, dtype=torch.bool, device=device).tril(past)
    visible = causal[None]
    if attention_mask is not None:
        itself = torch.ones(T, Tk, dtype=torch.bool, device=device).triu(past) & causal
        visible = visible & (attention_mask[:, None, :].bool() | itself)
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    return visible[:, None]
