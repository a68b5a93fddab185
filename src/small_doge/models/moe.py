"""What follows attention in a layer: a SwiGLU, or a SwiGLU beside the experts that a token is sent to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MoeModelOutputWithPast

from ..ops.product_key import balance, experts, route
from ..ops.products import can_multiply
from ..ops.residual import Stream
from ..ops.swiglu import swiglu, swiglu_into_stream, swiglu_linear, swiglu_mlp
from .configuration_doge import DogeConfig
from .projections import better_together, plain, project_together


@dataclass
class DogeMoEModelOutput(MoeModelOutputWithPast):
    """transformers' output of a model with experts, and ``aux_loss``, the mean of the layers' balance losses."""

    aux_loss: torch.Tensor | None = None


class DogeMLP(nn.Module):
    """SwiGLU: down(act(gate x) · up x).

    With ``chunk_size_feed_forward`` of the config, so many tokens at a time, whose gates and ups are computed again in
    the backward pass: that keeps nothing of 3 · ``intermediate_size`` numbers a token, for a third more of its time.
    """

    def __init__(self, config: DogeConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.silu = config.hidden_act in ("silu", "swish")
        self.chunk_size = config.chunk_size_feed_forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, C) → (…, C)."""
        if not 0 < self.chunk_size < x.shape[:-1].numel():
            return self._at_once(x)
        run: Callable[[torch.Tensor], torch.Tensor] = self._at_once
        if torch.is_grad_enabled():  # no random numbers are drawn in here
            run = partial(checkpoint, self._at_once, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([run(chunk) for chunk in x.flatten(0, -2).split(self.chunk_size)]).view_as(x)

    def _at_once(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_products(x):
            return swiglu_mlp(x, *self._weights())
        gate_up = project_together(x, self.gate_proj, self.up_proj) if self.silu else None
        if gate_up is not None and plain(self.down_proj):
            out, bias = swiglu_linear(gate_up, self.down_proj.weight), self.down_proj.bias
            return out if bias is None else out + bias
        if gate_up is not None:
            return self.down_proj(swiglu(gate_up))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def in_products(self, x: torch.Tensor) -> bool:
        """Whether act(gate x) · up x can be left to the matrix products."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not (self.silu and better_together(x, gate, up) and plain(down)):
            return False
        if any(layer.bias is not None for layer in (gate, up, down)):
            return False
        return can_multiply(x, down.out_features, down.in_features)

    def into_stream(self, stream: Stream, norm: torch.Tensor, scale: torch.Tensor, eps: float) -> Stream:
        """scale · y + SwiGLU of RMSNorm(y) · norm, by products alone (``ops.residual``); eps is the next norm's."""
        return swiglu_into_stream(stream, norm, scale, *self._weights(), eps)

    def _weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight


class DogeCDMoE(DogeMLP):
    """Cross Domain Mixture of Experts: the SwiGLU for every token, and k of N experts of one hidden unit each.

    With r = Wr x, K = √N keys on an axis and S[a, b] = r[a] + r[K + b] the score of expert e = a·K + b::

        out = SwiGLU(x) + Σ_e p_e · silu(x · down_embed[e]) · up_embed[e]

    over the k experts with the largest scores, p being the softmax of these. A token is routed by its own scores in a
    call of any shape. transformers' Doge reads r as (2, tokens, K) and so pairs scores of different tokens; for a
    single token the two agree, and so do the names and shapes of the tensors.
    """

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.router_gate = nn.Linear(config.hidden_size, 2 * config.num_keys, bias=False)
        self.down_embed = nn.Embedding(config.num_experts, config.hidden_size)
        self.up_embed = nn.Embedding(config.num_experts, config.hidden_size)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, counted: torch.Tensor | None = None, balanced: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(B, T, C) → (B, T, C), the router's logits (B·T, 2K), and if ``balanced`` the balance loss, a scalar.

        Args:
            counted: (B, T) bool, False for tokens that the balance loss passes over.
        """
        tokens = x.flatten(0, 1)
        logits = self.router_gate(tokens)
        weights, indices = route(logits, self.num_experts_per_tok, self.norm_topk_prob)
        routed = experts(tokens, self.down_embed.weight, self.up_embed.weight, indices, weights)
        loss = None
        if balanced:
            loss, _ = balance(logits, indices, None if counted is None else counted.flatten())
        return super().forward(x) + routed.view_as(x), logits, loss
