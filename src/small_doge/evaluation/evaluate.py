"""The evaluation stage: a model on held-out text, beside a compressor and an n-gram model of the same text.

With ``suite`` the stage asks the model the questions of published tasks instead (``suite_run``).
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import artifacts
from ..errors import UserError
from ..recipe import plain

STAGE = "evaluate"
RESULTS_FILE = "results.json"
EXPERTS_FILE = "expert_use.npy"
NGRAM_ORDER = 5
# The baselines learn from the first 48 MiB of the training text: with the held-out text behind it, that is what the
# 64 MiB dictionary of xz -9 reaches, and counting it takes about 1 GB of memory.
BASELINE_BYTES = 48 << 20
_TEXT_SETTINGS = ("context_length", "baselines", "max_documents")


@dataclass
class EvaluateRecipe:
    """What to evaluate: on held-out text (``data``), or on the tasks of a suite."""

    model: str = field(metadata={"help": "folder of the model and its tokenizer"})
    data: str | None = field(
        default=None, metadata={"help": "folder of prepared data; its validation split is the held-out text"}
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "folder for results.json (default, with a suite: evaluation/SUITE in the model)"},
    )
    context_length: int | None = field(
        default=None, metadata={"help": "tokens the model reads at once (default: the data's row length; the model's)"}
    )
    batch_size: int = field(default=8, metadata={"help": "windows of text a step; lower it if memory runs out"})
    baselines: bool = field(default=True, metadata={"help": "also measure xz -9 and an order-5 n-gram model"})
    max_documents: int | None = field(
        default=None, metadata={"help": "evaluate only the first so many held-out documents (default: all)"}
    )
    suite: str | None = field(default=None, metadata={"help": "doge-base or doge-instruct: tasks instead of text"})
    tasks: str | list | None = field(
        default=None, metadata={"help": "some of the suite's tasks, as mmlu,piqa or a list (default: all)"}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "folder of the tasks' rows, TASK/SPLIT.jsonl (default: the Hub)"}
    )
    num_fewshot: int | None = field(
        default=None, metadata={"help": "examples before each question (default: the suite's, 5)"}
    )
    limit: int | None = field(
        default=None, metadata={"help": "only the first so many questions of each task, for a trial (default: all)"}
    )
    tokens_per_batch: int | None = field(
        default=None, metadata={"help": "tokens of a suite's requests a step; lower it if memory runs out"}
    )
    device: str | None = field(
        default=None, metadata={"help": "of a suite: cpu or cuda (default: a GPU if there is one)"}
    )
    compare: str | list | None = field(
        default=None, metadata={"help": "folders evaluated before, as one,two or a list: further rows of the table"}
    )

    def __post_init__(self) -> None:
        for name in ("context_length", "batch_size", "max_documents", "limit", "tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"field `{name}` is {value}, expected at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"field `num_fewshot` is {self.num_fewshot}, expected at least 0")
        if bool(self.suite) == bool(self.data):
            found = "both" if self.suite else "neither"
            raise ValueError(f"found {found} of `data` (bits per byte of its text) and `suite` (tasks), expected one")
        if self.data and not self.output_dir:
            raise ValueError("`output_dir` is not set: the folder for results.json")

    def task_names(self) -> list[str]:
        """The names in ``tasks``."""
        return _names(self.tasks)

    def compared_folders(self) -> list[str]:
        """The folders in ``compare``."""
        return _names(self.compare)


def _names(value: str | list | None) -> list[str]:
    parts = value.split(",") if isinstance(value, str) else value or []
    return [str(part).strip() for part in parts if str(part).strip()]


def evaluate(recipe: EvaluateRecipe) -> Path:
    """Measure ``recipe.model``: on the tasks of ``recipe.suite`` if one is named, else on held-out text.

    Returns:
        The path of ``results.json``.

    Raises:
        UserError: what :func:`measure_text` and :func:`suite_run.evaluate_suite` raise.
    """
    if recipe.suite:
        from .suite_run import evaluate_suite

        return evaluate_suite(recipe)
    return measure_text(recipe)


def measure_text(recipe: EvaluateRecipe) -> Path:
    """Measure ``recipe.model`` on held-out text, write ``results.json`` and print a table.

    The file holds ``bits_per_byte`` (of the model and of each baseline), ``bytes``, ``documents`` and ``tokens`` of
    the held-out text, ``loss`` in nats per token, ``context_length``, and ``seconds`` each part took. Of a model with
    experts it also has ``expert_use``, what :func:`expert_use.summary` says of each layer, and beside it lies
    ``expert_use.npy``, how often each expert was chosen, (layers, experts). A folder that holds these very results
    already is left as it is.

    Returns:
        The path of ``results.json``.

    Raises:
        UserError: if the model or the data cannot be read, do not belong together, or the output folder is taken.
    """
    assert recipe.data is not None  # the recipe has seen to it
    assert recipe.output_dir is not None
    begun = time.perf_counter()
    output_dir = Path(recipe.output_dir)
    weights, manifest = Path(recipe.model) / "model.safetensors", Path(recipe.data) / "manifest.json"
    for path, what in ((weights, "model"), (manifest, "prepared data")):
        if not path.is_file():
            raise UserError(f"{path.parent} holds no {what}: {path.name} is not there")
    # What decides the figures is what the folders hold, not where they are, nor how many windows share a step.
    settings = {name: value for name, value in plain(recipe).items() if name in _TEXT_SETTINGS}
    settings |= {"model_sha256": artifacts.sha256(weights), "data_sha256": artifacts.sha256(manifest)}
    if artifacts.is_finished(output_dir, STAGE, settings):
        print(f"{output_dir / RESULTS_FILE} is there already")
        print(table(artifacts.read_json(output_dir / RESULTS_FILE)))
        return output_dir / RESULTS_FILE

    results, counts = _measure(recipe)
    with artifacts.staged(output_dir) as folder:
        artifacts.write_json(folder / RESULTS_FILE, results)
        if counts is not None:
            np.save(folder / EXPERTS_FILE, counts)
        facts = {"model": recipe.model, "data": recipe.data}
        artifacts.finish(folder, STAGE, settings, time.perf_counter() - begun, **facts)
    print(table(results))
    print(f"wrote {output_dir / RESULTS_FILE}")
    return output_dir / RESULTS_FILE


def _measure(recipe: EvaluateRecipe) -> tuple[dict[str, Any], np.ndarray | None]:
    """The content of results.json, and of a model with experts how often each was chosen."""
    from ..data.packing import PackedTokens, require_vocabulary
    from ..data.tokenizer import decode_text, load_tokenizer
    from ..models import load_model
    from .bits_per_byte import bits_per_byte
    from .expert_use import ExpertUse, summary

    assert recipe.data is not None
    packed = PackedTokens(recipe.data, "validation")
    packed.check_tokenizer(recipe.model)
    tokenizer = load_tokenizer(recipe.model)
    model = load_model(recipe.model)
    require_vocabulary(recipe.data, model.config.vocab_size)
    documents = list(itertools.islice(packed.documents(), recipe.max_documents))
    texts = [decode_text(tokenizer, ids.tolist()).encode("utf-8") for ids in documents]
    held_out = sum(map(len, texts))
    expected = packed.manifest["splits"]["validation"]["bytes"]
    if recipe.max_documents is None and held_out != expected:
        # The divisor of every figure, so it is checked although the tokenizers are the same.
        raise UserError(
            f"the held-out text of {recipe.data} is {held_out:,} bytes when decoded, and {expected:,} by its manifest; "
            "pack the corpus again with `doge prepare`"
        )

    context_length = recipe.context_length or packed.manifest["row_length"]
    config: Any = model.config
    use = ExpertUse(config.num_experts, config.num_experts_per_tok) if config.is_moe else None
    how = (context_length, recipe.batch_size, _device(), _progress_printer(), use)
    start = time.perf_counter()
    found = bits_per_byte(model, documents, held_out, *how)
    seconds = {"model": time.perf_counter() - start}
    bits = {"model": found.bits_per_byte}
    results: dict[str, Any] = {
        "bits_per_byte": bits,
        "bytes": found.bytes,
        "documents": len(documents),
        "tokens": found.tokens,
        "loss": found.nats / found.tokens,
        "context_length": context_length,
    }
    if use is not None:
        results["expert_use"] = summary(use)
    if recipe.baselines:
        start = time.perf_counter()
        training = _training_texts(recipe.data, tokenizer)
        seconds["decoding the training text"] = time.perf_counter() - start
        results["baseline_training_bytes"] = sum(map(len, training))
        _measure_baselines(training, texts, bits, seconds)
    results["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    return results, None if use is None else use.counts()


def _measure_baselines(
    training: list[bytes], held_out: list[bytes], bits: dict[str, float], seconds: dict[str, float]
) -> None:
    """Add the bits per byte of each baseline, and the seconds it took."""
    from .baselines import ngram_bits_per_byte, xz_bits_per_byte

    whole, before = b"".join(held_out), b"".join(training)
    measures = {
        "xz -9": lambda: xz_bits_per_byte(whole),
        "xz -9 after the training text": lambda: xz_bits_per_byte(whole, before),
        f"order-{NGRAM_ORDER} n-gram": lambda: ngram_bits_per_byte(training, held_out, NGRAM_ORDER),
    }
    for name, measure in measures.items():
        start = time.perf_counter()
        bits[name] = measure()
        seconds[name] = time.perf_counter() - start


def _training_texts(data: str, tokenizer: Any) -> list[bytes]:
    """The training documents as UTF-8, up to BASELINE_BYTES of them."""
    from ..data.packing import PackedTokens
    from ..data.tokenizer import decode_text

    texts: list[bytes] = []
    size = 0
    for ids in PackedTokens(data, "train").documents():
        text = decode_text(tokenizer, ids.tolist()).encode("utf-8")
        if texts and size + len(text) > BASELINE_BYTES:
            break
        texts.append(text)
        size += len(text)
    return texts


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _progress_printer() -> Any:
    """A progress function that prints a line about every ten seconds, so that a long evaluation is seen to move."""
    last = time.perf_counter()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.perf_counter() - last > 10:
            last = time.perf_counter()
            print(f"  {done:,} of {total:,} tokens", flush=True)

    return show


def table(results: dict[str, Any]) -> str:
    """The results as a few lines of text, fewest bits first."""
    bits = results["bits_per_byte"]
    width = max(len(name) for name in bits)
    lines = [
        f"{results['documents']:,} held-out documents, {results['bytes']:,} bytes; bits per byte (fewer is better)"
    ]
    lines += [f"  {name:<{width}}  {value:.4f}" for name, value in sorted(bits.items(), key=lambda item: item[1])]
    lines.append(f"loss {results['loss']:.4f} nats per token over {results['tokens']:,} tokens")
    if "expert_use" in results:
        lines.append(_expert_use_line(results["expert_use"]))
    return "\n".join(lines)


def _expert_use_line(use: dict[str, Any]) -> str:
    dead, effective = ([layer[name] for layer in use["layers"]] for name in ("dead_share", "effective_experts"))
    return (
        f"of {use['num_experts']:,} experts a layer {min(dead):.1%} to {max(dead):.1%} were never chosen; "
        f"use is spread as over {min(effective):,.0f} to {max(effective):,.0f} experts used evenly"
    )
