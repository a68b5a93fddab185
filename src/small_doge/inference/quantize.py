"""Weights of 16, 8 or 4 bits in a folder of their own, with what that costs: bits per byte of held-out text."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import artifacts
from ..errors import UserError
from ..recipe import plain

if TYPE_CHECKING:
    from .engine import Engine

FIGURE_FILE = "quantization.json"
_STAGE = "quantize"
_KEPT = ("config.json", "generation_config.json", "chat_template.jinja", "special_tokens_map.json")


@dataclass
class QuantizeRecipe:
    """A model, a precision, and a text to measure on."""

    model: str = field(metadata={"help": "model folder"})
    output_dir: str = field(metadata={"help": "folder to write, for `doge generate` and the engine"})
    precision: str = field(default="int8", metadata={"help": "bf16, int8 or int4"})
    data: str | None = field(default=None, metadata={"help": "measure on the validation split of this packed folder"})
    text: str | None = field(default=None, metadata={"help": "or on this text file, which should be new to the model"})
    context_length: int = field(default=512, metadata={"help": "tokens of a piece of text, each read by itself"})
    max_tokens: int = field(default=50_000, metadata={"help": "measure on so many tokens, evenly spread, at most"})
    threads: int | None = field(default=None, metadata={"help": "to measure with; null for one a core, 8 at most"})

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "int8", "int4"):
            raise ValueError(f"`precision` is {self.precision!r}, expected 'bf16', 'int8' or 'int4'")
        if (self.data is None) == (self.text is None):
            raise ValueError("expected one of `data` and `text`: quantised weights carry the figure of what they cost")
        if self.context_length < 2 or self.max_tokens < 2:
            raise ValueError("`context_length` and `max_tokens` are expected to be at least 2")


def quantize(recipe: QuantizeRecipe) -> Path:
    """Write ``recipe.output_dir``: packed weights, config, tokenizer, and ``quantization.json``, the figure.

    Raises:
        UserError: if the model or the text cannot be opened, the engine cannot run the model, or Numba is missing.
    """
    try:
        from .engine import Engine
        from .engine.pack import write
        from .engine.weights import PACKED_FILE, pack_model
    except ImportError as error:
        raise UserError(f"`doge quantize` needs Numba ({error}): pip install numba") from error
    from ..data.tokenizer import load_tokenizer
    from ..models import load_model

    settings = plain(recipe)
    output_dir = Path(recipe.output_dir)
    if artifacts.is_finished(output_dir, _STAGE, settings):
        print(f"{output_dir} is already finished")
        return output_dir
    start = time.perf_counter()
    tokenizer: Any = load_tokenizer(recipe.model)
    pieces = spread(list(texts(recipe, tokenizer)), recipe.context_length, recipe.max_tokens)
    model = load_model(recipe.model)
    figure: dict[str, Any] = {"precision": recipe.precision, "context_length": recipe.context_length}
    nats, size = {}, 0
    for precision in ("float32", recipe.precision):
        packed = pack_model(recipe.model, precision, model)
        size = len(packed.data)
        figure[f"{precision}_bytes"] = size
        engine = Engine(packed, recipe.threads)
        nats[precision] = total_nats(engine, pieces, f"{precision} reads")
        engine.close()
    length = sum(len(decoded(tokenizer, piece[1:])) for piece in pieces)
    if not length:
        raise UserError(f"the text of {recipe.data or recipe.text} is empty, expected some to measure on")
    figure |= {"tokens": sum(len(piece) - 1 for piece in pieces), "bytes": length}
    figure["bits_per_byte"] = {name: value / math.log(2) / length for name, value in nats.items()}
    figure["change"] = nats[recipe.precision] / nats["float32"] - 1
    artifacts.require_space(output_dir.parent, size, "the quantised model")
    with artifacts.staged(output_dir) as folder:
        write(packed, folder / PACKED_FILE)
        _copy_rest(Path(recipe.model), folder)
        artifacts.write_json(folder / FIGURE_FILE, figure)
        source = Path(recipe.model, artifacts.STAGE_FILE)
        of = artifacts.read_json(source).get("stage") if source.is_file() else None
        artifacts.finish(folder, _STAGE, settings, time.perf_counter() - start, of_stage=of, change=figure["change"])
    bits = figure["bits_per_byte"]
    print(
        f"{recipe.precision}: {size / 2**20:,.1f} MiB of {figure['float32_bytes'] / 2**20:,.1f}; bits per byte "
        f"{bits['float32']:.4f} → {bits[recipe.precision]:.4f}, {100 * figure['change']:+.3f} %, on "
        f"{figure['tokens']:,} tokens"
    )
    print(f"wrote {output_dir}")
    return output_dir


def texts(recipe: QuantizeRecipe, tokenizer: Any) -> Iterator[Sequence[int]]:
    """The token ids of each held-out document."""
    if recipe.data is not None:
        from ..data.packing import PackedTokens

        packed = PackedTokens(recipe.data, "validation")
        packed.check_tokenizer(recipe.model)
        for document in packed.documents():
            yield document.tolist()
        return
    assert recipe.text is not None
    try:
        yield tokenizer(Path(recipe.text).read_text(encoding="utf-8"))["input_ids"]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text {recipe.text} cannot be read: {error}") from error


def spread(documents: Iterable[Sequence[int]], length: int, most: int) -> list[Sequence[int]]:
    """Documents cut into pieces of ``length`` tokens; of these, evenly spread, as many as make up ``most`` tokens."""
    pieces = [
        ids[first : first + length] for ids in documents for first in range(0, len(ids), length) if len(ids) > first + 1
    ]
    step = max(1.0, sum(map(len, pieces)) / most)
    return [pieces[int(i * step)] for i in range(int(len(pieces) / step + 0.999)) if i * step < len(pieces)]


def total_nats(engine: Engine, pieces: Sequence[Sequence[int]], what: str = "") -> float:
    """−Σ log p of every token but the first of each piece, read by itself."""
    total, last = 0.0, time.perf_counter()
    for n, piece in enumerate(pieces):
        logits = engine.logits(piece[:-1]).astype(np.float64)
        picked = logits[np.arange(len(piece) - 1), np.asarray(piece[1:])]
        top = logits.max(-1)
        total += float((top + np.log(np.exp(logits - top[:, None]).sum(-1)) - picked).sum())
        if what and time.perf_counter() - last > 5:
            last = time.perf_counter()
            print(f"{what} piece {n + 1:,} of {len(pieces):,}", flush=True)
    return total


def decoded(tokenizer: Any, ids: Sequence[int]) -> bytes:
    """The UTF-8 bytes of tokens, special ones left out."""
    return tokenizer.decode(list(ids), skip_special_tokens=True).encode("utf-8")


def _copy_rest(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and (path.name in _KEPT or path.name.startswith("tokenizer")):
            shutil.copy2(path, folder / path.name)
