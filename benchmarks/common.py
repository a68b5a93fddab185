"""What the benchmarks share: models of equal size, times, where a figure comes from, and its CSV."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from small_doge.models import DogeConfig, DogeForCausalLM

RESULTS = Path(__file__).parent / "results"
# Okabe and Ito's colours, told apart with every common colour blindness.
BLUE, SKY, ORANGE, RED, GREEN, GREY = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#999999"

Row = dict[str, Any]


def build(kind: str, config: DogeConfig, **options: Any) -> torch.nn.Module:
    """A model of the size of ``config``: ours, or transformers' Doge or Llama, whose config gets ``options`` too."""
    if kind.startswith("ours"):
        return DogeForCausalLM(config)
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    same = {name: getattr(config, name) for name in (*names.split(), "max_position_embeddings", "tie_word_embeddings")}
    same |= options
    if kind.startswith("transformers Doge"):
        return transformers.DogeForCausalLM(transformers.DogeConfig(**same, keep_window_size=config.keep_window_size))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**same))


def this_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(step: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Seconds of one step by the clock on the wall, averaged over ``repeats``."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a cell."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def provenance(device: torch.device) -> Row:
    """Where, with what and when a figure was measured: the last columns of every row."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": os.environ.get("COMMIT") or git.stdout.strip(),  # a copy on another machine may have no history
        "date": time.strftime("%Y-%m-%d"),
    }


def write_csv(rows: Sequence[Row], path: str | Path) -> Path:
    """Write rows under the columns of all of them; a cell that a row lacks stays empty."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(path: str | Path) -> list[Row]:
    """The rows of an earlier run, every cell a string."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def number(row: Row | None, name: str) -> float:
    """A cell as a number, measured just now or read from a file; NaN where there is none."""
    cell = (row or {}).get(name)
    return float("nan") if cell in (None, "") else float(str(cell))
