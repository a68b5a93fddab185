"""The sizes Doge is published in, in one table, and `tiny` for a laptop."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .configuration_doge import DogeConfig

# hidden / intermediate / layers / heads / key-value heads; head size 128, as published (github.com/SmallDoges).
_PUBLISHED = {
    "20m": (256, 512, 8, 2, 1),
    "60m": (512, 1024, 16, 4, 2),
    "160m": (768, 1536, 24, 6, 3),
    "320m": (1024, 2048, 32, 8, 4),
}
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")

SIZES: dict[str, dict[str, Any]] = {name: dict(zip(_FIELDS, row, strict=True)) for name, row in _PUBLISHED.items()}
# A dense size, experts N of a layer, experts k of a token, under the published names.
_EXPERTS = {
    "40m-moe": ("20m", 1024, 8),
    "180m-moe": ("60m", 4096, 16),
    "600m-moe": ("160m", 9216, 24),
    "1.6b-moe": ("320m", 16384, 32),
}
for _name, (_dense, _N, _k) in _EXPERTS.items():
    SIZES[_name] = SIZES[_dense] | {"is_moe": True, "num_experts": _N, "num_experts_per_tok": _k}
# Two CPU cores train it on a few million tokens in minutes.
SIZES["tiny"] = dict(zip(_FIELDS, (192, 512, 4, 4, 2), strict=True)) | {"max_position_embeddings": 256}


def config_for(size: str, **overrides: Any) -> DogeConfig:
    """The configuration of a size such as `tiny`, `320m` or `1.6b-moe`, embeddings tied, with fields overridden.

    Raises:
        UserError: if there is no such size.
    """
    if size.lower() not in SIZES:
        raise UserError(f"model size is {size!r}, expected one of {', '.join(SIZES)}")
    return DogeConfig(**{"tie_word_embeddings": True, **SIZES[size.lower()], **overrides})
