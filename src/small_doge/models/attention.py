"""Dynamic Mask Attention as a layer of Doge: projections, norms, rotation, scores and whatever cache there is."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from ..ops.dynamic_mask import aged, dynamic_mask_attention
from ..ops.heads import can_project_heads, heads_of_stream, projected_heads
from ..ops.products import can_multiply
from ..ops.residual import Stream, add_product
from .cache import DynamicMaskCache
from .configuration_doge import DogeConfig
from .masks import Visibility
from .projections import better_together, joined, listened_to, plain, project
from .rotary import grows_with_length, rotate, rotate_to


class DogeRMSNorm(nn.RMSNorm):
    """x / √(mean(x²) + ε) · weight over the last dimension (arXiv:1910.07467), computed in at least float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, C), in the wider dtype of x and the weight."""
        if x.dtype == self.weight.dtype:  # PyTorch's own computes 16 bits in float32
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        compute = torch.promote_types(x.dtype, torch.float32)
        normed = F.rms_norm(x.to(compute), self.normalized_shape, self.weight.to(compute), self.eps)
        return normed.to(torch.promote_types(x.dtype, self.weight.dtype))


class DogeAttention(nn.Module):
    """Dynamic Mask Attention: every key carries a score from its own value state (see ``ops.dynamic_mask``)."""

    def __init__(self, config: DogeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        C, bias = config.hidden_size, config.attention_bias
        H, G, M, self.head_dim = config.heads
        self.q_proj = nn.Linear(C, H * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(C, G * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(C, G * self.head_dim, bias=bias)
        self.A = nn.Parameter(torch.zeros(M))
        self.dt_proj = nn.Linear(G * self.head_dim, M, bias=bias)
        self.o_proj = nn.Linear(H * self.head_dim, C, bias=bias)
        self.q_norm = DogeRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = DogeRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def scores(self, v: torch.Tensor, dt: torch.Tensor | None = None) -> torch.Tensor:
        """s = exp(A · softplus(Wdt v)): values (B, G, Tk, D) → scores (B, M, Tk), in at least float32.

        ``dt`` is Wdt v (B, Tk, M) where it is there already.
        """
        if dt is None:
            dt = self.dt_proj(v.transpose(1, 2).flatten(2))
        compute = torch.promote_types(dt.dtype, torch.float32)
        return torch.exp(self.A.to(compute) * F.softplus(dt.to(compute))).transpose(1, 2)

    def heads(
        self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], rotate_k: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(B, T, C) → q (B, H, T, D), normed and rotated, k (B, G, T, D) likewise, or normed only, v, and Wdt v of it
        where that comes with it."""
        layers = self.q_proj, self.k_proj, self.v_proj
        if rotate_k and self._projects_heads(x):
            return projected_heads(x, *joined(*layers), *self._of_heads(angles))
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in project(x, *layers))
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        return rotate(q, angles), rotate(k, angles) if rotate_k else k, v.transpose(1, 2), None

    def _projects_heads(self, x: torch.Tensor) -> bool:
        """Whether what there is from x to heads that are rotated is fused."""
        known = plain(self.dt_proj) and plain(self.q_norm, DogeRMSNorm) and plain(self.k_norm, DogeRMSNorm)
        together = known and better_together(x, self.q_proj, self.k_proj, self.v_proj)
        return together and can_project_heads(x, self.head_dim)

    def _of_heads(self, angles: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, ...]:
        """What :mod:`small_doge.ops.heads` takes after the weights of q, k and v."""
        norms, scorer = (self.q_norm.weight, self.k_norm.weight), (self.dt_proj.weight, self.dt_proj.bias)
        return norms, angles, scorer, self.config.heads[0], self.config.rms_norm_eps

    def in_products(self, x: torch.Tensor) -> bool:
        """Whether attention without a cache can leave it to its products to norm a stream x and to add to it."""
        layers = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        if listened_to(self) or not plain(self.o_proj) or not self._projects_heads(x):
            return False
        sizes = (size for layer in layers for size in layer.weight.shape)
        return all(layer.bias is None for layer in layers) and can_multiply(x, *sizes)

    def into_stream(
        self,
        stream: Stream,
        norm: torch.Tensor,
        scale: torch.Tensor,
        q_angles: tuple[torch.Tensor, torch.Tensor],
        visible: Visibility,
        output_attentions: bool,
    ) -> tuple[Stream, torch.Tensor | None]:
        """scale · y + attention to RMSNorm(y) · norm, by products alone (``ops.residual``), and weights as of
        :meth:`forward`."""
        weight, _ = joined(self.q_proj, self.k_proj, self.v_proj)
        q, k, v, dt, stream = heads_of_stream(stream, norm, scale, weight, *self._of_heads(q_angles))
        out, weights = self._attend(q, k, v, self.scores(v, dt), visible, **self._options(output_attentions))
        o, eps = self.o_proj.weight, self.config.rms_norm_eps
        return add_product(stream, scale, _side_by_side(out), o, eps), weights

    def forward(
        self,
        hidden_states: torch.Tensor,
        q_angles: tuple[torch.Tensor, torch.Tensor],
        k_angles: tuple[torch.Tensor, torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
        length: int | None = None,
        visible: Visibility | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, C) → (B, T, C) and, if asked for, the weights (B, H, T, Tk).

        A cache holds keys rotated where their angles are fixed. Where they change as the text grows it holds them
        unrotated; a ``DynamicMaskCache`` then takes the ``positions`` (B or 1, T) of the new ones and has all rotated
        to the angles of a text of ``length``, and for any other cache ``k_angles`` are those of all Tk keys.
        """
        visible = visible or Visibility()
        unrotated = past_key_values is not None and grows_with_length(self.config)
        q, k, v, dt = self.heads(hidden_states, q_angles, rotate_k=not unrotated)
        options = self._options(output_attentions)
        if isinstance(past_key_values, DynamicMaskCache):
            if unrotated:
                options |= {"positions": positions, "rotate_at": partial(rotate_to, self.config, length)}
            out, weights = past_key_values.attend(self.layer_idx, q, k, v, self.scores(v, dt), visible, **options)
        else:
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx)  # (B, G, Tk, D)
                dt = None  # of the new values only
            if unrotated:
                assert k_angles is not None
                k = rotate(k, k_angles)
            out, weights = self._attend(q, k, v, self.scores(v, dt), visible, **options)
        return self.o_proj(_side_by_side(out)), weights

    def _options(self, output_attentions: bool) -> dict[str, Any]:
        """What any attention is asked for."""
        dropout = self.config.attention_dropout or 0.0 if self.training else 0.0
        return {"return_weights": output_attentions, "dropout_p": dropout}

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, visible: Visibility, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """To all keys there are."""
        window, lifetime = self.config.keep_window_size, self.config.score_lifetime
        return dynamic_mask_attention(
            q,
            k,
            v,
            s,
            window,
            local_window=self.config.local_window,
            rank_by=aged(s, lifetime, visible.key_mask) if lifetime and s.shape[-1] > window else None,
            **visible._asdict(),
            **options,
        )


def _side_by_side(heads: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) → (B, T, H·D)."""
    return heads.transpose(1, 2).flatten(2)
