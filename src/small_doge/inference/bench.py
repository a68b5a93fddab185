"""How fast a model runs on this CPU: tokens per second of prompt and reply, time to the first token, memory."""

from __future__ import annotations

import csv
import io
import platform
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .. import artifacts
from ..errors import UserError

if TYPE_CHECKING:
    from .engine import Engine

BENCH_FILE = "bench.json"
TRANSFORMERS = "transformers"
_VOCABULARY = 32768  # of a size without a tokenizer
_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#999999")


@dataclass
class BenchRecipe:
    """A model, and what to run it with."""

    model: str = field(
        metadata={"help": "model folder, one that `doge quantize` wrote, or a size such as 20m, with random weights"}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "folder to write (default: bench in the model; of a size runs/bench-SIZE)"}
    )
    precisions: list[str] = field(
        default_factory=lambda: ["float32", "bf16", "int8", "int4"],
        metadata={"help": "of the weights; a quantised folder has one alone, `auto`"},
    )
    threads: list[int] = field(default_factory=lambda: [1, 0], metadata={"help": "thread counts; 0 for one a core"})
    contexts: list[int] = field(
        default_factory=lambda: [64, 2048], metadata={"help": "tokens before the measured ones"}
    )
    tokens: int = field(default=32, metadata={"help": "tokens of a reply in a round"})
    rounds: int = field(default=5, metadata={"help": "rounds, in which all take turns; the median counts"})
    transformers: bool = field(default=True, metadata={"help": "also measure transformers' generation, in float32"})

    def __post_init__(self) -> None:
        for name in ("tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least 1")
        if not self.precisions or not self.threads or min(self.threads) < 0:
            raise ValueError("expected at least one precision, and thread counts of 0 or more")
        if not self.contexts or min(self.contexts) < 1:
            raise ValueError(f"`contexts` is {self.contexts}, expected numbers of tokens above 0")


def bench(recipe: BenchRecipe) -> Path:
    """Measure, print a table, and write ``bench.csv``, ``bench.png`` and ``bench.json``; returns the folder.

    A figure is the median over rounds in which all precisions take turns, so that a busy machine slows all of them.

    Raises:
        UserError: if the model cannot be opened, the engine cannot run it, or Numba is missing.
    """
    try:
        import numba  # noqa: F401
    except ImportError as error:
        raise UserError(f"`doge bench` needs Numba ({error}): pip install numba") from error
    from ..models import SIZES, DogeForCausalLM, config_for

    with tempfile.TemporaryDirectory() as temporary:
        model = recipe.model
        if not Path(model).exists() and model.lower() in SIZES:
            model = temporary
            DogeForCausalLM(config_for(recipe.model, vocab_size=_VOCABULARY)).save_pretrained(model)
        default = Path(f"runs/bench-{recipe.model}") if model == temporary else Path(model) / "bench"
        return _bench(recipe, model, Path(recipe.output_dir) if recipe.output_dir else default)


def _bench(recipe: BenchRecipe, model: str, folder: Path) -> Path:
    from .engine import Engine
    from .engine.threads import available_cores

    start, rows = time.perf_counter(), []
    counts = list(dict.fromkeys(n or min(available_cores(), 8) for n in recipe.threads))
    for threads in counts:
        engines = {name: Engine.open(model, name, threads) for name in recipe.precisions}
        for context in recipe.contexts:
            rows += _measure(engines, context, threads, recipe)
            print("\n".join(_line(row) for row in rows[-len(engines) :]), flush=True)
        for engine in engines.values():
            engine.close()
    if recipe.transformers:
        rows += _transformers(recipe, model, counts)
    best = max((row for row in rows if row["precision"] != TRANSFORMERS), key=lambda row: row["tokens_per_second"])
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    artifacts.write_text(folder / "bench.csv", text.getvalue())
    cpu, seconds = cpu_name(), time.perf_counter() - start
    facts = {"cpu": cpu, "best": best, "rows": rows, "versions": artifacts.versions(), "seconds": seconds}
    artifacts.write_json(folder / BENCH_FILE, facts)
    draw(rows, cpu, folder / "bench.png")
    print(f"wrote {folder}: at best {best['tokens_per_second']:,.0f} tokens/s ({best['precision']}) on {cpu}")
    return folder


def _measure(engines: dict[str, Engine], context: int, threads: int, recipe: BenchRecipe) -> list[dict[str, Any]]:
    """One row a precision, all in turn, round after round."""
    import numpy as np

    random = np.random.default_rng(0)
    prompts: dict[str, list[float]] = {name: [] for name in engines}
    replies: dict[str, list[float]] = {name: [] for name in engines}
    sizes: dict[str, int] = {}
    for i in range(recipe.rounds + 1):
        for name, engine in engines.items():
            session = engine.session()
            began = time.perf_counter()
            token = int(session.feed(random.integers(0, engine.shape.vocabulary, context).tolist()).argmax())
            first = time.perf_counter()
            for _ in range(recipe.tokens):
                token = int(session.feed((token,)).argmax())
            if i:  # the first round loads code and weights
                prompts[name].append(first - began)
                replies[name].append((time.perf_counter() - first) / recipe.tokens)
            sizes[name] = session.nbytes
        _say(f"{threads} threads, {context} tokens before: round {i} of {recipe.rounds}")
    return [
        {
            "precision": name,
            "threads": threads,
            "context": context,
            "tokens_per_second": round(1 / median(replies[name]), 1),
            "prompt_tokens_per_second": round(context / median(prompts[name]), 1),
            "first_token_ms": round(1e3 * median(prompts[name]), 2),
            "weight_bytes": len(engine.packed.data),
            "state_bytes": sizes[name],
        }
        for name, engine in engines.items()
    ]


def _transformers(recipe: BenchRecipe, folder: str, counts: list[int]) -> list[dict[str, Any]]:
    """The same of transformers' own way to generate, with our model and cache, in float32."""
    import torch

    from ..models import load_model

    model: Any = load_model(folder).float()
    before, rows = torch.get_num_threads(), []
    for threads in counts:
        torch.set_num_threads(threads)
        for context in recipe.contexts:
            prompts, replies = [], []
            for i in range(recipe.rounds + 1):
                ids = torch.randint(0, model.config.vocab_size, (1, context))
                times = []
                for new in (1, recipe.tokens + 1):
                    began = time.perf_counter()
                    with torch.inference_mode():
                        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
                    times.append(time.perf_counter() - began)
                if i:
                    prompts.append(times[0])
                    replies.append((times[1] - times[0]) / recipe.tokens)
                _say(f"transformers, {threads} threads, {context} tokens before: round {i} of {recipe.rounds}")
            row = {"precision": TRANSFORMERS, "threads": threads, "context": context}
            row |= {"tokens_per_second": round(1 / max(median(replies), 1e-9), 1)}
            row |= {"prompt_tokens_per_second": round(context / median(prompts), 1)}
            row |= {"first_token_ms": round(1e3 * median(prompts), 2)}
            row |= {"weight_bytes": 4 * sum(p.numel() for p in model.parameters()), "state_bytes": ""}
            rows.append(row)
            print(_line(row), flush=True)
    torch.set_num_threads(before)
    return rows


def _say(words: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{words}", end="", file=sys.stderr, flush=True)


def _line(row: dict[str, Any]) -> str:
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    return (
        f"{clear}{row['precision']:>12}  {row['threads']} threads  {row['context']:>6,} before  "
        f"{row['tokens_per_second']:>8,.1f} tokens/s  prompt {row['prompt_tokens_per_second']:>9,.1f} tokens/s  "
        f"first token {row['first_token_ms']:>8,.1f} ms  weights {row['weight_bytes'] / 2**20:>7,.1f} MiB"
    )


def cpu_name() -> str:
    """What the processor calls itself, as far as the system says."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"


def draw(rows: list[dict[str, Any]], cpu: str, path: Path) -> None:
    """Bars of tokens/s, a group for each thread count and context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((row["threads"], row["context"]) for row in rows))
    names = list(dict.fromkeys(row["precision"] for row in rows))
    figure, axes = plt.subplots(figsize=(max(5.0, 1.2 + 1.7 * len(groups)), 3.6), layout="constrained")
    for i, name in enumerate(names):
        of_name = {
            (row["threads"], row["context"]): float(row["tokens_per_second"])
            for row in rows
            if row["precision"] == name
        }
        places = [g + (i - (len(names) - 1) / 2) * 0.84 / len(names) for g in range(len(groups))]
        heights = [of_name.get(group, 0.0) for group in groups]
        bars = axes.bar(places, heights, 0.8 / len(names), label=name, color=_COLORS[i % len(_COLORS)])
        axes.bar_label(bars, [f"{height:,.0f}" for height in heights], fontsize=7)
    labels = [f"{threads} thread{'s' if threads > 1 else ''}\n{context:,} tokens before" for threads, context in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    axes.set_ylabel("tokens per second")
    axes.set_title(cpu, fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
