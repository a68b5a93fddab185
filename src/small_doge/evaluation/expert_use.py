"""Expert use: how often each expert of a model is chosen on a text, and how even that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


class ExpertUse:
    """Counts the (token, slot) assignments that each expert of each layer gets.

    Attributes:
        tokens: how many tokens were counted.
    """

    def __init__(self, num_experts: int, num_experts_per_tok: int):
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.tokens = 0
        self._counts: torch.Tensor | None = None

    def add(self, router_logits: Sequence[torch.Tensor], places: torch.Tensor) -> None:
        """Count one batch.

        Args:
            router_logits: of each layer (N, 2K), as the model returns them.
            places: which of the N tokens count, int64.
        """
        import torch

        from ..ops.product_key import retrieve

        # The model chose by these very logits; choosing again costs little and leaves the model as it is.
        chosen = [retrieve(logits[places], self.num_experts_per_tok)[1] for logits in router_logits]
        counts = torch.stack([torch.bincount(e.flatten(), minlength=self.num_experts) for e in chosen])
        self._counts = counts if self._counts is None else self._counts + counts
        self.tokens += len(places)

    def counts(self) -> np.ndarray:
        """(layers, experts) int64."""
        return np.zeros((0, self.num_experts), np.int64) if self._counts is None else self._counts.cpu().numpy()


def evenness(counts: np.ndarray) -> list[dict[str, float]]:
    """How evenly the experts of each layer are used, from (layers, experts) counts; every layer has some.

    ``dead_share`` is the share of experts never chosen, ``largest`` the count of the most used one over that of even
    use, ``entropy`` that of the shares in nats, and ``effective_experts`` its exponential: as many experts, used
    evenly, would have that entropy.
    """
    layers = []
    for layer in counts:
        shares = layer / layer.sum()
        used = shares[shares > 0]
        entropy = float(-(used * np.log(used)).sum())
        layers.append(
            {
                "dead_share": 1 - len(used) / len(shares),
                "largest": float(shares.max() * len(shares)),
                "entropy": entropy,
                "effective_experts": float(np.exp(entropy)),
            }
        )
    return layers


def summary(use: ExpertUse) -> dict[str, Any]:
    """What results.json says of the use of experts."""
    return {
        "num_experts": use.num_experts,
        "num_experts_per_tok": use.num_experts_per_tok,
        "tokens": use.tokens,
        "layers": evenness(use.counts()),
    }
