"""The state of Dynamic Mask Attention, in place of a cache that grows with the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..ops.dynamic_mask import decode, dynamic_mask_attention
from ..ops.dynamic_mask.window import as_scores
from .cache_layer import ARRIVALS, DynamicMaskLayer
from .configuration_doge import DogeConfig
from .masks import Visibility

# What a model and the cache that serves it must agree on.
TRAITS: tuple[str, ...] = ("num_hidden_layers", "num_key_value_heads", "mask_heads", "head_dim")
TRAITS += ("keep_window_size", "local_window", "score_lifetime")


class DynamicMaskCache(Cache):
    """A cache of constant size: the ``keep_window_size`` best keys of each head, and the last ``local_window``.

    It gives what ``DynamicCache`` gives, which holds every key: a key that left the window is never seen again.
    ``get_seq_length()`` counts the tokens that came. A 2-D ``attention_mask`` is read for the new tokens only; what was
    padding when it came stays padding. It is filled by :class:`DogeModel` alone and made by it where none is given.
    """

    layers: list[DynamicMaskLayer]  # type: ignore[assignment]

    def __init__(self, config: DogeConfig):
        self.traits = _traits(config)
        window = config.keep_window_size, config.local_window, config.score_lifetime
        make = [DynamicMaskLayer(*window) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=make)  # type: ignore[arg-type]

    def check(self, config: DogeConfig) -> None:
        """Raise ValueError if the cache was made for another model than ``config`` describes."""
        theirs = _traits(config)
        differing = [name for name in theirs if theirs[name] != self.traits[name]]
        if differing:
            made_for, expected = (", ".join(f"{n} {t[n]}" for n in differing) for t in (self.traits, theirs))
            raise ValueError(f"past_key_values was made for a model with {made_for}, expected {expected}")

    def attend(
        self,
        layer_idx: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        s: torch.Tensor,
        visibility: Visibility,
        *,
        positions: torch.Tensor | None = None,
        rotate_at: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        dropout_p: float = 0.0,
        return_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take T new keys into a layer and attend from their queries to all that they see.

        Args:
            q: (B, H, T, D), rotated.
            k: (B, G, T, D), unrotated if there is ``rotate_at``; v: (B, G, T, D); s: (B, M, T) scores.
            visibility: over all tokens that came and the new ones. Its ``mask`` needs a cache that dropped nothing.
            positions: (B or 1, T) of the new tokens, if there is ``rotate_at``.
            rotate_at: keys (B, M, N, D) and their positions (B, M, N) → keys rotated as of now.

        Returns:
            The output (B, H, T, D), and if asked for the weights (B, H, T, Tk) over all tokens that came.
        """
        layer = self.layers[layer_idx]
        past, T = layer.seen, q.shape[2]
        key_mask, documents, mask = visibility
        if mask is not None and not layer.is_croppable:
            raise ValueError(
                f"attention_mask is 4-D, but of the {past} tokens before these the cache holds the {layer.size} best "
                "keys only; expected a 2-D attention_mask, or DynamicCache, which drops nothing"
            )
        new = layer.describe(k, v, s, key_mask, positions)
        if T == 1 and past and mask is None and not (dropout_p or return_weights):
            held = layer.step(new)
            k = rotate_at(held.k, held.positions) if rotate_at else held.k
            return decode(q, k, held.v, held.s, layer.visible()), None
        held = layer.extend(new)
        k = rotate_at(held.k, held.positions) if rotate_at else held.k
        out, weights = dynamic_mask_attention(
            q,
            k,
            held.v,
            held.s,
            layer.window,
            # padding is held alike by all heads
            key_mask=held.ranks[:, 0] >= ARRIVALS if layer.padded and mask is None else None,
            documents=documents,
            mask=mask,
            local_window=layer.local_window,
            rank_by=as_scores(held.places) if layer.lifetime and held.s.shape[2] > layer.window else None,
            dropout_p=dropout_p,
            return_weights=return_weights,
        )
        if weights is not None:
            came = held.arrivals.repeat_interleave(q.shape[1] // s.shape[1], dim=1)[:, :, None].expand_as(weights)
            weights = weights.new_zeros(*weights.shape[:3], past + T).scatter(-1, came, weights)
        return out, weights

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """The name of ``get_max_length`` in older releases of transformers: −1, there is none."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds; constant once ``keep_window_size`` + ``local_window`` tokens have come."""
        return sum(layer.nbytes for layer in self.layers)

    def __repr__(self) -> str:
        slots = self.layers[0].size
        return (
            f"{type(self).__name__}({len(self.layers)} layers, {self.get_seq_length():,} tokens seen, "
            f"at most {slots:,} keys a head, {self.nbytes:,} bytes)"
        )


def _traits(config: DogeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in TRAITS} | {"rope_type": config.rope_parameters["rope_type"]}
