"""Load balancing over K² experts without anything of size tokens × K²."""

from __future__ import annotations

import torch


def balance(
    logits: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The load-balancing loss of one layer, and how its experts share the tokens.

    loss = E · Σ_e f_e · P_e over the E = K² experts, where f_e is the share of the (token, slot) assignments that
    expert e got, and P_e the mean over tokens of softmax over all E scores (Switch Transformers, arXiv:2101.03961,
    equations 4 to 6). It is 1 where f or P is uniform. Since exp(a + b) = exp(a) · exp(b), the softmax of all sums of
    two halves is the product of their softmaxes, and the sum over N tokens is one K × N by N × K matrix product.

    Args:
        logits: (N, 2K), as for ``retrieve``.
        indices: (N, k) integers, the experts of each token.
        mask: (N,) bool, False for tokens that do not count, or None. Where none counts, loss and usage are 0.

    Returns:
        The loss, a scalar whose gradient reaches ``logits`` through P alone, and the usage f (E,), which sums to 1;
        float32 (float64 for float64).

    Raises:
        ValueError: if shapes do not fit together.
    """
    (N, width), k = logits.shape, indices.shape[-1]
    K = width // 2
    if width % 2 or indices.shape != (N, k) or (mask is not None and mask.shape != (N,)):
        raise ValueError(
            f"logits {tuple(logits.shape)}, indices {tuple(indices.shape)} and mask "
            f"{None if mask is None else tuple(mask.shape)} do not fit: expected (N, 2K), (N, k) and (N,)"
        )
    compute = torch.promote_types(logits.dtype, torch.float32)
    real = torch.ones(N, dtype=torch.bool, device=logits.device) if mask is None else mask.bool()
    tokens = real.sum().clamp(min=1)
    with torch.autocast(logits.device.type, enabled=False):
        x, y = (half.softmax(dim=-1) for half in logits.to(compute).split(K, dim=-1))
        P = (torch.where(real[:, None], x, 0).T @ y).flatten() / tokens  # (E,)
        counts = torch.zeros(K * K, dtype=torch.int64, device=logits.device)
        counts.scatter_add_(0, indices.flatten(), real.long()[:, None].expand(N, k).flatten())
        usage = counts.to(compute) / (tokens * k)
        return K * K * (usage * P).sum(), usage
