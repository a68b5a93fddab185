"""What a run left behind, read from its small files, and the same in numbers and words."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import artifacts
from ..errors import UserError
from .plots import percent, series

STAGES = {
    "tokenizer": "Train the tokenizer",
    "data": "Prepare the data",
    "pretrain": "Train the model",
    "questions": "Write questions",
    "sft": "Teach it to answer (SFT)",
    "dpo": "Teach it to prefer (DPO)",
    "evaluation": "Evaluate",
    "answers": "Ask the questions",
}
OPTIONAL = {"questions", "sft", "dpo", "answers"}
"""Stages that a run may do without."""


@dataclass(frozen=True)
class Run:
    """What the folders of a run say; empty where a stage has not been run."""

    folder: Path
    stages: dict[str, dict[str, Any]]  # stage.json by folder name
    manifest: dict[str, Any]
    config: dict[str, Any]
    history: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    results: dict[str, Any]
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)  # results.json of suites, by their folder
    answers: dict[str, Any] = field(default_factory=dict)  # answers.json: figures and answers of each model
    expert_counts: np.ndarray | None = None  # (layers, experts): how often each was chosen on the held-out text


def read_run(run_dir: str | Path) -> Run:
    """Read the small files of a run.

    Raises:
        UserError: if there is no finished pretraining in ``run_dir``, or one of its files cannot be read.
    """
    folder = Path(run_dir)
    pretrain = folder / "pretrain"
    for path in (pretrain / artifacts.STAGE_FILE, pretrain / "trainer_state.json", pretrain / "config.json"):
        if not path.is_file():
            raise UserError(f"{folder} holds no finished pretraining to report on: {path} does not exist")

    def optional(path: Path) -> dict[str, Any]:
        return artifacts.read_json(path) if path.is_file() else {}

    stages = {name: optional(folder / name / artifacts.STAGE_FILE) for name in STAGES}
    results = optional(folder / "evaluation" / "results.json")
    samples = []
    if (pretrain / "samples.jsonl").is_file():
        for line in (pretrain / "samples.jsonl").read_text(encoding="utf-8").split("\n"):
            try:
                samples.append(json.loads(line))
            except ValueError:
                continue  # a run that was killed may leave half a line
    return Run(
        folder,
        {name: stage for name, stage in stages.items() if stage},
        optional(folder / "data" / "manifest.json"),
        artifacts.read_json(pretrain / "config.json"),
        artifacts.read_json(pretrain / "trainer_state.json").get("log_history", []),
        samples,
        results if "bits_per_byte" in results else {},
        _suites(folder),
        optional(folder / "answers" / "answers.json"),
        _expert_counts(folder / "evaluation" / "expert_use.npy"),
    )


def _expert_counts(path: Path) -> np.ndarray | None:
    """What `doge evaluate` counted of a model with experts, or None."""
    if not path.is_file():
        return None
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _suites(folder: Path) -> dict[str, dict[str, Any]]:
    """What `doge evaluate --suite` left in the folders of the run's models."""
    found = {}
    for path in sorted([*folder.glob("evaluation*/results.json"), *folder.glob("*/evaluation/*/results.json")]):
        results = artifacts.read_json(path)
        if isinstance(results, dict) and "scores" in results:
            found[path.parent.relative_to(folder).as_posix()] = results
    return found


def size(count: float, unit: str = "B") -> str:
    """A number of bytes or parameters with three digits: ``11.8 MB``."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g} {prefix}{unit}"
    return f"{count:g} {unit}"


def parameters(run: Run) -> int:
    """Numbers in the trained model, from the header of its weights (tied weights are stored once)."""
    known = run.stages["pretrain"].get("parameters")
    if isinstance(known, int):
        return known
    from safetensors import safe_open

    try:
        with safe_open(run.folder / "pretrain" / "model.safetensors", framework="np") as weights:
            return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    except Exception:  # safetensors' own error type, or no such file: the page then leaves the number out
        return 0


def verdict(run: Run) -> str:
    """The result against the baselines in a sentence or two, whichever way it went."""
    bits = dict(run.results.get("bits_per_byte", {}))
    own = bits.pop("model", None)
    if own is None:
        return "It has not been evaluated on held-out text yet."
    said = (
        f"On {size(run.results['bytes'])} of held-out text, which it never trained on, it needs {own:.3f} bits to "
        "predict each byte; fewer is better."
    )
    better = [f"{name} ({value:.3f})" for name, value in bits.items() if own < value]
    worse = [f"{name} ({value:.3f})" for name, value in bits.items() if own >= value]
    if not bits:
        return f"{said} No baseline was measured beside it."
    if not worse:
        return f"{said} That is better than every baseline measured: {_and(better)}."
    if not better:
        return f"{said} That is worse than every baseline measured: {_and(worse)}."
    return f"{said} That is better than {_and(better)}, but not than {_and(worse)}."


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def summary(run: Run) -> str:
    """One paragraph of plain words: what was trained, on what, how big, how long, how well."""
    splits = run.manifest.get("splits", {})
    train = splits.get("train", {})
    sources = ", ".join(run.manifest.get("sources", {}))
    on = f" on {size(train['bytes'])} of text ({train['documents']:,} documents" if train else ""
    on += f" of {sources})" if train and sources else ")" if train else ""
    count = parameters(run)
    of = f" of {size(count, '').strip().replace('M', 'million').replace('k', 'thousand')} parameters" if count else ""
    took = artifacts.duration(run.stages["pretrain"].get("seconds", 0))
    steps = run.stages["pretrain"].get("steps")
    reads = f" in {steps:,} steps" if steps else ""
    return (
        f"This run trained a Doge language model{of}{on}{reads}, which took {took}. A language model reads text and "
        f"gives, for every next token (a piece of a word), the probability of each that could follow. {verdict(run)}"
    )


def numbers(run: Run) -> list[tuple[str, str]]:
    """The table of numbers: names and values, with units; what is not known is left out."""
    config, splits = run.config, run.manifest.get("splits", {})
    rows: list[tuple[str, str | None]] = [("Parameters", f"{parameters(run):,}" if parameters(run) else None)]
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    experts = f"{config['num_experts']:,} / {config['num_experts_per_tok']}" if config.get("is_moe") else None
    rows += [
        ("Layers × hidden size", f"{layers} × {config.get('hidden_size')}"),
        ("Query heads / key and value heads", f"{heads} / {config.get('num_key_value_heads')}"),
        ("Attention window (keys kept)", f"{config['keep_window_size']:,}" if "keep_window_size" in config else None),
        ("Experts of a layer / of a token", experts),
        ("Vocabulary (tokens)", f"{config['vocab_size']:,}" if "vocab_size" in config else None),
    ]
    for name, label in (("train", "Training text"), ("validation", "Held-out text")):
        if name in splits:
            s = splits[name]
            rows.append((label, f"{s['bytes']:,} bytes, {s['documents']:,} documents, {s['tokens']:,} tokens"))
    for name, label, number in (
        ("loss", "Training loss, last logged (nats per token)", "{:.3f}"),
        ("eval_loss", "Held-out loss, last (nats per token)", "{:.3f}"),
        ("eval_bits_per_byte", "Held-out bits per byte during training, last", "{:.3f}"),
        ("balance_loss", "Balance loss, last logged (1: experts evenly used)", "{:.3f}"),
        ("tokens_per_second", "Training speed, last logged (tokens per second)", "{:,.0f}"),
        ("mfu", "Model FLOP utilisation, last logged", "{:.1%}"),
    ):
        _, values = series(run.history, name)
        rows.append((label, number.format(values[-1]) if values else None))
    for name, bits in run.results.get("bits_per_byte", {}).items():
        label = "this model" if name == "model" else name
        rows.append((f"Held-out bits per byte, {label}", f"{bits:.4f}"))
    dead = [layer["dead_share"] for layer in run.results.get("expert_use", {}).get("layers", [])]
    if dead:
        rows.append(("Experts never chosen on held-out text, mean of layers", percent(sum(dead) / len(dead))))
    rows.append(("Time in all", artifacts.duration(sum(s.get("seconds", 0) for s in run.stages.values()))))
    return [(name, value) for name, value in rows if value is not None]
