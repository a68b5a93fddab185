"""Dynamic Mask Attention in training, forward and backward: ours, causal attention without a bias, the published mask.

Contenders, in turn, in one run, bfloat16 on a GPU, head size 128:

    ours                    dynamic_mask_attention with gradients to q, k, v and the scores; what the window costs is
                            inside
    cuDNN causal            scaled_dot_product_attention(is_causal=True), which knows neither scores nor window
    FlashAttention-2 causal likewise
    dense mask              the published way: top-k on (B, H, T, T) scores, a float mask of that shape, attention
                            with a gradient through the mask
    window alone            eviction_times, a part of ours

Scores are random by default, the worst case: the kept keys lie scattered. Each time is the median over rounds in which
the contenders take turns, the L2 cache overwritten before each; memory is the peak above what the inputs hold. Beside
them stands the floor: the larger of 14 D FLOP for each (query, kept key) at the measured rate of a large matrix product
and of q, k, v, o, do, dq, dk, dv once through memory at the measured rate of a large copy.

    python benchmarks/dynamic_mask.py                           # one GPU: five shapes, and the bars they are held to
    DOGE_ATTENTION=sparse python benchmarks/dynamic_mask.py     # the Triton kernels, whatever path would be chosen
    python benchmarks/dynamic_mask.py --sweep                   # time and memory against T, B=1, H=8, w=2048
    python benchmarks/dynamic_mask.py --shapes "2;4" --scores tied --grouped --output elsewhere.csv
    python benchmarks/dynamic_mask.py --shapes 1,2,512,128      # a CPU: float32, one plain attention to compare with
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import (
    BLUE,
    FLUSH,
    GREEN,
    GREY,
    ORANGE,
    RED,
    RESULTS,
    Row,
    first_line,
    number,
    once,
    provenance,
    rates,
    read_csv,
    synchronize,
    this_device,
    write_csv,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from small_doge.ops.dynamic_mask import choose_path, dynamic_mask_attention, eviction_times

D = 128  # head size of all published models
OURS, CUDNN, FLASH, PLAIN, DENSE, WINDOW = (
    "ours",
    "cuDNN causal",
    "FlashAttention-2 causal",
    "plain causal",
    "dense mask",
    "window alone",
)
COLORS = {OURS: BLUE, CUDNN: GREEN, FLASH: ORANGE, PLAIN: GREEN, DENSE: RED, WINDOW: GREY}
BACKENDS = {CUDNN: SDPBackend.CUDNN_ATTENTION, FLASH: SDPBackend.FLASH_ATTENTION}
LARGEST_MASK = 16 * 2**30  # bytes; a dense mask this large is not tried, several copies of it would be needed
BUDGET = 4.0  # seconds of rounds a shape


class Shape(NamedTuple):
    """B rows, H query heads, T tokens, a window of w keys, G key/value heads."""

    B: int
    H: int
    T: int
    w: int
    G: int


SHAPES = [
    Shape(32, 2, 2048, 2048, 2),
    Shape(8, 8, 4096, 1024, 8),
    Shape(2, 8, 8192, 1024, 8),
    Shape(1, 8, 32768, 2048, 8),
    Shape(1, 8, 131072, 2048, 8),
]
# What is asked of ours at each of SHAPES: at most so many times the other's milliseconds, or milliseconds.
AT_MOST = {
    CUDNN: [1.5, 1.3, 0.9, 0.4, 0.12],
    DENSE: [None, 1 / 15, 1 / 20, None, None],
    FLASH: [None, None, None, 1 / 4, None],
}
LAST_OVER_FOURTH, WINDOW_MS_AT_FOURTH = 4.4, 0.5


def needed(shape: Shape, width: int) -> tuple[float, float]:
    """FLOP of forward (4 D a pair of query and kept key) and backward (10 D), and bytes of eight tensors once."""
    B, H, T, w, G = shape
    pairs = B * H * (min(T, w) * (min(T, w) + 1) / 2 + max(T - w, 0) * w)
    return 14 * D * pairs, 4 * B * (H + G) * T * D * width  # q, o, do, dq have H heads; k, v, dk, dv have G


def make_scores(kind: str, B: int, M: int, T: int, device: torch.device) -> torch.Tensor:
    """(B, M, T) float32 scores: exp(A · softplus(dt)) with A = −1/2 and normal dt, tied, or in order of position."""
    if kind == "tied":  # as at the start of training: a sliding window
        return torch.ones(B, M, T, device=device)
    s = torch.exp(-0.5 * F.softplus(torch.randn(B, M, T, device=device)))
    return s if kind == "random" else s.sort(dim=-1, descending=kind == "falling").values


def dense_mask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, window: int, future: torch.Tensor
) -> torch.Tensor:
    """Dynamic Mask Attention as published implementations compute it, mask and all; ``future`` is (T, T) bool."""
    repeats = q.shape[1] // k.shape[1]
    lowest = torch.finfo(q.dtype).min
    bias = s.to(q.dtype)[:, :, None, :].expand(-1, -1, q.shape[2], -1).masked_fill(future, lowest)
    if bias.shape[-1] > window:
        best = bias.topk(window, dim=-1, sorted=False).indices
        kept = torch.zeros_like(bias).scatter(-1, best, 1.0)
        bias = bias.masked_fill(kept == 0.0, lowest)
    if repeats > 1:
        k, v, bias = (x.repeat_interleave(repeats, dim=1) for x in (k, v, bias))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def contenders(
    shape: Shape, args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Callable[[], object]], str]:
    """A function for each contender, forward and backward, on the same inputs; and the path that ours takes."""
    B, H, T, w, G = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    q, do = (torch.randn(B, H, T, D, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(B, G, T, D, device=device, dtype=dtype) for _ in range(2))
    s = make_scores(args.scores, B, G, T, device)
    if args.model_layout:
        q, k, v, s, do = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, s, do))
    for x in (q, k, v, s):
        x.requires_grad_()

    def training(attention: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attention(), inputs, do)

    def causal(*backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def attention() -> torch.Tensor:
            if not backend:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
            with sdpa_kernel(*backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)

        return attention

    def too_large() -> None:
        raise MemoryError(f"the (B, H, T, T) mask alone is {B * H * T * T * q.element_size() / 2**30:g} GiB")

    steps = {OURS: training(lambda: dynamic_mask_attention(q, k, v, s, w)[0], q, k, v, s)}
    if device.type == "cuda":
        steps |= {name: training(causal(backend), q, k, v) for name, backend in BACKENDS.items()}
    else:
        steps[PLAIN] = training(causal(), q, k, v)
    if B * H * T * T * q.element_size() < LARGEST_MASK:
        # A model builds the causal part once for all its layers, so it is not counted.
        future = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
        steps[DENSE] = training(lambda: dense_mask(q, k, v, s, w, future), q, k, v, s)
    else:
        steps[DENSE] = too_large
    fixed = s.detach()
    steps[WINDOW] = lambda: eviction_times(fixed, w)
    return steps, choose_path(q, k, w)[0]


def measure(
    shape: Shape, args: argparse.Namespace, device: torch.device, rate: tuple[float, float], flush: torch.Tensor | None
) -> list[Row]:
    """One row a contender."""
    gpu = device.type == "cuda"
    steps, path = contenders(shape, args, device)
    steps = {name: step for name, step in steps.items() if name not in args.skip.split(",")}
    inputs = torch.cuda.memory_allocated() if gpu else 0
    notes, gib, estimates = {}, {}, {}
    for name, step in list(steps.items()):
        try:
            for _ in range(args.warmup):  # the first call compiles and tunes, which takes memory of its own
                if gpu:
                    synchronize(device)
                    torch.cuda.reset_peak_memory_stats()
                taken = once(step, device, flush)
                synchronize(device)
                estimates[name] = taken()
            gib[name] = (torch.cuda.max_memory_allocated() - inputs) / 2**30 if gpu else float("nan")
        except Exception as error:  # out of memory, no such kernel: the others still run, and the row says why
            notes[name] = first_line(error)
            del steps[name]
            gib.pop(name, None)
            estimates.pop(name, None)
        gc.collect()
        torch.cuda.empty_cache() if gpu else None
    # Twenty rounds or more where they are short, five at least where they are long.
    rounds = args.rounds or min(30, max(5, int(1e3 * BUDGET / max(1e-3, sum(estimates.values())))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        order = order[1:] + order[:1]  # so that nobody always comes after the same other one
        taken_by = {name: once(steps[name], device, flush) for name in order}
        synchronize(device)
        for name, ms in taken_by.items():
            times[name].append(ms())

    flop, moved = needed(shape, 2 if gpu else 4)
    floor = 1e3 * max(flop / rate[0], moved / rate[1])
    ms = {name: median(taken) for name, taken in times.items()}
    rows = []
    for name in (*ms, *notes):
        row: Row = {"run": "sweep" if args.sweep else "shapes", **shape._asdict(), "D": D, "scores": args.scores}
        row["layout"] = "B, T, heads" if args.model_layout else "B, heads, T"
        row |= {"contender": name, "path": path if name == OURS else "", "ms": ""}
        if name in ms:
            row |= {"ms": round(ms[name], 4), "fastest_ms": round(min(times[name]), 4), "rounds": rounds}
            row["peak_gib"] = round(gib[name], 4) if gpu else ""
        row |= {"gflop": round(flop / 1e9, 3), "mib": round(moved / 2**20, 2), "floor_ms": round(floor, 4)}
        row |= {"matmul_tflops": round(rate[0] / 1e12, 3), "copy_gbps": round(rate[1] / 1e9, 1)}
        if name in ms and name != WINDOW:
            row["share_of_floor"] = round(floor / ms[name], 4)
            for column, other in (("x_cudnn", CUDNN), ("x_flash", FLASH), ("x_plain", PLAIN), ("x_dense", DENSE)):
                if other in ms:
                    row[column] = round(ms[name] / ms[other], 4)
        row["note"] = notes.get(name, "")
        rows.append(row)
    return rows


def by_shape(rows: list[Row]) -> dict[Shape, dict[str, Row]]:
    """Shape → contender → row."""
    grouped: dict[Shape, dict[str, Row]] = {}
    for row in rows:
        shape = Shape(*(int(str(row[name])) for name in Shape._fields))
        grouped.setdefault(shape, {})[str(row["contender"])] = row
    return grouped


def report(rows: list[Row]) -> None:
    """The table, what failed and why, and the bars."""
    shapes = by_shape(rows)
    names = [name for name in COLORS if any(name in row for row in shapes.values())]
    print(f"\nmilliseconds, forward and backward (peak GiB), {rows[0]['scores']} scores, {rows[0]['device']}")
    print(f"{'B, H, T, w':<22} G " + "".join(f"{name:>25}" for name in names) + "    floor  ours at")
    for shape, row in shapes.items():
        cells = ""
        for name in names:
            ms, gib = number(row.get(name), "ms"), number(row.get(name), "peak_gib")
            cells += f"{'-' if math.isnan(ms) else f'{ms:,.3f}' + ('' if math.isnan(gib) else f' ({gib:.2f})'):>25}"
        first = next(iter(row.values()))
        share = number(row.get(OURS), "share_of_floor")
        ours_at = "-" if math.isnan(share) else f"{share:.1%}"
        label = f"{shape.B}, {shape.H}, {shape.T}, {shape.w}"
        print(f"{label:<22} {shape.G} {cells} {number(first, 'floor_ms'):>8.3f} {ours_at:>8}")
    for row in rows:
        if row["note"]:
            print(f"  {row['contender']} at B={row['B']} H={row['H']} T={row['T']}: {row['note']}")
    print(f"  matrix product {rows[0]['matmul_tflops']} TFLOP/s, copy {rows[0]['copy_gbps']} GB/s")

    bars: list[tuple[str, float, float]] = []
    for i, shape in enumerate(SHAPES):
        row = shapes.get(shape, {})
        ours = number(row.get(OURS), "ms")
        for other, limits in AT_MOST.items():
            if row and limits[i] is not None:
                label = f"{shape.B}, {shape.H}, {shape.T}, {shape.w}: ours / {other}"
                bars.append((label, ours / number(row.get(other), "ms"), limits[i]))
    fourth, last = (shapes.get(SHAPES[i], {}) for i in (3, 4))
    if fourth and last:
        ratio = number(last.get(OURS), "ms") / number(fourth.get(OURS), "ms")
        bars.append((f"ours, T={SHAPES[4].T} / T={SHAPES[3].T}", ratio, LAST_OVER_FOURTH))
    if WINDOW in fourth:
        bars.append((f"window alone at T={SHAPES[3].T}, ms", number(fourth[WINDOW], "ms"), WINDOW_MS_AT_FOURTH))
    for label, value, limit in bars:  # a NaN has missed
        print(f"  {label:<52} {value:>8.4f} <= {limit:<8.4f} {'ok' if value <= limit else 'MISSED'}")


def draw(rows: list[Row], path: Path) -> None:
    """Bars for each shape, or, for a sweep, time and peak memory against the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = by_shape(rows)
    names = [name for name in COLORS if any(number(row.get(name), "ms") > 0 for row in shapes.values())]
    first = rows[0]
    floors = [number(next(iter(row.values())), "floor_ms") for row in shapes.values()]
    if first["run"] == "sweep":
        panels = [("ms", "forward + backward, ms")]
        if any(number(row, "peak_gib") > 0 for row in rows):  # not measured on a CPU
            panels.append(("peak_gib", "peak memory above the inputs, GiB"))
        figure, axes_of = plt.subplots(
            1, len(panels), figsize=(max(6.4, 4.8 * len(panels)), 4.2), layout="constrained", squeeze=False
        )
        lengths = [shape.T for shape in shapes]
        for axes, (column, label) in zip(axes_of[0], panels, strict=True):
            for name in names:
                if (name, column) == (WINDOW, "peak_gib"):
                    continue
                heights = [number(row.get(name), column) for row in shapes.values()]
                style = {"linestyle": "--", "linewidth": 1.2} if name == WINDOW else {"linewidth": 2}
                axes.plot(lengths, heights, marker="o", markersize=4, color=COLORS[name], label=name, **style)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(lengths, [f"{T // 1024}k" if T % 1024 == 0 else str(T) for T in lengths])
            axes.set_xlabel("tokens T")
            axes.set_ylabel(label)
            axes.grid(color="#E4E4E4", linewidth=0.8)
        axes_of[0][0].plot(lengths, floors, color="black", linestyle=":", label="floor")
        handles, labels = axes_of[0][0].get_legend_handles_labels()
        columns = len(labels) if len(panels) > 1 else 3
        figure.legend(handles, labels, frameon=False, fontsize=9, ncols=columns, loc="outside lower center")
        shape = next(iter(shapes))
        what = f"B={shape.B}, H={shape.H}, G={shape.G}, w={shape.w:,}"
    else:
        figure, axes = plt.subplots(figsize=(max(7.0, 1.2 + 2.2 * len(shapes)), 4.4), layout="constrained")
        width = 0.84 / len(names)
        for i, name in enumerate(names):
            heights = [number(row.get(name), "ms") for row in shapes.values()]
            places = [g + (i - (len(names) - 1) / 2) * width for g in range(len(shapes))]
            bars = axes.bar(places, heights, 0.92 * width, label=name, color=COLORS[name])
            labels = ["" if math.isnan(ms) else f"{ms:.3g}" for ms in heights]
            axes.bar_label(bars, labels, fontsize=7, padding=1)
        for g, floor in enumerate(floors):
            label = "floor" if g == 0 else None
            axes.hlines(floor, g - 0.46, g + 0.46, color="black", linestyle=":", linewidth=1.4, label=label)
        ticks = [
            f"{shape.B} × {shape.H} heads"
            + (f" ({shape.G} k/v)" if shape.G != shape.H else "")
            # one line each, so that neighbours do not run into each other
            + f"\nT = {shape.T:,}\nw = {shape.w:,}"
            for shape in shapes
        ]
        axes.set_xticks(range(len(shapes)), ticks, fontsize=9)
        axes.set_yscale("log")
        axes.margins(y=0.08)
        axes.set_ylabel("forward + backward, ms")
        figure.legend(frameon=False, fontsize=9, ncols=len(names) + 1, loc="outside lower center")
        what = "less is better"
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Dynamic Mask Attention in training, {first['device']}\nD={D}, {first['scores']} scores, {what}", fontsize=10
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_shapes(args: argparse.Namespace, device: torch.device) -> list[Shape]:
    """The shapes asked for, each followed by its grouped form if that is asked for too."""
    if args.sweep:
        B, H, w, longest = map(int, args.sweep.split(","))
        return [Shape(B, H, w << i, w, H) for i in range((longest // w).bit_length())]
    texts = (args.shapes or ("1;2;3;4;5" if device.type == "cuda" else "1,2,512,128")).split(";")
    shapes = []
    for text in texts:
        B, H, T, w = map(int, text.split(",")) if "," in text else SHAPES[int(text) - 1][:4]
        shapes.append(Shape(B, H, T, w, H))
        if args.grouped and H > 1:
            shapes.append(Shape(B, H, T, w, H // 2))
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help='"B,H,T,w;…", or numbers of the five default shapes, "2;4"')
    parser.add_argument("--sweep", nargs="?", const="1,8,2048,131072", metavar="B,H,w,T", help="T doubling from w")
    parser.add_argument("--scores", default="random", choices=("random", "tied", "rising", "falling"))
    parser.add_argument("--grouped", action="store_true", help="each shape with half as many key/value heads, too")
    parser.add_argument(
        "--model_layout",
        action="store_true",
        help="inputs as a model has them, views of (B, T, heads, D) and (B, T, G)",
    )
    parser.add_argument("--skip", default="", help="contenders to leave out, comma-separated")
    parser.add_argument("--rounds", type=int, help="by default 5 to 30, what fits some seconds a shape")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--draw", metavar="CSV", help="only draw the picture and print the table of an earlier run")
    parser.add_argument("--output", help="by default results/dynamic_mask.csv, or dynamic_mask_sweep.csv")
    args = parser.parse_args()
    if args.draw:
        rows = read_csv(args.draw)
        draw(rows, Path(args.draw).with_suffix(".png"))
        return report(rows)
    start, device = time.perf_counter(), this_device()
    where, rate = provenance(device), rates(device)
    if device.type == "cuda":
        import triton

        where["triton"] = triton.__version__
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    output = args.output or RESULTS / ("dynamic_mask_sweep.csv" if args.sweep else "dynamic_mask.csv")
    shapes, rows = parse_shapes(args, device), []
    for i, shape in enumerate(shapes):
        rows += [row | where for row in measure(shape, args, device, rate, flush)]
        path = write_csv(rows, output)  # after every shape: a run that is cut short leaves what it had
        print(f"{i + 1} of {len(shapes)}: {shape}, {time.perf_counter() - start:.0f} s since the start", flush=True)
    draw(rows, path.with_suffix(".png"))
    report(rows)


if __name__ == "__main__":
    main()
