"""Configuration of the Doge model, field for field that of transformers' Doge, plus what its first releases need."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig


class DogeConfig(PreTrainedConfig):
    """What a Doge model is made of.

    Fields shared with transformers' ``DogeConfig`` keep its names *and its defaults*: a ``config.json`` leaves out
    what equals the default, so another default would read the same file as another model.

    Args:
        vocab_size: entries of the token embedding.
        hidden_size: width C of the hidden states.
        intermediate_size: width of the SwiGLU.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads H.
        num_key_value_heads: key/value heads G; H must be a multiple. None means H.
        head_dim: size D of a head; None means ``hidden_size / num_attention_heads``.
        keep_window_size: how many keys a query keeps, w (Dynamic Mask Attention).
        local_window: the last ``local_window`` keys stay visible whatever their score; 0 is the published behaviour.
        score_lifetime: tokens of age that a score higher by 1 makes up for, so that the window lets go of what is old
            unless it scores better; None, the published behaviour, is for ever. For texts longer than the window.
        qk_norm: RMSNorm on q and k, as in transformers 5; False for checkpoints of the first releases.
        mask_heads: heads that A and Wdt give scores for: G (None means that), or H in the first releases.
        max_position_embeddings: trained length; RoPE scaling of type ``dynamic`` starts beyond it.
        rope_parameters: transformers' RoPE parameters, such as ``{"rope_type": "default", "rope_theta": 10000.0}``.
        chunk_size_feed_forward: tokens of a batch that the SwiGLU takes at a time, computed again in the backward pass:
            less memory for more time; 0 takes all at once.
        is_moe: a Cross Domain Mixture of Experts beside the SwiGLU of every layer.
        num_experts: experts N of a layer, a perfect square K².
        num_experts_per_tok: experts k that a token is sent to.
        norm_topk_prob: divide the weights of the k by their sum, which is 1 already.
        output_router_logits: return the router's logits and the balance loss outside of training too.
        router_aux_loss_coef: what the balance loss is multiplied by before the training loss takes it in.
        router_per_token: whether the weights were made for routing by a token's own scores, which is how this model
            always routes. False only as read from a file that does not say: transformers' Doge mixes tokens.

    Raises:
        ValueError: if sizes are not positive or do not divide, if ``mask_heads`` is neither G nor H, for a
            ``sliding_window`` (the window is ``keep_window_size``), or for a ``dynamic_mask_ratio`` other than 0 (the
            first release then ranked future keys too, which no causal model can reproduce). With ``is_moe``: if
            ``num_experts`` is not a square, k is not between 1 and N, or ``hidden_act`` is not silu.
    """

    model_type = "doge"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers reads a list

    vocab_size: int = 32768
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 32
    hidden_dropout: float | int = 0.0
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-06
    use_cache: bool = True
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    rope_parameters: Any = None
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_dropout: float | int | None = 0.0
    mlp_bias: bool = False
    sliding_window: int | None = None
    keep_window_size: int = 2048
    local_window: int = 0
    score_lifetime: float | int | None = None
    qk_norm: bool = True
    mask_heads: int | None = None
    is_moe: bool = False
    num_experts: int = 16384
    num_experts_per_tok: int = 64
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_per_token: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # The first releases wrote one switch for all biases, and a ratio of keys to mask.
        if kwargs.pop("hidden_bias", False):
            self.attention_bias = self.mlp_bias = True
        ratio = kwargs.pop("dynamic_mask_ratio", 0.0)
        if ratio:
            raise ValueError(
                f"dynamic_mask_ratio is {ratio}, expected 0: any other value let the first release look at future keys"
            )
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self._check()
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.mask_heads = self.mask_heads or self.num_key_value_heads
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' ``from_dict``, through which files are read: experts of a file that does not say how they are
        routed were trained by code that mixes tokens."""
        if config_dict.get("is_moe"):
            config_dict = {"router_per_token": False, **config_dict}
        return super().from_dict(config_dict, **kwargs)

    @property
    def num_keys(self) -> int:
        """K = √N, the router's keys on each of its two axes."""
        return math.isqrt(self.num_experts)

    @property
    def heads(self) -> tuple[int, int, int, int]:
        """H query heads, G key/value heads, M score heads, and the size D of a head."""
        G, M, D = self.num_key_value_heads, self.mask_heads, self.head_dim
        return self.num_attention_heads, G, M, D  # type: ignore[return-value]  # set when the config was made

    def _check(self) -> None:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*names, "num_key_value_heads", "keep_window_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        H, G = self.num_attention_heads, self.num_key_value_heads or 1
        if self.head_dim is None and self.hidden_size % H:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {H}")
        if (self.head_dim or self.hidden_size // H) % 2:
            raise ValueError(f"head_dim is {self.head_dim or self.hidden_size // H}, expected an even number for RoPE")
        if H % G:
            raise ValueError(f"num_attention_heads {H} is not a multiple of num_key_value_heads {G}")
        if self.mask_heads not in (None, G, H):
            raise ValueError(f"mask_heads is {self.mask_heads}, expected {G} (key/value heads) or {H} (query heads)")
        if self.local_window < 0:
            raise ValueError(f"local_window is {self.local_window}, expected 0 or more")
        if self.score_lifetime is not None and not 1 <= self.score_lifetime <= 1e9:
            raise ValueError(f"score_lifetime is {self.score_lifetime}, expected 1 to 1e9 tokens, or null")
        if self.chunk_size_feed_forward < 0:
            raise ValueError(f"chunk_size_feed_forward is {self.chunk_size_feed_forward}, expected 0 or more")
        if self.sliding_window is not None:
            raise ValueError(f"sliding_window is {self.sliding_window}, expected null: keep_window_size is the window")
        if self.is_moe:
            self._check_experts()

    def _check_experts(self) -> None:
        N, k, K = self.num_experts, self.num_experts_per_tok, max(math.isqrt(max(self.num_experts, 0)), 1)
        if K * K != N:
            raise ValueError(f"num_experts is {N}, expected a perfect square such as {K**2} or {(K + 1) ** 2}")
        if not 1 <= k <= N:
            raise ValueError(f"num_experts_per_tok is {k}, expected 1 to {N}, the number of experts")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act is {self.hidden_act!r}, expected 'silu' with is_moe: experts have no other")
