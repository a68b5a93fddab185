"""Dynamic Mask Attention: one function for the model, which picks the path.

Shapes, here and in every path: B rows, H query heads, G key/value heads, M score heads (G, or H in the first
releases), Tq queries that are the last Tq of Tk keys, D head size.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ..gpu import dtype_of_products, usable
from .chunked import chunked
from .decode import decode
from .folded import folded
from .packed import packed, takes_heads
from .reference import reference, visible_keys
from .sparse import DTYPES, LARGEST_HEAD, sparse
from .window import aged, eviction_times, ranks

__all__ = [
    "FORCE",
    "PATHS",
    "aged",
    "choose_path",
    "chunked",
    "decode",
    "dynamic_mask_attention",
    "eviction_times",
    "folded",
    "packed",
    "ranks",
    "reference",
    "sparse",
    "visible_keys",
]

PATHS = ("reference", "folded", "packed", "chunked", "sparse")
FORCE = "DOGE_ATTENTION"  # environment variable that forces a path
FEW_QUERIES = 16  # up to so many, ranking all keys for each costs less than finding out when every key leaves
LARGEST_MASK = 1 << 26  # elements of a (B, 1, Tq, Tk) mask that `folded` may build for padding and documents


def dynamic_mask_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    window: int,
    *,
    key_mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    local_window: int = 0,
    rank_by: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to the ``window`` visible keys with the best scores, with the score as a bias.

    out_i = softmax over j in W(i) of (q_i · k_j / √D + s_j), times v_j, where W(i) are the ``window`` visible keys
    j ≤ i with the largest s_j; on a tie the newer key wins. (Wonderful Matrices, arXiv:2412.11834.)

    Args:
        q: (B, H, Tq, D), the queries of the last Tq positions.
        k: (B, G, Tk, D) and v: (B, G, Tk, D); H is a multiple of G.
        s: (B, M, Tk) scores, floating point, M in {G, H}. Computed in at least float32.
        window: how many keys a query keeps, w ≥ 1.
        key_mask: (B, Tk) bool, False for padding, which no other position sees and which takes no place in W. What a
            padded position itself returns is finite and otherwise unspecified.
        documents: (B, Tk) integers that never fall along a row; positions of another document are not seen.
        mask: (B, 1, Tq, Tk) bool in place of the two: True where a query may see a key, causality included. Costs
            memory that grows with Tq · Tk.
        local_window: the last ``local_window`` keys stay visible whatever their score.
        rank_by: (B, M, Tk) floating point: what W(i) is chosen by in place of s, see :func:`aged`.
        dropout_p: probability of dropping an attention weight.
        return_weights: also return the attention weights.

    Returns:
        The output (B, H, Tq, D) in the dtype of q, and the weights (B, H, Tq, Tk) or None.

    Raises:
        ValueError: if shapes do not fit together, ``window`` is not positive, or the path that the environment
            variable ``DOGE_ATTENTION`` names does not exist or cannot compute this call.
    """
    _check(q, k, v, s, window, local_window, key_mask, documents, mask)
    if rank_by is not None and rank_by.shape != s.shape:
        raise ValueError(f"rank_by has shape {tuple(rank_by.shape)}, expected that of the scores, {tuple(s.shape)}")
    described = key_mask is not None or documents is not None
    path, _ = choose_path(
        q, k, window,
        padded=key_mask is not None, packed=documents is not None, mask=mask is not None,
        dropout_p=dropout_p, return_weights=return_weights,
    )  # fmt: skip
    if path in ("chunked", "sparse"):
        by = s if rank_by is None else rank_by
        e = eviction_times(by, window, key_mask=key_mask, documents=documents, local_window=local_window)
        most = min(window + local_window, k.shape[2]) + (key_mask is not None)  # a padded position also sees itself
        if path == "sparse":
            return sparse(q, k, v, s, e, most), None
        return chunked(q, k, v, s, e, most, dropout_p=dropout_p), None
    if path == "packed":
        assert documents is not None
        return packed(q, k, v, s, documents), None
    if mask is None and described:
        mask = visible_keys(q.shape[2], k.shape[2], q.device, key_mask, documents)
    if path == "folded":
        return folded(q, k, v, s, mask=mask, dropout_p=dropout_p), None
    options: dict[str, Any] = {"local_window": local_window, "rank_by": rank_by, "dropout_p": dropout_p}
    return reference(q, k, v, s, window, mask=mask, **options)


def choose_path(
    q: torch.Tensor,
    k: torch.Tensor,
    window: int,
    *,
    padded: bool = False,
    packed: bool = False,
    mask: bool = False,
    dropout_p: float = 0.0,
    return_weights: bool = False,
) -> tuple[str, str]:
    """Which of ``PATHS`` a call of :func:`dynamic_mask_attention` takes, and why; it looks at shapes, not at values.

    Args:
        q, k: as there.
        padded: whether ``key_mask`` is given.
        packed: whether ``documents`` is given.
        mask: whether ``mask`` is given.

    Raises:
        ValueError: if the environment variable ``DOGE_ATTENTION`` names no path, or one that cannot compute this call.
    """
    B, Tq, Tk = q.shape[0], q.shape[2], k.shape[2]
    fits = f"{Tk} keys, a window of {window}"
    forced = os.environ.get(FORCE)
    if forced:
        cannot = _obstacle(forced, q, k, window, padded, packed, mask, dropout_p, return_weights)
        if cannot:
            raise ValueError(f"{FORCE} is {forced!r}, which cannot be: {cannot}")
        return forced, f"{FORCE} says so"
    if return_weights:
        return "reference", "the attention weights are asked for"
    if mask:
        return ("folded" if Tk <= window else "reference"), f"a mask of its own for every query; {fits}"
    if Tk > window and Tq <= FEW_QUERIES < Tk:
        return "reference", f"few queries: {Tq} of {fits}"
    described = padded or packed
    # In float32 our kernels are exact, and slower than matrix products of PyTorch's.
    if (Tk > window or described) and not _no_kernels(q, k, dropout_p) and dtype_of_products(q) != torch.float32:
        if Tk <= window and not padded and takes_heads(q):
            return "packed", f"documents, and no key can drop out: {fits}"
        return "sparse", f"{'keys drop out' if Tk > window else 'padding or documents'}: {fits}"
    if Tk > window:
        return "chunked", f"keys drop out: {fits}"
    if described and B * Tq * Tk > LARGEST_MASK:
        return "chunked", f"no key can drop out ({fits}), but a mask for padding and documents would be large"
    return "folded", f"no key can drop out: {fits}"


def _obstacle(
    path: str,
    q: torch.Tensor,
    k: torch.Tensor,
    window: int,
    padded: bool,
    packed: bool,
    mask: bool,
    dropout_p: float,
    return_weights: bool,
) -> str | None:
    """Why ``path`` cannot compute a call, or None if it can."""
    Tk = k.shape[2]
    if path not in PATHS:
        return f"expected one of {', '.join(PATHS)}"
    if return_weights and path != "reference":
        return "only `reference` returns the attention weights"
    if mask and path in ("packed", "chunked", "sparse"):
        return f"`{path}` takes no mask of its own for every query"
    if path in ("folded", "packed") and Tk > window:
        return f"`{path}` drops no key, and there are {Tk} keys for a window of {window}"
    if path == "packed" and (padded or not packed):
        return "`packed` takes documents, and no padding"
    cannot = _no_kernels(q, k, dropout_p) if path in ("packed", "sparse") else None
    if path == "packed" and not cannot and not takes_heads(q):
        return "`packed` is made for compute capability 9.0, and for head sizes that are multiples of 8"
    return cannot


def _no_kernels(q: torch.Tensor, k: torch.Tensor, dropout_p: float) -> str | None:
    """Why the kernels of `packed` and `sparse` cannot compute a call, or None if they can."""
    if not usable(q):
        return "the kernels need Triton and an NVIDIA GPU of compute capability 8.0 or more"
    if dtype_of_products(q) not in DTYPES or q.shape[3] > LARGEST_HEAD:
        return f"the kernels take 16 and 32 bit floats and heads up to {LARGEST_HEAD}"
    if q.shape[2] != k.shape[2] or dropout_p:
        return "the kernels take as many queries as keys, and no dropout"
    return None


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    window: int,
    local_window: int,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    (B, H, Tq, D), (G, Tk) = q.shape, k.shape[1:3]
    if window < 1:
        raise ValueError(f"window is {window}, expected at least 1")
    if local_window < 0:
        raise ValueError(f"local_window is {local_window}, expected 0 or more")
    if k.shape != (B, G, Tk, D) or v.shape != k.shape or H % G or Tq > Tk:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: expected (B, H, Tq, D), "
            f"(B, G, Tk, D) twice, with H a multiple of G and Tq ≤ Tk"
        )
    if s.dim() != 3 or s.shape[0] != B or s.shape[2] != Tk or s.shape[1] not in (G, H):
        raise ValueError(f"scores have shape {tuple(s.shape)}, expected (B={B}, {G} or {H}, Tk={Tk})")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (B, Tk)):
        raise ValueError(f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}, expected bool (B={B}, Tk={Tk})")
    if documents is not None and (documents.is_floating_point() or documents.shape != (B, Tk)):
        raise ValueError(f"documents is {documents.dtype} {tuple(documents.shape)}, expected integers (B={B}, Tk={Tk})")
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in ((B, 1, Tq, Tk), (1, 1, Tq, Tk))):
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected bool (B={B}, 1, Tq={Tq}, Tk={Tk})")
    if mask is not None and (key_mask is not None or documents is not None):
        raise ValueError("mask is given together with key_mask or documents, expected one or the other")
