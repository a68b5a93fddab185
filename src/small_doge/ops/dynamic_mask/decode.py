"""Dynamic Mask Attention of one new token over the keys that a bounded cache holds."""

from __future__ import annotations

import torch


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """out = softmax over the visible slots of (q · k_j / √D + s_j), times v_j; the slots stand in any order.

    Args:
        q: (B, H, 1, D), floating point.
        k: (B, M, N, D) and v: (B, M, N, D) in the dtype of q, N slots; H is a multiple of M.
        s: (B, M, N) scores, at least float32.
        visible: (B, M or 1, N) bool, False for slots that are out of W or padding, at least one of a row and head
            True; None: all are visible.

    Returns:
        (B, H, 1, D) in the dtype of q. The softmax is computed in at least float32.
    """
    B, H, _, D = q.shape
    M = k.shape[1]
    bias = s if visible is None else s.masked_fill(~visible, float("-inf"))
    compute = torch.promote_types(q.dtype, torch.float32)
    # The query heads of a group stand where queries usually do: nothing of k and v is repeated. Keys times queries, and
    # not the other way round, takes half the time on a CPU. Not PyTorch's fused attention: its bias has the dtype of
    # q, and in bfloat16 a score of 40 is then off by up to 0.125.
    products = k @ q.reshape(B, M, H // M, D).transpose(-1, -2)  # (B, M, N, H/M)
    logits = products.transpose(-1, -2).to(compute) / D**0.5 + bias[:, :, None].to(compute)
    return (logits.softmax(dim=-1).to(q.dtype) @ v).reshape(B, H, 1, D)
