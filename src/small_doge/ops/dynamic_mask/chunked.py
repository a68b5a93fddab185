"""Dynamic Mask Attention past the window in plain torch: chunk by chunk of queries, over the keys each chunk can see.

A chunk of n queries sees the at most w keys that its first query sees and n more: O(T·(w + n)) work, and nothing of
size T·T. It runs on any device and dtype; on a GPU the Triton kernels of ``sparse`` are many times faster.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from .folded import folded


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    e: torch.Tensor,
    most: int,
    *,
    dropout_p: float = 0.0,
    chunk: int = 512,
) -> torch.Tensor:
    """See :func:`small_doge.ops.dynamic_mask.dynamic_mask_attention`.

    Args:
        q: (B, H, Tq, D); k, v: (B, G, Tk, D); s: (B, M, Tk).
        e: (B, M, Tk) eviction times.
        most: no query sees more keys than this.
        chunk: queries at a time. The backward pass computes each chunk again: memory is O(chunk · (most + chunk)).

    Returns:
        (B, H, Tq, D).
    """
    (B, H, Tq, D), Tk, M = q.shape, k.shape[2], s.shape[1]
    if k.shape[1] != M:  # a mask of its own for every query head
        k, v = (x.repeat_interleave(M // x.shape[1], dim=1) for x in (k, v))
    q = q.reshape(B * M, H // M, Tq, D)
    k, v = (x.reshape(B * M, 1, Tk, D) for x in (k, v))
    s, e = (x.reshape(B * M, 1, Tk) for x in (s, e))
    again = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, s))
    pieces = []
    for start in range(Tk - Tq, Tk, chunk):
        stop = min(start + chunk, Tk)
        piece = q[:, :, start - (Tk - Tq) : stop - (Tk - Tq)]
        arguments = (piece, k, v, s, e, start, stop, most, dropout_p)
        pieces.append(checkpoint(_chunk, *arguments, use_reentrant=False) if again else _chunk(*arguments))
    return torch.cat(pieces, dim=2).view(B, H, Tq, D)


def _chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    e: torch.Tensor,
    start: int,
    stop: int,
    most: int,
    dropout_p: float,
) -> torch.Tensor:
    """Queries start ≤ i < stop (R, N, stop − start, D) over the keys (R, 1, Tk, D) that any of them sees."""
    j = torch.arange(stop, device=q.device)
    alive = e[:, 0, :stop] > j.clamp(min=start)  # (R, stop): seen by a query of this chunk
    n = min(stop, most + stop - start)  # at most so many are
    keys = alive.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :n]  # (R, n)
    i = torch.arange(start, stop, device=q.device)[:, None]
    last = e[:, 0].gather(-1, keys)[:, None]
    mask = (keys[:, None] <= i) & (i < last)  # (R, stop − start, n); a key that is not alive is seen by none
    rows = keys[:, None, :, None].expand(-1, -1, -1, k.shape[-1])
    k, v, s = k.gather(2, rows), v.gather(2, rows), s.gather(2, keys[:, None])
    return folded(q, k, v, s, mask=mask[:, None], dropout_p=dropout_p)
