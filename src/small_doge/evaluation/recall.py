"""Multi-query associative recall: train a small model on it, or take a trained one, and measure what it finds again.

The task is that of :mod:`.recall_task`. One run is one model in one folder, with results.json, recall.csv, recall.png
and the model; what a study compares, widths, windows or architectures, are several runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import artifacts
from ..errors import UserError
from ..recipe import described, plain
from .recall_results import as_csv, brief, name_of, picture, table
from .recall_task import Filler, RecallRows, at_queries, measure, recall_rows, tasks

STAGE = "recall"
RESULTS_FILE, CSV_FILE, PICTURE_FILE = "results.json", "recall.csv", "recall.png"
BUILT = ("doge", "llama")
WARMUP = 0.1  # share of the steps in which the learning rate rises; then it falls along a cosine to 0
QUICK_ROWS = 64  # held-out rows of each task that a measurement during training reads
SECONDS_BETWEEN_LINES = 10.0
_SHORT = ("length", "pairs", "accuracy", "loss")  # what the history keeps of a row


# ruff: noqa: RUF009 - described makes dataclass fields
@dataclass
class RecallRecipe:
    """One model on one task; names of the model's fields are transformers'."""

    output_dir: str = field(metadata={"help": "folder for the results, the picture and the trained model"})
    model: str = described("doge or llama to train one, or a model folder, which is measured as it is", "doge")
    lengths: list = described("positions of a row that accuracy is measured at", [256])
    pairs: list = described(
        "key-value pairs of a row; below 1, that share of the length (at most a quarter)", [0.125, 0.25]
    )
    train_lengths: list | None = described("lengths to learn from (default: see curriculum)")
    train_pairs: list | None = described("numbers of pairs to learn from (default: as measured)")
    vocab_size: int | None = described("half keys, half values (default: 8192, or what a model folder has)")
    power_a: float = described("gaps before the queries have weight gap^(power_a − 1); 0.01 is Zoology's", 0.01)
    filler: Filler = described("what stands where nothing is asked: random or padding", "random")
    hidden_size: int = described("width of the model", 64)
    intermediate_size: int | None = described("width of its SwiGLU (default: twice hidden_size)")
    num_hidden_layers: int = described("layers", 2)
    num_attention_heads: int = described("heads", 2)
    keep_window_size: int | None = described("keys a query of Doge keeps (default: all of the longest row)")
    local_window: int = described("last keys that Doge keeps whatever their score", 0)
    score_lifetime: float | None = described("tokens of age that a score higher by 1 makes up for (default: for ever)")
    steps: int = described("optimiser steps", 1500)
    tokens_per_step: int = described("positions a step sees, in rows of one length", 4096)
    learning_rate: float = described("AdamW's peak rate", 3e-3)
    weight_decay: float = described("on matrices only", 0.1)
    curriculum: bool = described(
        "learn short rows first (by default the measured tasks halved, pairs too, down to 16 positions); the longer "
        "ones join during the first half of the steps",
        True,
    )
    measurements: int = described("how often accuracy is measured during training", 10)
    stop_at: float | None = described("stop training once every task's held-out accuracy is this (default: never)")
    test_rows: int = described("held-out rows of each length and number of pairs", 256)
    bf16: bool = described("train in bfloat16 autocast", False)
    seed: int = described("seed of the weights and of all rows", 233)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "steps", "tokens_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least 1")
        for name, least in (("lengths", 4), ("train_lengths", 4), ("pairs", 0), ("train_pairs", 0)):
            values = getattr(self, name)
            if values is None and name.startswith("train"):
                continue
            whole = name.endswith("lengths")
            if not values or not all(
                _is_number(v) and v >= least and (v == int(v) or (v < 1 and not whole)) for v in values
            ):
                what = (
                    f"whole numbers of at least {least}" if whole else "whole numbers, or shares of the length above 0"
                )
                raise ValueError(f"`{name}` is {values!r}, expected a list of {what}")
            setattr(self, name, [int(v) if v == int(v) else float(v) for v in values])
        if not 0 < self.power_a <= 10:
            raise ValueError(f"`power_a` is {self.power_a}, expected more than 0 and at most 10")
        if self.test_rows < 2 or self.measurements < 0 or self.seed < 0:
            raise ValueError("expected `test_rows` of at least 2, and `measurements` and `seed` of at least 0")
        if self.vocab_size is not None and self.vocab_size < 4:
            raise ValueError(f"`vocab_size` is {self.vocab_size}, expected at least 4")
        if self.model == "llama" and (self.keep_window_size is not None or self.local_window or self.score_lifetime):
            raise ValueError("`keep_window_size`, `local_window` and `score_lifetime` are Doge's, and `model` is llama")


def recall(recipe: RecallRecipe) -> Path:
    """Train (unless ``recipe.model`` is a folder), measure, and write results.json, recall.csv and recall.png.

    Rows of results.json are those of :func:`evaluate_recall`; ``history`` has the accuracy of each task during
    training. Ctrl-C ends the run; what was measured until then is written, with ``interrupted_at``, the step.

    Returns:
        The path of results.json.

    Raises:
        UserError: for pairs that do not fit, a model that cannot be opened or built, or a folder that is taken.
        KeyboardInterrupt: after Ctrl-C, once what was measured is written.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from ..models import load_causal_lm

    begun, output_dir, trains = time.perf_counter(), Path(recipe.output_dir), recipe.model in BUILT
    settings = {name: value for name, value in plain(recipe).items() if name not in ("output_dir", "measurements")}
    if not trains:
        if not (Path(recipe.model) / "config.json").is_file():
            raise UserError(f"model {recipe.model} is neither {' nor '.join(BUILT)} nor a folder with a config.json")
        weights = Path(recipe.model) / "model.safetensors"
        settings["model"] = artifacts.sha256(weights) if weights.is_file() else recipe.model
    if artifacts.is_finished(output_dir, STAGE, settings | {"interrupted_at": None}):
        print(f"{output_dir / RESULTS_FILE} is there already")
        print(table(artifacts.read_json(output_dir / RESULTS_FILE)["rows"]))
        return output_dir / RESULTS_FILE

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = build(recipe) if trains else load_causal_lm(recipe.model)
    vocab_size = (8192 if trains else model.config.vocab_size) if recipe.vocab_size is None else recipe.vocab_size
    measured = tasks(recipe.lengths, recipe.pairs, vocab_size)
    options: dict[str, Any] = {"power_a": recipe.power_a, "filler": recipe.filler, "vocab_size": vocab_size}
    options |= {"tokens_per_batch": recipe.tokens_per_step, "device": device}
    facts = {
        "model": recipe.model,
        "model_type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "hidden_size": model.config.hidden_size,
        "num_hidden_layers": model.config.num_hidden_layers,
        "keep_window_size": getattr(model.config, "keep_window_size", None),
        "local_window": getattr(model.config, "local_window", None),
        "score_lifetime": getattr(model.config, "score_lifetime", None),
        "learning_rate": recipe.learning_rate if trains else None,
        "seed": recipe.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    print(f"{facts['parameters']:,} parameters on {facts['device']}; tasks (length, pairs): {measured}", flush=True)
    newest: dict[tuple[int, int], dict[str, Any]] = {}
    history: list[dict[str, Any]] = []
    step, interrupted = 0, False
    try:
        if trains:
            every = max(1, recipe.steps // (recipe.measurements + 1))
            for step, loss in train(model, recipe, device):
                if recipe.measurements and step % every == 0 and step < recipe.steps:
                    for task in measured:
                        newest[task] = measure(model, *task, recipe.seed, rows=QUICK_ROWS, **options) | {"step": step}
                    history += [
                        {"step": step, "training_loss": loss.item(), **{k: row[k] for k in _SHORT}}
                        for row in newest.values()
                    ]
                    print("  accuracy " + "  ".join(brief(row) for row in newest.values()), flush=True)
                    if recipe.stop_at is not None and all(r["accuracy"] >= recipe.stop_at for r in newest.values()):
                        break
        for task in measured:
            newest[task] = measure(model, *task, recipe.seed, rows=recipe.test_rows, **options) | {"step": step}
            print(f"  measured {brief(newest[task])}", flush=True)
    except KeyboardInterrupt:
        interrupted = True
        if not newest:
            raise

    rows, seconds = list(newest.values()), time.perf_counter() - begun
    with artifacts.staged(output_dir) as folder:
        if trains and not interrupted:
            disable_progress_bar()  # transformers' own, over a file written in an instant
            model.save_pretrained(folder)
        content = {**facts, "rows": rows, "history": history, "seconds": round(seconds, 3)}
        artifacts.write_json(folder / RESULTS_FILE, content)
        artifacts.write_text(folder / CSV_FILE, as_csv(facts, rows))
        (folder / PICTURE_FILE).write_bytes(picture({name_of(facts): rows}))
        # A run that was cut short is told apart by its settings: the same command again says so and stops.
        artifacts.finish(folder, STAGE, settings | {"interrupted_at": step if interrupted else None}, seconds)
    print(table(rows))
    print(f"wrote {output_dir}" + (f", interrupted at step {step}" if interrupted else ""), flush=True)
    if interrupted:
        raise KeyboardInterrupt
    return output_dir / RESULTS_FILE


def evaluate_recall(
    model: Any, lengths: Sequence[int], pairs: Sequence[float], seed: int = 0, **options: Any
) -> list[dict[str, Any]]:
    """Accuracy of a model on held-out rows, for each length with each number of pairs.

    Args:
        model: a folder, or a causal language model.
        lengths: positions of a row.
        pairs: pairs of a row; below 1, that share of the length.
        seed: of the rows.
        options: those of :func:`measure`.

    Returns:
        What :func:`measure` returns, one a task, shortest and fewest pairs first.

    Raises:
        UserError: if some pairs do not fit, or the model cannot be opened.
    """
    from ..models import load_causal_lm

    opened = load_causal_lm(model) if isinstance(model, (str, Path)) else model
    vocab_size = options.setdefault("vocab_size", opened.config.vocab_size)
    return [measure(opened, *task, seed, **options) for task in tasks(lengths, pairs, vocab_size)]


def train(model: Any, recipe: RecallRecipe, device: Any = "cpu") -> Iterator[tuple[int, Any]]:
    """Train a model on the task with AdamW; yields (steps done, loss) after each step.

    The step's batch is drawn from the recipe's seed and the step's number, one task a step, while the step before it
    runs. With ``curriculum`` the tasks join in the order of their length and pairs during the first half of the steps.

    Raises:
        UserError: if some pairs do not fit.
    """
    import torch
    from transformers import get_cosine_schedule_with_warmup

    from ..ops.linear_cross_entropy import linear_cross_entropy

    device, vocab_size = torch.device(device), model.config.vocab_size
    learnt = training_tasks(recipe, vocab_size)

    def draw(step: int) -> RecallRows:
        share = min(1.0, (step + 1) / (recipe.steps / 2)) if recipe.curriculum else 1.0
        known = int(np.ceil(share * len(learnt)))
        length, pairs = learnt[np.random.default_rng([recipe.seed, step]).integers(known)]
        options: dict[str, Any] = {"vocab_size": vocab_size, "power_a": recipe.power_a, "filler": recipe.filler}
        rows = max(1, recipe.tokens_per_step // length)
        return recall_rows(rows, length, pairs, recipe.seed, split="train", index=step, **options)

    model.to(device).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * recipe.steps), recipe.steps)
    begun = last = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(draw, 0)
        for step in range(1, recipe.steps + 1):
            batch = ready.result()
            ready = pool.submit(draw, step)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                hidden, values = at_queries(model, batch, device)
                loss = linear_cross_entropy(hidden, model.get_output_embeddings().weight, values, len(values))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            now = time.perf_counter()
            if now - last > SECONDS_BETWEEN_LINES or step == recipe.steps:
                last, left = now, (now - begun) / step * (recipe.steps - step)
                what = f"loss {loss.item():.3f} at {batch.input_ids.shape[1]} positions"
                print(f"step {step:>6}/{recipe.steps}  {what}  {artifacts.duration(left)} left", flush=True)
            yield step, loss.detach()


def training_tasks(recipe: RecallRecipe, vocab_size: int) -> list[tuple[int, int]]:
    """The lengths and numbers of pairs that a model learns from, shortest and fewest first.

    With ``curriculum``, unless the recipe names its own: the measured ones, and their halves down to 16 positions.
    Short rows show the trick sooner, and it is kept when rows grow: two layers of width 64 with a vocabulary of 64 had
    it within 250 steps of 1,024 positions when begun at 16 (with one seed of two), while a Llama of that size begun at
    64 with 8 pairs was at 0.31 after 2,000 steps of 2,048.

    Raises:
        UserError: if some pairs do not fit.
    """
    named = recipe.train_lengths or recipe.train_pairs
    learnt = tasks(recipe.train_lengths or recipe.lengths, recipe.train_pairs or recipe.pairs, vocab_size)
    if recipe.curriculum and not named:
        learnt += [
            (length >> k, max(1, pairs >> k)) for length, pairs in learnt for k in range(1, 32) if length >> k >= 16
        ]
    return sorted(set(learnt))


def build(recipe: RecallRecipe) -> Any:
    """A fresh Doge, or transformers' Llama of the same sizes, with tied embeddings.

    Raises:
        UserError: if the sizes do not fit together.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..models import DogeConfig, DogeForCausalLM

    longest = max([*recipe.lengths, *(recipe.train_lengths or [])])
    sizes: dict[str, Any] = {
        "vocab_size": 8192 if recipe.vocab_size is None else recipe.vocab_size,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size or 2 * recipe.hidden_size,
        "num_hidden_layers": recipe.num_hidden_layers,
        "num_attention_heads": recipe.num_attention_heads,
        "max_position_embeddings": longest,
        "tie_word_embeddings": True,
    }
    window: dict[str, Any] = {"local_window": recipe.local_window, "score_lifetime": recipe.score_lifetime}
    window["keep_window_size"] = longest if recipe.keep_window_size is None else recipe.keep_window_size
    try:
        config = DogeConfig(**sizes, **window)
    except ValueError as error:
        raise UserError(str(error)) from error
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(LlamaConfig(**sizes)) if recipe.model == "llama" else DogeForCausalLM(config)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
