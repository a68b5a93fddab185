"""Dynamic Mask Attention: one function for the model, which picks the path.

Shapes, here and in every path: B rows, H query heads, G key/value heads, M score heads (G, or H in the first
releases), Tq queries that are the last Tq of Tk keys, D head size.
"""

from __future__ import annotations

import torch

from .folded import folded
from .reference import reference

__all__ = ["dynamic_mask_attention", "folded", "reference"]


def dynamic_mask_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    window: int,
    *,
    mask: torch.Tensor | None = None,
    local_window: int = 0,
    dropout_p: float = 0.0,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to the ``window`` visible keys with the best scores, with the score as a bias.

    out_i = softmax over j in W(i) of (q_i · k_j / √D + s_j), times v_j, where W(i) are the ``window`` visible keys
    j ≤ i with the largest s_j; on a tie the newer key wins. (Wonderful Matrices, arXiv:2412.11834.)

    While Tk ≤ ``window`` no key can drop out and the path is :func:`folded`, one fused causal attention; beyond, and
    where the weights themselves are asked for, it is :func:`reference`.

    Args:
        q: (B, H, Tq, D), the queries of the last Tq positions.
        k: (B, G, Tk, D) and v: (B, G, Tk, D); H is a multiple of G.
        s: (B, M, Tk) scores, floating point, M in {G, H}. Computed in at least float32.
        window: how many keys a query keeps, w ≥ 1.
        mask: (B, 1, Tq, Tk) bool, True where a query may see a key; causality, padding and document boundaries are
            all in it. None means plain causal.
        local_window: the last ``local_window`` keys stay visible whatever their score.
        dropout_p: probability of dropping an attention weight.
        return_weights: also return the attention weights.

    Returns:
        The output (B, H, Tq, D) in the dtype of q, and the weights (B, H, Tq, Tk) or None.

    Raises:
        ValueError: if shapes do not fit together or ``window`` is not positive.
    """
    _check(q, k, v, s, window, mask)
    if k.shape[2] <= window and not return_weights:
        return folded(q, k, v, s, mask=mask, dropout_p=dropout_p), None
    return reference(q, k, v, s, window, mask=mask, local_window=local_window, dropout_p=dropout_p)


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, window: int, mask: torch.Tensor | None
) -> None:
    (B, H, Tq, D), (G, Tk) = q.shape, k.shape[1:3]
    if window < 1:
        raise ValueError(f"window is {window}, expected at least 1")
    if k.shape != (B, G, Tk, D) or v.shape != k.shape or H % G or Tq > Tk:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: expected (B, H, Tq, D), "
            f"(B, G, Tk, D) twice, with H a multiple of G and Tq ≤ Tk"
        )
    if s.dim() != 3 or s.shape[0] != B or s.shape[2] != Tk or s.shape[1] not in (G, H):
        raise ValueError(f"scores have shape {tuple(s.shape)}, expected (B={B}, {G} or {H}, Tk={Tk})")
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in ((B, 1, Tq, Tk), (1, 1, Tq, Tk))):
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected bool (B={B}, 1, Tq={Tq}, Tk={Tk})")
