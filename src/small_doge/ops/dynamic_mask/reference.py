"""Dynamic Mask Attention written line for line from its formulas. Slow, and what every faster path is held to."""

from __future__ import annotations

import torch


def ranks(s: torch.Tensor) -> torch.Tensor:
    """Order the keys of each head: scores (..., T) → distinct ranks ≥ 0 (..., T), int64; a larger rank is kept longer.

    Scores are compared on a grid: as float32 rounded to 12 bits of mantissa, in steps of 1.2e-4 to 2.4e-4 of the
    score. The same token's score differs in its last bits (some 1e-6) between a batched and a one-row matrix product,
    and a tie decided by such noise would make cached generation differ from the full pass; a step of 2e-4 in a bias
    decides nothing. Ties go to the newer key: its position breaks them.
    """
    T = s.shape[-1]
    bits = (s.float() + 0.0).view(torch.int32).long()  # + 0.0 makes −0 and 0 the same number
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)  # negative floats order backwards by their bits
    grid = ((ordered + (1 << 10)) >> 11) + (1 << 20)  # round away the last 11 of 23 mantissa bits; make it positive
    return grid * T + torch.arange(T, device=s.device)


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


def causal_mask(Tq: int, Tk: int, device: torch.device) -> torch.Tensor:
    """(1, 1, Tq, Tk) bool: the last Tq of Tk positions each see themselves and what is older."""
    return torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq)[None, None]


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    window: int,
    *,
    mask: torch.Tensor | None = None,
    local_window: int = 0,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`small_doge.ops.dynamic_mask.dynamic_mask_attention`. Returns the output and the weights."""
    (_, H, Tq, D), Tk = q.shape, k.shape[2]
    visible = causal_mask(Tq, Tk, q.device) if mask is None else mask
    kept = kept_keys(s, visible, window, local_window).repeat_interleave(H // s.shape[1], dim=1)  # (B, H, Tq, Tk)
    k, v, s = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v, s))
    compute = torch.promote_types(q.dtype, torch.float32)
    logits = (q @ k.transpose(-1, -2)).to(compute) / D**0.5 + s[:, :, None, :].to(compute)
    weights = logits.masked_fill(~kept, float("-inf")).softmax(dim=-1)
    dropped = torch.nn.functional.dropout(weights, dropout_p) if dropout_p else weights
    return dropped.to(q.dtype) @ v, weights
