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
# Two CPU cores train it on a few million tokens in minutes.
SIZES["tiny"] = dict(zip(_FIELDS, (192, 512, 4, 4, 2), strict=True)) | {"max_position_embeddings": 256}


def config_for(size: str, **overrides: Any) -> DogeConfig:
    """The configuration of a size (`tiny`, `20m`, `60m`, `160m`, `320m`), embeddings tied, with fields overridden.

    Raises:
        UserError: if there is no such size.
    """
    if size.lower() not in SIZES:
        raise UserError(f"model size is {size!r}, expected one of {', '.join(SIZES)}")
    return DogeConfig(**{"tie_word_embeddings": True, **SIZES[size.lower()], **overrides})
