"""What a checkpoint holds, read from its header before any tensor is."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from .configuration_doge import DogeConfig

logger = logging.get_logger(__name__)

# What says where on the Hub, or in its cache, a model is: keyword arguments of from_pretrained.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Tensor names of the first releases → today's.
FIRST_RELEASE_NAMES = {
    r"word_embed\.weight$": "embed_tokens.weight",
    r"final_layernorm\.weight$": "norm.weight",
    r"\.pre_layernorm\.weight$": ".input_layernorm.weight",
    r"\.pre_residual\.weight$": ".input_residual",
    r"\.post_layernorm\.weight$": ".post_attention_layernorm.weight",
    r"\.post_residual\.weight$": ".post_attention_residual",
    r"\.feed_forward\.": ".mlp.",
}


def stored_shapes(model: str | os.PathLike, options: dict[str, Any] | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a folder or Hub repository of safetensors; empty if it holds none.

    Args:
        model: a folder, or a repository's name.
        options: keyword arguments of ``from_pretrained``; those that say where to look are used.
    """
    options = options or {}
    where = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}

    def find(file_name: str) -> str | None:
        if os.path.isdir(model):
            path = Path(model, where.get("subfolder", ""), file_name)
            return str(path) if path.is_file() else None
        return cached_file(
            model,
            file_name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
            **where,
        )

    files = [find(SAFE_WEIGHTS_NAME)]
    if files == [None] and (index := find(SAFE_WEIGHTS_INDEX_NAME)):
        shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
        files = [find(shard) for shard in sorted(set(shards))]
    shapes: dict[str, tuple[int, ...]] = {}
    for file in filter(None, files):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def config_as_stored(model: str | os.PathLike, options: dict[str, Any]) -> DogeConfig | None:
    """A copy of a checkpoint's configuration that fits the tensors it holds; None if it holds no safetensors.

    Warns once if its experts were trained by code that routes a token by the scores of others.

    Args:
        model: a folder, or a repository's name.
        options: keyword arguments of ``from_pretrained``, of which ``config`` is taken out.
    """
    shapes = stored_shapes(model, options)
    if not shapes:
        return None
    config = options.pop("config", None)
    if not isinstance(config, DogeConfig):
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        config = DogeConfig.from_pretrained(config or model, **hub)
    config = copy.deepcopy(config)
    A = [shape for name, shape in shapes.items() if name.endswith("self_attn.A")]
    if A:
        config.mask_heads = A[0][0]
        config.qk_norm = any(name.endswith("self_attn.q_norm.weight") for name in shapes)
    if config.is_moe and not config.router_per_token:
        logger.warning_once(
            f"the config of {model} does not say that its experts were trained with routing per token, and published "
            "code routes a token by the scores of others too; here each is routed by its own scores alone, so outputs "
            "differ from those the model was trained to give until it is trained on"
        )
        config.router_per_token = True  # so it is routed from here on, and so a folder saved from here says
    return config
