"""The MoE layer of Doge in training, forward and backward, against transformers' and against the dense MLP inside it.

Contenders, in turn, in one run, 16,384 tokens, bfloat16 parameters and inputs, gradients to the input and all
parameters:

    ours, ours compiled     DogeCDMoE of small_doge.models: SwiGLU, router, retrieval, experts; torch.compile
    ours in chunks, …       the same with chunk_size_feed_forward: the SwiGLU some tokens at a time, computed twice
    transformers, … compiled  DogeCDMoE of transformers
    dense MLP compiled      the SwiGLU alone, a part of both

and the parts of ours, each alone. Each time is the median over rounds in which the contenders take turns, the L2 cache
overwritten before each for so long that Python has launched the step when the GPU comes to it; ``wall_ms`` is what a
step takes in a loop, Python included. Memory is the peak above what the inputs hold. Beside them stand the floor, the
larger of the matrix products at the measured rate of a large one and of all inputs and outputs once through memory at
the measured rate of a large copy; and what it takes to move the rows that tokens look up, six times N × k × C numbers,
at that rate.

    python benchmarks/experts_layer.py                          # one GPU: four sizes, and the bars they are held to
    python benchmarks/experts_layer.py --sizes "1;4" --skip "transformers,ours"
    python benchmarks/experts_layer.py --tune                   # one GPU: each kernel under each choice of its tiles
    python benchmarks/experts_layer.py --sizes 16,32,64,4 --tokens 64   # a CPU: hidden, intermediate, experts, k
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from common import (
    FLUSH,
    RESULTS,
    Row,
    first_line,
    number,
    once,
    provenance,
    rates,
    seconds,
    synchronize,
    this_device,
    write_csv,
)
from transformers.models.doge import modeling_doge as published

from small_doge.models import DogeConfig
from small_doge.models.moe import DogeCDMoE
from small_doge.ops.product_key import experts, route

fused: Any = importlib.import_module("small_doge.ops.product_key.fused")

OURS, CHUNKS, THEIRS, MLP = "ours", "ours in chunks", "transformers", "dense MLP"
COMPILED = " compiled"


class Size(NamedTuple):
    """Hidden and intermediate size, E experts, k of them a token."""

    C: int
    intermediate: int
    E: int
    k: int


SIZES = [Size(256, 512, 1024, 8), Size(512, 1024, 4096, 16), Size(768, 1536, 9216, 24), Size(1024, 2048, 16384, 32)]
BARS = dict(zip(SIZES, [0.8, 1.3, 2.2, 3.5], strict=True))  # milliseconds of ours compiled
LARGEST_SHARE = 0.25  # of the peak memory of transformers' compiled


def layers(size: Size, device: torch.device, dtype: torch.dtype, chunk_size: int = 0) -> dict[str, Any]:
    """The layers with random weights; those of ours and transformers' have the same names."""
    fields: dict[str, Any] = {"hidden_size": size.C, "intermediate_size": size.intermediate, "num_experts": size.E}
    fields |= {"num_experts_per_tok": size.k, "is_moe": True, "num_attention_heads": 1, "num_key_value_heads": 1}
    torch.manual_seed(0)
    ours, config = DogeCDMoE(DogeConfig(**fields)), transformers.DogeConfig(**fields)
    chunks = DogeCDMoE(DogeConfig(**fields, chunk_size_feed_forward=chunk_size))
    theirs, mlp = published.DogeCDMoE(config), published.DogeMLP(config)
    for layer in (chunks, theirs):
        layer.load_state_dict(ours.state_dict())
    named = {OURS: ours, CHUNKS: chunks, THEIRS: theirs, MLP: mlp}
    return {name: layer.to(device, dtype) for name, layer in named.items()}


def training(layer: Any, x: torch.Tensor, do: torch.Tensor) -> Callable[[], object]:
    """Forward and backward of a layer, whatever else it returns beside its output."""
    leaves = [x, *layer.parameters()]

    def step() -> object:
        out = layer(x)
        return torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaves, do)

    return step


def routing(layer: Any, x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, weights and indices of a layer's experts."""
    logits = layer.router_gate(x.flatten(0, 1)).detach()
    return logits, *route(logits, k)


def parts(layer: Any, x: torch.Tensor, do: torch.Tensor, k: int) -> dict[str, Callable[[], object]]:
    """The operators of ours, each alone; off the GPU, those that there are."""
    with torch.no_grad():
        tokens, do = x.detach().flatten(0, 1), do.flatten(0, 1)
        down, up = layer.down_embed.weight.detach(), layer.up_embed.weight.detach()
        logits, weights, indices = routing(layer, x, k)
    E = down.shape[0]
    if not fused.usable(x):
        return {
            "retrieval": lambda: route(logits, k),
            "experts forward": lambda: experts(tokens, down, up, indices, weights),
        }
    scores = weights.clone()
    steps: dict[str, Callable[[], object]] = {
        "retrieval": lambda: fused._retrieve(logits, k),
        "retrieval backward": lambda: fused._retrieve_backward(scores, indices, logits),
        "sort": lambda: fused.sort_pairs(indices, E),
    }
    _, h = fused._forward(tokens, down, up, indices, weights)
    backward = (do, tokens, down, up, indices, weights, h)
    steps["experts forward"] = lambda: fused._forward(tokens, down, up, indices, weights)
    steps["experts backward"] = lambda: fused._backward(*backward, True)
    steps["experts backward, tokens"] = lambda: fused._backward(*backward, False)
    return steps


def needed(size: Size, N: int, width: int) -> tuple[float, float, float]:
    """FLOP of matrix products, bytes of all inputs and outputs once, and bytes of the rows that tokens look up."""
    C, intermediate, E, k = size
    columns = 3 * intermediate + 2 * int(E**0.5)
    values = 4 * N * C + 2 * (C * columns) + 4 * E * C  # x, dx, out, do; weights and their gradients; tables likewise
    return 6.0 * N * C * columns, float(width * values), 6.0 * N * k * C * width


def measure(size: Size, args: argparse.Namespace, device: torch.device, rate: tuple[float, float]) -> list[Row]:
    """One row a contender and one a part of ours."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    torch._dynamo.reset()
    made = layers(size, device, dtype, args.chunk_size)
    x = torch.randn(-(-args.tokens // 2048), min(args.tokens, 2048), size.C, device=device, dtype=dtype)
    x, do = x.requires_grad_(), torch.randn_like(x)
    N = x.shape[0] * x.shape[1]
    steps = {name: training(layer, x, do) for name, layer in made.items()}
    if not args.eager:
        steps |= {name + COMPILED: training(torch.compile(layer), x, do) for name, layer in made.items()}
    whole = list(steps)
    steps |= parts(made[OURS], x, do, size.k)
    skipped = args.skip.split(",")
    steps = {name: step for name, step in steps.items() if name not in skipped}
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device) if gpu else None

    def timed(name: str) -> Callable[[], float]:
        if flush is not None:
            for _ in range(flushes[name]):
                flush.zero_()
        return once(steps[name], device, flush)

    notes, gib, wall, flushes = {}, {}, {}, {}
    flush_ms = 1e3 * seconds(flush.zero_, 10, device) if flush is not None else 1.0
    # At its first product cuBLAS takes 32 MiB for each thread and keeps them, which is no layer's doing.
    torch.autograd.grad((x[0] @ x[0].T[:, :8]).sum(), x)
    inputs = torch.cuda.memory_allocated() if gpu else 0
    for name, step in list(steps.items()):
        try:
            for _ in range(3):  # the first call compiles and tunes, which takes memory of its own
                synchronize(device)
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                step()
                synchronize(device)
            gib[name] = (torch.cuda.max_memory_allocated() - inputs) / 2**30 if gpu else float("nan")
            wall[name] = 1e3 * seconds(step, 10, device)
            flushes[name] = math.ceil(2 * wall[name] / flush_ms)  # twice, as a host can be slower than it was
        except Exception as error:  # out of memory, no compiler: the others still run, and the row says why
            notes[name] = first_line(error)
            del steps[name]
        gc.collect()
        torch.cuda.empty_cache() if gpu else None
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(args.rounds):
        order = order[1:] + order[:1]  # so that nobody always comes after the same other one
        taken_by = {}
        for name in order:
            taken_by[name] = timed(name)
            synchronize(device)  # or memory of the one before is still in use
        for name, ms in taken_by.items():
            times[name].append(ms())

    flop, moved, rows_moved = needed(size, N, 2 if gpu else 4)
    rows: list[Row] = []
    for name in (*times, *notes):
        row: Row = size._asdict() | {"tokens": N, "contender": name, "kind": "layer" if name in whole else "part"}
        if name in times:
            row |= {"ms": round(median(times[name]), 4), "wall_ms": round(wall[name], 4)}
            row["peak_gib"] = round(gib[name], 4) if gpu else ""
        row["floor_ms"] = round(1e3 * max(flop / rate[0], moved / rate[1]), 4)
        row["rows_ms"] = round(1e3 * rows_moved / rate[1], 4)
        row |= {
            "matmul_tflops": round(rate[0] / 1e12, 1),
            "copy_gbps": round(rate[1] / 1e9),
            "note": notes.get(name, ""),
        }
        rows.append(row)
    return rows


def check(size: Size, device: torch.device) -> float:
    """Relative error of a few tokens through ours against float64, with its own routing."""
    layer = layers(size, device, torch.bfloat16 if device.type == "cuda" else torch.float32)[OURS]
    x = torch.randn(1, 64, size.C, device=device, dtype=layer.router_gate.weight.dtype)
    with torch.no_grad():
        _, weights, indices = routing(layer, x, size.k)
        got = experts(x[0], layer.down_embed.weight, layer.up_embed.weight, indices, weights).double()
        down, up = (table.weight.double()[indices] for table in (layer.down_embed, layer.up_embed))
        hidden = torch.nn.functional.silu(torch.einsum("nc,nkc->nk", x[0].double(), down)) * weights.double()
        expected = torch.einsum("nk,nkc->nc", hidden, up)
    return ((got - expected).norm() / expected.norm()).item()


def report(rows: list[Row]) -> None:
    """The table, what failed and why, and the bars."""
    print(f"\nmilliseconds on the device, forward and backward (wall; peak GiB), {rows[0]['device']}")
    grouped: dict[Size, dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault(Size(*(int(row[name]) for name in Size._fields)), {})[row["contender"]] = row
    names = list(dict.fromkeys(row["contender"] for row in rows))
    print(f"{'hidden, intermediate, experts, k':<34}" + "".join(f"{', '.join(map(str, size)):>28}" for size in grouped))
    for name in names:
        cells = ""
        for by_name in grouped.values():
            numbers = [number(by_name.get(name), column) for column in ("ms", "wall_ms", "peak_gib")]
            cells += f"{'{:.3f} ({:.2f}; {:.3f})'.format(*numbers):>28}"
        print(f"{name:<34}{cells}")
    for name in ("floor_ms", "rows_ms"):
        print(f"{name:<34}" + "".join(f"{next(iter(row.values()))[name]:>28}" for row in grouped.values()))
    for row in rows:
        if row["note"]:
            print(f"  {row['contender']} at {row['C']}: {row['note']}")
    print(f"  matrix product {rows[0]['matmul_tflops']} TFLOP/s, copy {rows[0]['copy_gbps']} GB/s")
    for size, row in grouped.items():
        if size not in BARS:
            continue
        for name in (OURS + COMPILED, CHUNKS + COMPILED):
            share = number(row.get(name), "peak_gib") / number(row.get(THEIRS + COMPILED), "peak_gib")
            bars = [("ms", number(row.get(name), "ms"), BARS[size]), ("memory / transformers'", share, LARGEST_SHARE)]
            for label, value, limit in bars:  # a NaN has missed
                what = f"{', '.join(map(str, size))}: {name}, {label}"
                print(f"  {what:<70} {value:>8.4f} <= {limit:<6} {'ok' if value <= limit else 'MISSED'}")


# Choices that --tune times for each field of fused.Tiles.
CHOICES: dict[str, list[Any]] = {
    "tokens": [
        *((1024, 1, 1), (2048, 1, 1), (2048, 2, 1), (4096, 4, 1), (8192, 4, 1)),
        *((1024, 1, 3), (2048, 1, 3), (2048, 2, 3), (2048, 2, 4), (4096, 4, 3)),
    ],
    "experts": [
        *((16, 256, 4, 1), (8, 256, 4, 1), (8, 256, 2, 1), (4, 256, 1, 1), (16, 128, 2, 1), (8, 512, 4, 1)),
        *((8, 256, 4, 3), (8, 256, 2, 3), (4, 256, 2, 4), (4, 256, 1, 4), (8, 128, 2, 3), (16, 128, 4, 3)),
    ],
    "retrieve": [1, 2, 4],
}
Try = tuple[Size, str, Any, Callable[[], object]]


def both_ways(forward: tuple[Any, ...], backward: tuple[Any, ...]) -> None:
    """`tokens` forward and backward."""
    fused._tokens(*forward, backward=False)
    fused._tokens(*backward, backward=True)


def tries(sizes: list[Size], device: torch.device, tokens: int) -> Iterator[Try]:
    """Every choice at every size, and what to launch with it; `tokens` forward and backward."""
    for size in sizes:
        layer: Any = layers(size, device, torch.bfloat16)[OURS]
        x = torch.randn(tokens, size.C, device=device, dtype=torch.bfloat16)
        do, down, up = torch.randn_like(x), layer.down_embed.weight.detach(), layer.up_embed.weight.detach()
        logits, weights, indices = routing(layer, x[None], size.k)
        _, h = fused._forward(x, down, up, indices, weights)
        made = tuple(torch.rand_like(h) for _ in range(3))
        out, ddown, dup = torch.empty_like(x), torch.empty_like(down), torch.empty_like(up)
        forward = (x, down, up, indices, weights, h, made, out)
        backward = (do, up, down, indices, weights, h, made, out)
        tables = (x, do, *made[:2], *fused.sort_pairs(indices, size.E), ddown, dup)
        launches = {
            "tokens": partial(both_ways, forward, backward),
            "experts": partial(fused.sum_pairs, *tables),
            "retrieve": partial(fused._retrieve, logits, size.k),
        }
        yield from ((size, name, choice, launches[name]) for name, choices in CHOICES.items() for choice in choices)


def with_tiles(name: str, choice: Any, base: Any) -> None:
    """Set one field."""
    fused.HOPPER = fused.OTHERS = base._replace(**{name: choice})


def tune(args: argparse.Namespace, sizes: list[Size], device: torch.device, output: Path) -> None:
    """Time every choice, after processes that share the choices have compiled them into Triton's cache."""
    base, start = fused.HOPPER, time.perf_counter()
    if args.share:  # one of those processes
        mine, of = map(int, args.share.split(","))
        for i, (_, name, choice, launch) in enumerate(tries(sizes, device, 64)):
            if i % of == mine:
                with_tiles(name, choice, base)
                try:
                    launch()
                except Exception as error:  # too much shared memory or too many registers: so it will be when timed
                    print(name, choice, first_line(error))
            fused.HOPPER = fused.OTHERS = base
        return torch.cuda.synchronize()
    count = max(1, min(12, (os.cpu_count() or 2) - 2))
    command = [sys.executable, __file__, "--tune", "--sizes", args.sizes, "--share"]
    compiling = [subprocess.Popen([*command, f"{i},{count}"]) for i in range(count)]
    for process in compiling:
        process.wait()
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    rows: list[Row] = []
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    for size, name, choice, launch in tries(sizes, device, args.tokens):
        with_tiles(name, choice, base)
        row: Row = size._asdict() | {"field": name, "choice": str(choice), "ms": "", "note": ""}
        try:
            for _ in range(2):
                launch()
            taken = []
            for _ in range(args.rounds):
                flush.zero_()
                flush.zero_()
                taken.append(once(launch, device, flush))
                torch.cuda.synchronize()
            row["ms"] = round(median(ms() for ms in taken), 4)
        except Exception as error:  # the others still run
            row["note"] = first_line(error)
        rows.append(row)
        fused.HOPPER = fused.OTHERS = base
    write_csv([row | provenance(device) for row in rows], output)
    for size in sizes:
        for name in CHOICES:
            found = [row for row in rows if row["field"] == name and row["C"] == size.C and row["ms"] != ""]
            found.sort(key=lambda row: row["ms"])
            if found:  # the best first
                print(f"{size.C:>5} {name:<9}" + "  ".join(f"{row['choice']} {row['ms']}" for row in found))
    print(f"{time.perf_counter() - start:.0f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="", help='"C,intermediate,E,k;…", or numbers of the four sizes, "1;4"')
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--chunk_size", type=int, default=4096, help="tokens of a chunk of the SwiGLU")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--skip", default="", help="contenders to leave out, comma-separated")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--tune", action="store_true", help="time the kernels under each choice of tiles instead")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--output", help="by default results/experts_layer.csv, or experts_layer_tiles.csv")
    args = parser.parse_args()
    start, device = time.perf_counter(), this_device()
    texts = [text for text in args.sizes.split(";") if text] or ["1", "2", "3", "4"]
    sizes = [Size(*map(int, text.split(","))) if "," in text else SIZES[int(text) - 1] for text in texts]
    if args.tune:
        return tune(args, sizes, device, Path(args.output or RESULTS / "experts_layer_tiles.csv"))
    where, rate, rows = provenance(device), rates(device), []
    for size in sizes:
        print(f"{size}: relative error of the experts {check(size, device):.1e}", flush=True)
        rows += [row | where for row in measure(size, args, device, rate)]
        write_csv(rows, args.output or RESULTS / "experts_layer.csv")  # a run that is cut short leaves what it had
        print(f"{time.perf_counter() - start:.0f} s since the start", flush=True)
    report(rows)


if __name__ == "__main__":
    main()
