"""The Doge model on transformers' building blocks, with the tensor names of transformers' own Doge.

Shape suffixes: B rows, T new tokens, Tk keys with those in the cache, C hidden, H query heads, G key/value heads,
M score heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
)

from ..ops.gpu import dtype_of_products
from ..ops.linear_cross_entropy import IGNORED, linear_cross_entropy
from ..ops.residual import Stream, add_update, can_norm_and_carry, norm_and_carry
from .attention import DogeAttention, DogeRMSNorm
from .cache import DynamicMaskCache
from .checkpoints import FIRST_RELEASE_NAMES, config_as_stored
from .configuration_doge import DogeConfig
from .generation import DogeGenerationMixin
from .masks import visibility
from .moe import DogeCDMoE, DogeMLP, DogeMoEModelOutput
from .projections import listened_to, plain
from .rotary import rotary_angles, text_length

Rest = tuple[torch.Tensor, ...]  # of a Stream, all but its first


def whole(hidden_states: torch.Tensor, rest: Rest | None) -> torch.Tensor:
    """What a layer has left, (…, C), with all its bits."""
    return hidden_states if rest is None else Stream(hidden_states, *rest).whole()


class DogeDecoderLayer(GradientCheckpointingLayer):
    """h ← r₁·h + attention(norm h);  h ← r₂·h + mlp(norm h), with learnable per-channel residual weights r₁, r₂."""

    def __init__(self, config: DogeConfig, layer_idx: int):
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = DogeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DogeAttention(config, layer_idx)
        self.input_residual = nn.Parameter(torch.ones(config.hidden_size))
        self.post_attention_layernorm = DogeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = DogeCDMoE(config) if config.is_moe else DogeMLP(config)
        self.post_attention_residual = nn.Parameter(torch.ones(config.hidden_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        counted: torch.Tensor | None = None,
        balanced: bool = False,
        rest: Rest | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Rest | None]:
        """(B, T, C) → (B, T, C), attention weights if asked for, and of experts the router's logits and balance loss.

        ``counted`` and ``balanced`` are those of :class:`DogeCDMoE`, the rest is for :class:`DogeAttention`. All that
        a layer finds out is returned, not kept: with gradient checkpointing it runs twice. Where a layer leaves its
        norms to products, it returns hidden states to the nearest of 16 bits, and last ``rest``, what else there is of
        them.
        """
        if self._in_products(hidden_states, rest, kwargs.get("past_key_values")):
            eps = self.self_attn.config.rms_norm_eps
            stream = Stream.of(hidden_states, eps) if rest is None else Stream(hidden_states, *rest)
            norm, scale = self.input_layernorm.weight, self.input_residual
            given = {name: kwargs[name] for name in ("q_angles", "visible", "output_attentions")}
            stream, weights = self.self_attn.into_stream(stream, norm, scale, **given)
            norm, scale = self.post_attention_layernorm.weight, self.post_attention_residual
            hidden_states, *found = self.mlp.into_stream(stream, norm, scale, eps)
            return hidden_states, weights, None, None, tuple(found)
        hidden_states = whole(hidden_states, rest)
        normed, carried = add_norm_and_scale(hidden_states, None, self.input_layernorm, self.input_residual)
        attended, weights = self.self_attn(normed, **kwargs)
        attended = F.dropout(attended, p=self.hidden_dropout, training=self.training)
        normed, carried = add_norm_and_scale(
            carried, attended, self.post_attention_layernorm, self.post_attention_residual
        )
        router_logits = loss = None
        if isinstance(self.mlp, DogeCDMoE):
            transformed, router_logits, loss = self.mlp(normed, counted, balanced)
        else:
            transformed = self.mlp(normed)
        transformed = F.dropout(transformed, p=self.hidden_dropout, training=self.training)
        if norms_in_kernel(carried, self.post_attention_layernorm, self.post_attention_residual):
            hidden_states = add_update(carried, transformed)
        else:
            hidden_states = (carried + transformed).to(hidden_states.dtype)
        return hidden_states, weights, router_logits, loss, None

    def _in_products(self, x: torch.Tensor, rest: Rest | None, cache: Cache | None) -> bool:
        """Whether attention and SwiGLU can leave their norms, and adding to the stream x in float32, to products."""
        mlp, norms = self.mlp, (self.input_layernorm, self.post_attention_layernorm)
        # What checkpointing computes again with gradients it computes once without.
        trains = torch.is_grad_enabled() or (self.gradient_checkpointing and self.training)
        if not trains or cache is not None or (rest is None and x.dtype != torch.float32) or listened_to(self):
            return False
        if type(mlp) is not DogeMLP or mlp.chunk_size or listened_to(mlp) or (self.training and self.hidden_dropout):
            return False
        if not mlp.in_products(x) or dtype_of_products(x) != torch.bfloat16:  # float16 has no room for all of a stream
            return False
        return all(plain(norm, DogeRMSNorm) for norm in norms) and self.self_attn.in_products(x)


def norms_in_kernel(x: torch.Tensor, norm: DogeRMSNorm, scale: torch.Tensor) -> bool:
    """Whether :func:`norm_and_carry` can stand for ``norm``: then the gradient of the stream x has 16 bits."""
    return plain(norm, DogeRMSNorm) and can_norm_and_carry(x, norm.weight, scale)


def add_norm_and_scale(
    x: torch.Tensor, update: torch.Tensor | None, norm: DogeRMSNorm, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(…, C) each: ``norm`` of y = x + ``update``, and scale · y, what the residual stream carries on."""
    if norms_in_kernel(x, norm, scale):
        assert norm.eps is not None
        return norm_and_carry(x, update, norm.weight, scale, norm.eps)
    y = x if update is None else (x + update).to(x.dtype)
    return norm(y), (scale * y).to(y.dtype)


class DogePreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the Doge models."""

    config: DogeConfig
    config_class = DogeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DogeDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # A zero A makes every score 1: Dynamic Mask Attention starts its life as a sliding window.
        constants = {"A": 0.0, "input_residual": 1.0, "post_attention_residual": 1.0}
        for name, parameter in module.named_parameters(recurse=False):
            if name in constants:
                init.constant_(parameter, constants[name])  # leaves alone what from_pretrained has loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``from_pretrained``, which also opens checkpoints of the first releases.

        Those have other tensor names, no q and k norm, and A and Wdt per query head. Names are translated, and
        ``qk_norm`` and ``mask_heads`` are set from the shapes stored in the file, whatever its config says. Experts
        that published code trained are opened with a warning, see ``router_per_token`` of :class:`DogeConfig`.
        """
        config = config_as_stored(pretrained_model_name_or_path, kwargs)
        if config is not None:
            kwargs["config"] = config
            kwargs.setdefault("key_mapping", FIRST_RELEASE_NAMES)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class DogeModel(DogePreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([DogeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = DogeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | DogeMoEModelOutput | tuple:
        """Run the decoder.

        Args:
            input_ids: (B, T) int64; or ``inputs_embeds`` (B, T, C).
            attention_mask: (B, Tk), 0 for padding, over the tokens in the cache and the new ones; or (B or 1, 1, T, Tk)
                bool, or 0 and −∞, which then says alone what is seen. See :func:`small_doge.models.masks.visibility`.
            position_ids: (B, T) int64. Where they restart within a row, another document begins, and neither sees
                the other.
            past_key_values: ``DynamicMaskCache``, of constant size, which is also made where none is given; or a
                cache that grows, such as ``DynamicCache``, with the same output.
            output_router_logits: of a model with experts, return each layer's logits (B·T, 2K), and in ``aux_loss`` how
                unevenly the experts are used (1: evenly), which is there in training anyway. Padding does not count.

        Raises:
            ValueError: for both or neither of ids and embeddings, an attention mask of another shape or with other
                values, or a cache that was made for another model or for static shapes.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False  # the forward pass runs twice, and would fill the cache twice
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicMaskCache(config)
        if isinstance(past_key_values, DynamicMaskCache):
            past_key_values.check(config)
        elif past_key_values is not None and past_key_values.is_compileable:
            kind = type(past_key_values).__name__
            raise ValueError(f"past_key_values is a {kind}, expected DynamicMaskCache or a cache that grows")

        T = inputs_embeds.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        visible = visibility(inputs_embeds, past, attention_mask, position_ids)
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=inputs_embeds.device)[None]
        length = text_length(config, position_ids)
        q_angles = rotary_angles(config, position_ids, inputs_embeds.dtype, length)
        k_angles = None
        if past_key_values is not None and length is not None and not isinstance(past_key_values, DynamicMaskCache):
            # Positions of all keys, counted back from the newest: a row's real tokens are contiguous in its cache.
            back = torch.arange(past + T, device=inputs_embeds.device) - (past + T - 1)
            k_angles = rotary_angles(config, (position_ids[:, -1:] + back).clamp(min=0), inputs_embeds.dtype, length)

        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        balanced = config.is_moe and bool(self.training or output_router_logits)
        hidden_states, rest = inputs_embeds, None
        all_hidden, all_weights, all_router_logits, losses = [], [], [], []
        for layer in self.layers:
            all_hidden.append(whole(hidden_states, rest)) if output_hidden_states else None
            if listened_to(layer):
                hidden_states, rest = whole(hidden_states, rest), None
            hidden_states, weights, router_logits, loss, rest = layer(
                hidden_states,
                rest=rest,
                counted=None if visible.key_mask is None else visible.key_mask[:, -T:],
                balanced=balanced,
                q_angles=q_angles,
                k_angles=k_angles,
                positions=position_ids,
                length=length,
                visible=visible,
                past_key_values=past_key_values,
                output_attentions=bool(output_attentions),
            )
            all_weights.append(weights) if output_attentions else None
            all_router_logits.append(router_logits) if output_router_logits else None
            losses.append(loss)
        hidden_states = self.norm(whole(hidden_states, rest))
        all_hidden.append(hidden_states) if output_hidden_states else None

        found: dict[str, Any] = {
            "last_hidden_state": hidden_states,
            "past_key_values": past_key_values,
            "hidden_states": tuple(all_hidden) if output_hidden_states else None,
            "attentions": tuple(all_weights) if output_attentions else None,
        }
        if config.is_moe:
            found["router_logits"] = tuple(all_router_logits) if output_router_logits else None
            found["aux_loss"] = torch.stack(losses).mean() if balanced else None
        output = DogeMoEModelOutput(**found) if config.is_moe else BaseModelOutputWithPast(**found)
        return output.to_tuple() if return_dict is False else output


class DogeForCausalLM(DogePreTrainedModel, DogeGenerationMixin):
    """Doge with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DogeConfig):
        super().__init__(config)
        self.model = DogeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self._keys_to_ignore_on_save = {"lm_head.weight"}  # the Trainer would otherwise miss it on resuming
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast | tuple:
        """As :meth:`DogeModel.forward`, and logits (B, T', vocab), T' being T or what ``logits_to_keep`` asks for.

        In training, and only there, the loss of a model with experts has ``router_aux_loss_coef`` · ``aux_loss`` in it.

        Args:
            labels: (B, T) int64; the loss at t is that of labels[t + 1], and −100 marks what carries none. The mean
                over labelled tokens, or their sum over ``num_items_in_batch`` where the Trainer passes it.
            logits_to_keep: how many of the last positions to compute logits for (0: all), or an index tensor.
            skip_logits: with ``labels``, compute the loss in chunks and return no logits: less time and memory.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = loss = None
        if labels is not None and skip_logits:
            loss = self._loss_in_chunks(outputs.last_hidden_state, labels, kwargs.get("num_items_in_batch"))
        else:
            logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        if labels is not None and logits is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        if labels is not None and loss is not None and self.training and self.config.is_moe:
            loss = loss + self._balance_term(outputs.aux_loss, labels, kwargs.get("num_items_in_batch"))
        found = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        kind = MoeCausalLMOutputWithPast if self.config.is_moe else CausalLMOutputWithPast
        output = kind(loss=loss, logits=logits, **found)
        return output.to_tuple() if return_dict is False else output

    def _balance_term(
        self, aux_loss: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """What the training loss takes in of the balance loss.

        Where micro-batches add up to one step, each counts by its share of the step's labelled tokens, as its
        cross-entropy does, so that the step sees their mean and not their sum.
        """
        share = 1.0 if num_items is None else (labels[:, 1:] != IGNORED).sum() / num_items
        return self.config.router_aux_loss_coef * share * aux_loss

    def _loss_in_chunks(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The loss of :meth:`forward` from (B, T, C) hidden states, without (B, T, vocab) logits."""
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # whole rows: a slice would be a copy
        denominator = (following != IGNORED).sum().clamp(min=1) if num_items is None else num_items
        return linear_cross_entropy(hidden_states.flatten(0, 1), self.lm_head.weight, following, denominator)


class DogeForSequenceClassification(GenericForSequenceClassification, DogePreTrainedModel):
    """Doge with a classification head on the last token that is not padding."""
