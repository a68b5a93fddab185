"""Dynamic Mask Attention written line for line from its formulas. Slow, and what every faster path is held to."""

from __future__ import annotations

import torch

from .window import ranks


def kept_keys(s: torch.Tensor, visible: torch.Tensor, window: int, local_window: int = 0) -> torch.Tensor:
    """Which keys each query keeps: scores (B, M, Tk), visible (B or 1, 1, Tq, Tk) bool → (B, M, Tq, Tk) bool.

    W(i) is the ``window`` visible keys with the largest ranks, together with the last ``local_window`` positions.
    """
    Tq, Tk = visible.shape[-2:]
    if Tk <= window:
        return visible.expand(-1, s.shape[1], -1, -1)
    candidates = torch.where(visible, ranks(s)[:, :, None, :], -1)  # (B, M, Tq, Tk)
    worst_kept = candidates.topk(window, dim=-1).values[..., -1:]  # −1 while fewer than w keys are visible
    kept = candidates >= worst_kept
    if local_window:
        i = torch.arange(Tk - Tq, Tk, device=s.device)[:, None]
        kept = kept | (i - torch.arange(Tk, device=s.device) < local_window)
    return kept & visible


def visible_keys(
    Tq: int,
    Tk: int,
    device: torch.device,
    key_mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B or 1, 1, Tq, Tk) bool: what the last Tq of Tk positions may see before any score is looked at.

    Causality, and of ``key_mask`` (B, Tk) and ``documents`` (B, Tk): no padding but oneself, no other document.
    """
    visible = torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq)[None]
    if key_mask is not None:
        itself = visible & torch.ones(Tq, Tk, dtype=torch.bool, device=device).triu(Tk - Tq)
        visible = visible & (key_mask[:, None, :] | itself)
    if documents is not None:
        visible = visible & (documents[:, Tk - Tq :, None] == documents[:, None, :])
    return visible[:, None]


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    window: int,
    *,
    mask: torch.Tensor | None = None,
    local_window: int = 0,
    rank_by: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`small_doge.ops.dynamic_mask.dynamic_mask_attention`.

    Returns:
        The output (B, H, Tq, D) in the dtype of q, and the weights (B, H, Tq, Tk) before dropout, at least float32.
    """
    (_, H, Tq, D), Tk = q.shape, k.shape[2]
    visible = visible_keys(Tq, Tk, q.device) if mask is None else mask
    kept = kept_keys(s if rank_by is None else rank_by, visible, window, local_window)
    kept = kept.repeat_interleave(H // s.shape[1], dim=1)  # (B, H, Tq, Tk)
    k, v, s = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v, s))
    compute = torch.promote_types(q.dtype, torch.float32)
    logits = (q @ k.transpose(-1, -2)).to(compute) / D**0.5 + s[:, :, None, :].to(compute)
    weights = logits.masked_fill(~kept, float("-inf")).softmax(dim=-1)
    dropped = torch.nn.functional.dropout(weights, dropout_p) if dropout_p else weights
    return dropped.to(q.dtype) @ v, weights
