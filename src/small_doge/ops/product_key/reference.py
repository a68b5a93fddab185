"""Product-key experts written line for line from their formulas. Slow, and what every faster path is held to."""

from __future__ import annotations

import torch


def reference(
    x: torch.Tensor, logits: torch.Tensor, down: torch.Tensor, up: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k best of K² experts of one hidden unit each, token by token, with every one of the K × K sums.

    S[a, b] = rx[a] + ry[b] is the score of expert a·K + b; p = softmax over the k largest, the smaller expert first
    on a tie; out = Σ_e p_e · silu(x · down[e]) · up[e]. (Wonderful Matrices, arXiv:2412.11834.)

    Args:
        x: (..., C).
        logits: (..., 2K): rx are the first K of them, ry the others.
        down, up: (K², C).
        k: experts a token, 1 ≤ k ≤ K².

    Returns:
        The output (..., C), the experts (..., k) int64 by falling score, and their weights (..., k), all computed in
        the dtypes given.
    """
    K = logits.shape[-1] // 2
    tokens = zip(x.reshape(-1, x.shape[-1]), logits.reshape(-1, 2 * K), strict=True)
    outs, chosen, weights = [], [], []
    for x_n, r in tokens:
        scores = (r[:K, None] + r[None, K:]).flatten()  # (K²,)
        e = scores.sort(descending=True, stable=True).indices[:k]
        p = scores[e].softmax(dim=-1)
        hidden = torch.nn.functional.silu(down[e] @ x_n)  # (k,)
        outs.append((p * hidden) @ up[e])
        chosen.append(e)
        weights.append(p)
    shape = (*logits.shape[:-1], k)
    return torch.stack(outs).view(x.shape), torch.stack(chosen).view(shape), torch.stack(weights).view(shape)
