"""Dynamic Mask Attention while no key can drop out (Tk ≤ w): the score rides inside the dot product.

With q' = [q, 1] and k' = [k, √D · s],  q'·k' / √D = q·k / √D + s,  so any causal attention kernel computes it and
its gradients, and none of them needs a (T, T) bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def folded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """See :func:`small_doge.ops.dynamic_mask.dynamic_mask_attention`; (B, H, Tq, D) out, for Tk no larger than w."""
    (_, H, Tq, D), Tk = q.shape, k.shape[2]
    if s.shape[1] == H:  # a score of its own for every query head: keys differ between the heads of a group
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))

    if torch.is_autocast_enabled(q.device.type):
        # Attention would round its inputs under autocast; the score must be split for the dtype it will meet there.
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    bias = s[..., None] * D**0.5  # (B, M, Tk, 1)
    columns = [bias.to(k.dtype)]
    if k.dtype in (torch.bfloat16, torch.float16):
        # √D·s needs more bits than a half has: a second column carries what rounding took from the first. No detach:
        # the two gradients are equal, and the minus sign leaves exactly one of them.
        lost = bias - columns[0].to(bias.dtype)
        columns.append(torch.where(bias.isinf(), 0.0, lost).to(k.dtype))
    # The fused GPU kernels take head sizes that are multiples of 8, the same for q, k and v.
    spare = -(D + len(columns)) % 8 if k.is_cuda else 0
    k = torch.cat([k, *columns, k.new_zeros(1, 1, 1, 1).expand(*k.shape[:3], spare)], dim=-1)
    q = torch.cat([q, q.new_ones(1, 1, 1, 1).expand(*q.shape[:3], len(columns))], dim=-1)
    q, v = F.pad(q, (0, spare)), F.pad(v, (0, spare + len(columns)))

    if mask is None and 1 < Tq < Tk:  # several new tokens after a cache: is_causal would align them to the start
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=mask is None and Tq > 1,
        scale=D**-0.5,
        enable_gqa=k.shape[1] != H,
    )
    return out[..., :D]
