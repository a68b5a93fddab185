"""What the benchmarks share: models of equal size, times, where a figure comes from, and its CSV."""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from small_doge.models import DogeConfig, DogeForCausalLM
from small_doge.ops.products import QUACK

RESULTS = Path(__file__).parent / "results"
# Okabe and Ito's colours, told apart with every common colour blindness.
BLUE, SKY, ORANGE, RED, GREEN, GREY = "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#999999"

FLUSH = 2**28  # bytes, larger than the L2 cache of any GPU

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


def once(step: Callable[[], object], device: torch.device, flush: torch.Tensor | None) -> Callable[[], float]:
    """Run one step; the function returned gives its milliseconds, on a GPU only after synchronizing."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        passed = time.perf_counter() - start
        return lambda: 1e3 * passed
    if flush is not None:
        flush.zero_()  # also keeps the GPU busy while the step's first kernels are launched
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    step()
    after.record()
    return lambda: before.elapsed_time(after)


def milliseconds(step: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median on the device, after three that compile and warm up.

    Before each the L2 cache is overwritten for twice as long as a step takes by the clock on the wall, so that Python
    has launched the step when the GPU comes to it.
    """
    for _ in range(3):
        step()
    flush, flushes = None, 0
    if device.type == "cuda":
        flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
        flushes = math.ceil(2 * seconds(step, 5, device) / seconds(flush.zero_, 5, device))
    times = []
    for _ in range(rounds):
        for _ in range(flushes):
            flush.zero_()
        taken = once(step, device, flush)
        synchronize(device)
        times.append(taken())
    return median(times)


def rates(device: torch.device) -> tuple[float, float]:
    """FLOP/s of a large matrix product, and bytes/s read and written of a large copy, both medians."""
    gpu = device.type == "cuda"
    n = 8192 if gpu else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if gpu else torch.float32) for _ in range(2))
    source = torch.empty(2**30 if gpu else 2**26, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    medians = []
    for step in (lambda: a @ b, lambda: target.copy_(source)):
        for _ in range(5):
            step()
        taken = [once(step, device, None) for _ in range(20)]
        synchronize(device)
        medians.append(1e-3 * median(ms() for ms in taken))
    return 2 * n**3 / medians[0], 2 * source.numel() / medians[1]


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
        "quack": QUACK,
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


def over_sizes(measure: Callable[..., list[Row]], doc: str | None, output: Path) -> None:
    """The command of a benchmark of a layer's part: measure(size, rows, rounds, device, rates) for each size."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="20m,60m,160m,320m")
    parser.add_argument("--rows", type=int, default=64, help="of 2,048 tokens")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=output)
    args = parser.parse_args()
    device = this_device()
    rate, where = rates(device), provenance(device)
    rows: list[Row] = []
    for size in args.sizes.split(","):
        rows += [row | where for row in measure(size, args.rows, args.rounds, device, rate)]
        write_csv(rows, args.output)  # after every size: a run that is cut short leaves what it had
