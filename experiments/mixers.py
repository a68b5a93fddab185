"""What mixes positions in the models of recall_study.py: each takes the place of attention in the layers of a Doge.

Embeddings, norms, SwiGLU, residuals and the head stay Doge's, so that models differ in nothing else:

- ``dma``: Dynamic Mask Attention as it is; a query sees the ``window`` keys with the best scores.
- ``dma_local``: the same, and the last ``window`` / 4 keys stay visible whatever their score.
- ``dma_aged``: Dynamic Mask Attention whose scores age: one that is higher by 1 makes up for as many tokens as the
  longest row has.
- ``full``: the same with A held at zero and a window over the whole row, which is plain causal attention.
- ``sliding``: A held at zero. All keys tie and the newer one wins, so a query sees the last ``window`` keys.
- ``query_topk``: a query sees the ``window`` keys it agrees with most. They are chosen anew for each query, which costs
  all products of queries and keys; a key that is left out can return.
- ``ssd``: the layer of Mamba-2 (arXiv:2405.21060), a state of 128 a channel that decays by what the token says, with
  its short convolution, gate, norm and initial values.
- ``based``: Based (arXiv:2402.18668). Linear attention with the second-order Taylor expansion of the exponential
  (feature size 16), and softmax over the last 64 keys. The paper's layers are one or the other; with two layers in
  all, each has both here, their outputs added, behind a short convolution. This is the stronger form.

Attention has Doge's initial values, ``ssd`` and ``based`` those of PyTorch, as Mamba-2 has them. The sums of the last
two are in plain PyTorch, in float32: flash-linear-attention 0.6 refuses the gradient of a decay that depends on the
token on Hopper with Triton 3.4 to 3.7.0, and for models of this size there is little to win.

Shapes: B rows, T positions, C hidden, H heads, K and V sizes of a key and of a value.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from small_doge.evaluation.recall import RecallRecipe
from small_doge.evaluation.recall import build as build_doge
from small_doge.models import DogeConfig
from small_doge.models.attention import DogeAttention, DogeRMSNorm
from small_doge.models.rotary import rotate

MIXERS = ("dma", "dma_local", "full", "sliding", "query_topk", "ssd", "based", "dma_aged")
WINDOWED = ("dma", "dma_local", "dma_aged", "sliding", "query_topk")  # those that have a window to choose
BASED_WINDOW = 64
STATE, EXPAND, KERNEL = 128, 2, 4  # Mamba-2's
FEATURES = 16  # size of a query and a key before Based's feature map
CHUNK = 128  # positions that decayed_sums takes at once


def build(mixer: str, recipe: RecallRecipe) -> Any:
    """A fresh Doge of the recipe's sizes with this mixer in its layers."""
    if mixer == "dma_local" and recipe.keep_window_size:
        recipe = replace(recipe, local_window=recipe.keep_window_size // 4)
    if mixer == "dma_aged":
        recipe = replace(recipe, score_lifetime=float(max(recipe.lengths)))
    model = build_doge(recipe)
    for i, layer in enumerate(model.model.layers):
        if mixer in ("full", "sliding"):
            hold_scores(layer.self_attn)
        elif mixer == "query_topk":
            layer.self_attn = QueryTopK(model.config, i).apply(model._init_weights)
        elif mixer in ("ssd", "based"):
            layer.self_attn = (SSD if mixer == "ssd" else Based)(model.config, i)
        elif mixer not in ("dma", "dma_local", "dma_aged"):
            raise ValueError(f"mixer is {mixer!r}, expected one of {', '.join(MIXERS)}")
    return model


def hold_scores(attention: DogeAttention) -> DogeAttention:
    """Every score stays 1, whatever the token: A is zero, and is not learnt."""
    nn.init.zeros_(attention.A)
    attention.A.requires_grad_(False)
    attention.dt_proj.requires_grad_(False)
    return attention


class QueryTopK(DogeAttention):
    """Softmax over the ``keep_window_size`` keys of the prefix with the largest q·k."""

    def __init__(self, config: DogeConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.A, self.dt_proj

    def forward(self, hidden_states: torch.Tensor, q_angles: Any, **_: Any) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        B, T, _C = hidden_states.shape
        q, k, v = (p(hidden_states).view(B, T, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate(x.transpose(1, 2), q_angles) for x in (self.q_norm(q), self.k_norm(k)))
        # In float32, where hardly any two products tie: the w-th best then splits off w keys.
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = q.float(), k.float(), v.transpose(1, 2).float()
            future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
            products = (q @ k.mT / math.sqrt(self.head_dim)).masked_fill(future, -math.inf)
            if self.config.keep_window_size < T:
                best = products.detach().topk(self.config.keep_window_size, sorted=False).values
                products = products.masked_fill(products < best.amin(-1, keepdim=True), -math.inf)
            out = products.softmax(-1) @ v
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1)), None


class ShortConvolution(nn.Conv1d):
    """Every channel convolved with its last ``KERNEL`` positions: (B, T, C) → (B, T, C)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, KERNEL, groups=channels, padding=KERNEL - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(super().forward(x.mT)[..., : x.shape[1]].mT)


class SSD(nn.Module):
    """The state h_t = exp(A·dt_t)·h_{t−1} + dt_t·B_t·x_t, read as y_t = C_t·h_t + D·x_t; gated, normed, projected."""

    def __init__(self, config: DogeConfig, layer_idx: int):
        super().__init__()
        C, self.inner = config.hidden_size, EXPAND * config.hidden_size
        H = self.inner // min(64, self.inner // 2)  # heads of 64, but two at least
        self.in_proj = nn.Linear(C, 2 * self.inner + 2 * STATE + H, bias=False)
        self.convolution = ShortConvolution(self.inner + 2 * STATE)
        dt = torch.exp(torch.empty(H).uniform_(math.log(0.001), math.log(0.1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(H))
        self.norm = DogeRMSNorm(self.inner, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(self.inner, C, bias=False)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        B, T, _C = hidden_states.shape
        gate, mixed, dt = self.in_proj(hidden_states).split([self.inner, self.inner + 2 * STATE, len(self.D)], -1)
        x, key, query = self.convolution(mixed).split([self.inner, STATE, STATE], -1)
        x = x.view(B, T, len(self.D), -1)
        dt = F.softplus(dt.float() + self.dt_bias)
        key, query = (one[:, :, None].expand(-1, -1, len(self.D), -1) for one in (key, query))  # the same for all heads
        y = decayed_sums(query, key, x * dt[..., None], -self.A_log.exp() * dt) + self.D[:, None] * x
        return self.out_proj(self.norm(y.flatten(2) * F.silu(gate))), None


class Based(nn.Module):
    """Taylor linear attention over all keys and softmax over the last ``BASED_WINDOW``, added."""

    def __init__(self, config: DogeConfig, layer_idx: int):
        super().__init__()
        C, self.heads = config.hidden_size, config.num_attention_heads
        self.convolution = ShortConvolution(C)
        self.near = hold_scores(DogeAttention(config, layer_idx))
        self.q_proj = nn.Linear(C, self.heads * FEATURES, bias=False)
        self.k_proj = nn.Linear(C, self.heads * FEATURES, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)

    def forward(self, hidden_states: torch.Tensor, q_angles: Any, **_: Any) -> tuple[torch.Tensor, None]:
        B, T, _C = hidden_states.shape
        x = self.convolution(hidden_states)
        q, k, v = (p(x).view(B, T, self.heads, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        far = taylor_attention(q, k, v).flatten(2)
        return self.o_proj(far) + self.near(x, q_angles=q_angles)[0], None


def taylor_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention with weights 1 + s + s²/2, s = q·k/√K, that sum to 1: (B, T, H, K) twice and (B, T, H, V)."""
    q, k, v = q.float(), k.float(), v.float()
    ones = torch.ones_like(v[..., :1])  # their sum is what the weights sum to, at least half of their number
    nothing = torch.zeros_like(v[..., 0])
    total = decayed_sums(taylor_features(q), taylor_features(k), torch.cat([v, ones], -1), nothing)
    return total[..., :-1] / total[..., -1:]


def taylor_features(x: torch.Tensor) -> torch.Tensor:
    """φ with φ(q)·φ(k) = 1 + s + s²/2, s = q·k/√K: (…, K) → (…, 1 + K + K²)."""
    x = x / x.shape[-1] ** 0.25
    products = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), x, products], -1)


def decayed_sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
    """y_i = Σ_{j ≤ i} exp(Σ_{j < l ≤ i} log_decay_l) · (q_i·k_j) · v_j, in float32.

    Inside a chunk as a masked matrix product, between chunks through a state (K, V) of each: work O(T · (CHUNK + K)).

    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        log_decay: (B, T, H), at most 0.

    Returns:
        (B, T, H, V).
    """
    T, size = q.shape[1], min(CHUNK, q.shape[1])
    with torch.autocast(q.device.type, enabled=False):
        # (B, H, chunks, size, …); zeros behind the last position add nothing.
        q, k, v, g = (
            F.pad(x.float().transpose(1, 2), (0, 0, 0, -T % size)).unflatten(2, (-1, size))
            for x in (q, k, v, log_decay[..., None])
        )
        g = g[..., 0].cumsum(-1)  # from the start of the chunk
        lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
        decay = (g[..., :, None] - g[..., None, :]).masked_fill(~lower, -math.inf).exp()
        inside = (q @ k.mT * decay) @ v

        last = g[..., -1]  # (B, H, chunks), of a whole chunk
        added = (k * (last[..., None] - g).exp()[..., None]).mT @ v
        after = last.cumsum(-1)
        earlier = torch.ones(last.shape[-1], last.shape[-1], dtype=torch.bool, device=q.device).tril(-1)
        decay = ((after - last)[..., :, None] - after[..., None, :]).masked_fill(~earlier, -math.inf).exp()
        states = (decay @ added.flatten(-2)).view_as(added)  # what each chunk finds when it begins
        out = inside + (q * g.exp()[..., None]) @ states
        return out.flatten(2, 3)[:, :, :T].transpose(1, 2)
