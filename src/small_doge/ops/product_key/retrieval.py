"""The k best of K × K product keys, from the two halves of their scores, without looking at all pairs.

Which of them: pairs go by their sum as a float, the largest first, and the smaller expert index first on a tie. To be
exact in the last bit, since different sums can round to one float: sort each half by falling value, the smaller place
first on a tie. A pair (rank i, rank j) has (i + 1)(j + 1) − 1 pairs above it whose ranks are both no worse. Pairs with
k or more above them are left out, and the order just given chooses among the rest.

- Nothing larger is left out: rounding never turns an order round, so every pair above has a sum at least as large.
- No tie of exact sums is decided differently: where one above has an equal exact sum, both of its values are equal, so
  both of its places are smaller or the same, and its index is smaller.
- Only where different sums round to one float (or are both −inf) at the k-th place can a pair with a smaller index be
  left out: the better ranks win there. The same logits always give the same experts, on a CPU or a GPU.
"""

from __future__ import annotations

import functools

import torch

from .fused import fused_retrieve, retrieves

FEW = 1 << 12  # numbers that are sorted in less time than packing them takes
LARGEST_PLACE = (1 << 32) - 1  # a place takes the lower half of an int64


def retrieve(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the sums S[a, b] = rx[a] + ry[b], and which they are.

    O(K log K + k log k) numbers a token are looked at instead of K². The rule for ties is at the top of this file.

    Args:
        logits: (..., 2K): rx are the first K of them, ry the others. 16 bit floats are added in float32. Some may be
            −inf, but not a whole half.
        k: how many, 1 ≤ k ≤ K².

    Returns:
        Scores (..., k), falling, in float32 (float64 for float64), differentiable with respect to ``logits``; and
        indices a·K + b (..., k), int64.

    Raises:
        ValueError: if the last dimension of ``logits`` is not 2K for some K ≥ 1, or k is not between 1 and K².
    """
    K = logits.shape[-1] // 2
    if K < 1 or logits.shape[-1] % 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected (..., 2K) with K at least 1")
    if not 1 <= k <= K * K:
        raise ValueError(f"k is {k}, expected 1 to {K * K}, the number of pairs of K={K} keys")
    if logits.is_cuda and retrieves(logits, k):
        scores, indices = fused_retrieve(logits.reshape(-1, 2 * K), k)
        return scores.view(*logits.shape[:-1], k), indices.view(*logits.shape[:-1], k)
    halves = logits.to(torch.promote_types(logits.dtype, torch.float32)).unflatten(-1, (2, K))
    rx, ry = halves.unbind(-2)
    with torch.no_grad():
        a, b = first(halves, min(k, K)).unbind(-2)  # by rank
        ranks = _ranks_of_candidates if torch.compiler.is_compiling() else _remembered  # a traced tensor is no number
        i, j = ranks(K, k, logits.device)
        a, b = a.index_select(-1, i), b.index_select(-1, j)
        indices = first(rx.gather(-1, a) + ry.gather(-1, b), k, a * K + b)
    return rx.gather(-1, indices // K) + ry.gather(-1, indices % K), indices


def route(logits: torch.Tensor, k: int, normalise: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights p = softmax over the k best scores of each token, and its experts: see :func:`retrieve`.

    Args:
        logits: (..., 2K).
        k: experts a token.
        normalise: divide the weights by their sum, as published configurations can ask (``norm_topk_prob``); a softmax
            sums to 1 already, so this changes roundings only.

    Returns:
        Weights (..., k) in float32 (float64 for float64), and indices (..., k), int64.
    """
    scores, indices = retrieve(logits, k)
    weights = scores.softmax(dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True) if normalise else weights, indices


def first(values: torch.Tensor, n: int, places: torch.Tensor | None = None) -> torch.Tensor:
    """The n places whose values are largest, in that order, the smaller place first among equals.

    Values (..., M) float32 or float64 and places (..., M) int64, 0 ≤ place < 2³², all different in a row → (..., n).
    Without ``places`` they are 0 to M − 1.
    """
    if values.dtype != torch.float32 or values.numel() <= FEW:
        if places is None:
            return values.sort(dim=-1, descending=True, stable=True).indices[..., :n]
        places, order = places.sort(dim=-1)
        return places.gather(-1, first(values.gather(-1, order), n))
    if places is None:
        places = torch.arange(values.shape[-1], device=values.device)
    # top-k promises nothing about ties, so there are none: (value, place) becomes one integer. The bits of a float,
    # the lower ones turned over where it is negative, order as it does; adding 0 makes −0 the same as 0.
    bits = (values + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    best = ((bits.long() << 32) | (LARGEST_PLACE - places)).topk(n, dim=-1).values
    return LARGEST_PLACE - (best & LARGEST_PLACE)


def _ranks_of_candidates(K: int, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks i and j of the pairs with (i + 1)(j + 1) ≤ k: at most k (1 + ln k) of them."""
    pairs = [(i, j) for i in range(min(k, K)) for j in range(min(k // (i + 1), K))]
    i, j = torch.tensor(pairs, device=device).unbind(-1)
    return i, j


_remembered = functools.cache(_ranks_of_candidates)
