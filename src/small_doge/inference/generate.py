"""Completing a prompt on the terminal, token by token: with our engine on a CPU, with transformers elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from .engine import Engine

# As in the engine, which cannot be asked where Numba is not.
PRECISIONS = ("float32", "bf16", "int8", "int4")
PACKED_FILE = "weights.doge"


@dataclass
class GenerateRecipe:
    """A prompt, a model, and transformers' sampling options under their own names."""

    model: str = field(metadata={"help": "model folder, or one that `doge quantize` wrote"})
    prompt: str = field(default="", metadata={"help": "text to continue"})
    max_new_tokens: int = field(default=128, metadata={"help": "tokens to add at most"})
    do_sample: bool = field(default=True, metadata={"help": "sample; false takes the likeliest token each time"})
    temperature: float = field(default=0.7, metadata={"help": "below 1 sharper, above 1 flatter"})
    top_k: int = field(default=0, metadata={"help": "sample from the k likeliest tokens only; 0 for all"})
    top_p: float = field(default=0.9, metadata={"help": "sample from the likeliest tokens that make up this mass"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "above 1 makes repeating less likely"})
    seed: int | None = field(default=None, metadata={"help": "makes sampling repeatable"})
    stream: bool = field(default=True, metadata={"help": "print tokens as they come"})
    precision: str = field(
        default="auto", metadata={"help": "of weights on a CPU: float32, bf16, int8, int4, or auto, as they are stored"}
    )
    threads: int | None = field(default=None, metadata={"help": "on a CPU; null for one a core, 8 at most"})

    def __post_init__(self) -> None:
        check_sampling(self)


def check_sampling(recipe: Any) -> None:
    """Raise ValueError if a field that says how to sample is out of range."""
    if recipe.max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` is {recipe.max_new_tokens}, expected at least 1")
    if recipe.do_sample and recipe.temperature <= 0:
        raise ValueError(f"`temperature` is {recipe.temperature}, expected more than 0 (or --do_sample false)")
    if not 0 < recipe.top_p <= 1:
        raise ValueError(f"`top_p` is {recipe.top_p}, expected more than 0 and at most 1")
    if recipe.top_k < 0:
        raise ValueError(f"`top_k` is {recipe.top_k}, expected 0 or more")
    if recipe.repetition_penalty <= 0:
        raise ValueError(f"`repetition_penalty` is {recipe.repetition_penalty}, expected more than 0")
    if recipe.threads is not None and recipe.threads < 1:
        raise ValueError(f"`threads` is {recipe.threads}, expected at least 1")


def generate(recipe: GenerateRecipe) -> str:
    """Print the prompt and its continuation, then tokens per second to stderr; returns the whole text.

    Raises:
        UserError: if the model or its tokenizer cannot be opened, or their vocabularies differ.
    """
    engine = open_engine(recipe.model, recipe.precision, recipe.threads)
    if engine is None:
        return _with_transformers(recipe)
    return _with_engine(recipe, engine)


def open_engine(
    model: str, precision: str = "auto", threads: int | None = None, say: Callable[[str], Any] | None = None
) -> Engine | None:
    """The engine of a model folder, or None where transformers has to run it, the reason said in one sentence.

    That is where a GPU is there and no precision was asked for, Numba is not, or the model is not one it runs.

    Args:
        say: takes the sentence; by default it goes to stderr.

    Raises:
        UserError: if the folder cannot be opened, or holds quantised weights, which nothing else can run.
    """
    say = say or (lambda sentence: print(sentence, file=sys.stderr))
    if precision not in ("auto", *PRECISIONS):
        raise UserError(f"precision is {precision!r}, expected auto, {', '.join(PRECISIONS)}")
    quantised = Path(model, PACKED_FILE).is_file()
    if precision == "auto" and not quantised and shutil.which("nvidia-smi"):  # torch takes seconds to say so
        import torch

        if torch.cuda.is_available():
            return None
    try:
        from .engine import Engine, Unsupported
    except ImportError as error:
        if quantised:
            raise UserError(
                f"{model} holds quantised weights, which need Numba ({error}): pip install numba"
            ) from error
        say(f"generating with transformers in float32, several times slower: Numba is not here ({error})")
        return None
    try:
        return Engine.open(model, precision, threads)
    except Unsupported as error:
        say(f"generating with transformers: the engine cannot run {model} ({error})")
        return None


def _with_engine(recipe: GenerateRecipe, engine: Engine) -> str:
    from .engine import Sampling
    from .engine.text import Tokenizer

    tokenizer = Tokenizer(recipe.model)
    _check_vocabulary(recipe.model, tokenizer.size, engine.shape.vocabulary)
    sampling = Sampling(
        recipe.temperature if recipe.do_sample else 0.0,
        recipe.top_k if recipe.do_sample else 0,
        recipe.top_p if recipe.do_sample else 1.0,
        recipe.repetition_penalty,
    )
    ids = tokenizer.encode(recipe.prompt)
    if not ids:
        raise UserError("the prompt is empty and the tokenizer adds no begin token, expected some text")
    start = first = time.perf_counter()
    tokens: list[int] = []

    def counted() -> Iterator[int]:
        nonlocal first
        options: dict[str, Any] = {"max_new_tokens": recipe.max_new_tokens, "sampling": sampling, "seed": recipe.seed}
        for token in engine.generate(ids, **options):
            first = first if tokens else time.perf_counter()
            tokens.append(token)
            yield token

    if recipe.stream:
        stream = tokenizer.stream()
        print(tokenizer.decode(ids), end="", flush=True)
        for token in counted():
            print(stream.push(token), end="", flush=True)
        print(stream.end())
    else:
        list(counted())
    seconds = time.perf_counter() - first
    text = tokenizer.decode([*ids, *tokens])
    if not recipe.stream:
        print(text)
    how = f"cpu, {engine.precision}, {engine.threads} thread{'s' * (engine.threads > 1)}"
    # The first token waits for the prompt and for compiled code to load; the others come at the speed of the engine.
    rate = f", then {(len(tokens) - 1) / max(seconds, 1e-9):,.1f} tokens/s" if len(tokens) > 1 else ""
    print(f"{len(tokens)} tokens, the first after {first - start:.2f} s{rate} on {how}", file=sys.stderr)
    return text


def _with_transformers(recipe: GenerateRecipe) -> str:
    import torch
    from transformers import TextStreamer, set_seed

    from ..data.tokenizer import load_tokenizer
    from ..models import load_causal_lm

    model: Any = load_causal_lm(recipe.model)
    tokenizer: Any = load_tokenizer(recipe.model)
    _check_vocabulary(recipe.model, len(tokenizer), model.config.vocab_size)
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


def _check_vocabulary(model: str, tokenizer: int, vocabulary: int) -> None:
    if tokenizer > vocabulary:
        raise UserError(f"the tokenizer of {model} has {tokenizer:,} entries and its model {vocabulary:,}")
