"""Completing a prompt on the terminal, token by token, with transformers' own generation."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError


@dataclass
class GenerateRecipe:
    """A prompt, a model, and transformers' sampling options under their own names."""

    model: str = field(metadata={"help": "model folder"})
    prompt: str = field(default="", metadata={"help": "text to continue"})
    max_new_tokens: int = field(default=128, metadata={"help": "tokens to add at most"})
    do_sample: bool = field(default=True, metadata={"help": "sample; false takes the likeliest token each time"})
    temperature: float = field(default=0.7, metadata={"help": "below 1 sharper, above 1 flatter"})
    top_k: int = field(default=0, metadata={"help": "sample from the k likeliest tokens only; 0 for all"})
    top_p: float = field(default=0.9, metadata={"help": "sample from the likeliest tokens that make up this mass"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "above 1 makes repeating less likely"})
    seed: int | None = field(default=None, metadata={"help": "makes sampling repeatable"})
    stream: bool = field(default=True, metadata={"help": "print tokens as they come"})

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` is {self.max_new_tokens}, expected at least 1")
        if self.do_sample and self.temperature <= 0:
            raise ValueError(f"`temperature` is {self.temperature}, expected more than 0 (or --do_sample false)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}, expected more than 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"`repetition_penalty` is {self.repetition_penalty}, expected more than 0")


def generate(recipe: GenerateRecipe) -> str:
    """Print the prompt and its continuation, then tokens per second to stderr; returns the whole text.

    Raises:
        UserError: if the model or its tokenizer cannot be opened, or their vocabularies differ.
    """
    import sys

    import torch
    from transformers import TextStreamer, set_seed

    from ..data.tokenizer import load_tokenizer
    from ..models import load_model

    model: Any = load_model(recipe.model)
    tokenizer: Any = load_tokenizer(recipe.model)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {recipe.model} has {len(tokenizer):,} entries and its model {model.config.vocab_size:,}"
        )
    if recipe.seed is not None:
        set_seed(recipe.seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = tokenizer(recipe.prompt, return_tensors="pt").to(model.device)
    options: dict[str, Any] = {"max_new_tokens": recipe.max_new_tokens, "do_sample": recipe.do_sample}
    options["repetition_penalty"] = recipe.repetition_penalty
    if recipe.do_sample:
        options |= {"temperature": recipe.temperature, "top_k": recipe.top_k, "top_p": recipe.top_p}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if recipe.stream else None
    start = time.perf_counter()
    ids = model.generate(**inputs, streamer=streamer, **options)
    seconds = time.perf_counter() - start
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    if not recipe.stream:
        print(text)
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    print(f"{new} tokens, {new / seconds:.1f} tokens/s on {model.device.type}", file=sys.stderr)
    return text
