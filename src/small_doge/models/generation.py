"""transformers' ``generate``, with the cache of constant size."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode

from .cache import DynamicMaskCache


class DogeGenerationMixin(GenerationMixin):
    """``generate`` for Doge: where it would make a ``DynamicCache`` unasked, it makes a ``DynamicMaskCache``."""

    config: Any

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # Assisted generation takes tokens back, which a cache that drops keys cannot: it gets the one that grows.
        takes_back = generation_config.is_assistant or generation_mode == GenerationMode.ASSISTED_GENERATION
        asked = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None
        if asked or takes_back or generation_config.use_cache is False:
            choose: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
            choose(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        else:
            model_kwargs["past_key_values"] = DynamicMaskCache(self.config)
