"""Milliseconds of four feed-forward designs with experts, at equal size, in one run: SEIMoE, PKM, PEER, CDMoE.

    python benchmarks/experts.py                                      # one GPU, bfloat16, 16,384 tokens
    OMP_NUM_THREADS=1 python benchmarks/experts.py --device cpu       # float32, few tokens, a small hidden size
    python benchmarks/experts.py --level --output results/experts_level_h200.csv
    python benchmarks/experts.py --draw results/experts_h200.csv      # table and picture of an earlier run

The layers, and what equal size means, are in ``feed_forward.py``: the same hidden size C, N experts of which a token
takes k = ratio · N, and, for SEIMoE, as many active parameters as CDMoE has, to 16 hidden units. PKM and PEER replace
the SwiGLU in their papers and have none here, so they are smaller; with ``--level`` they get one beside them that makes
them equal too. Parameters are printed.

Both passes are measured: forward alone without gradients, which is what the picture shows (nothing that we found says
what the published figure timed), and forward and backward with gradients to the input and all parameters. Balance
losses are left out. Medians over rounds in which the contenders take turns. On a GPU the L2 cache is overwritten before
each; with one thread on a CPU the clock is the processor time of this process, since the machine may be shared. What
stores tokens × k × C numbers goes through its tokens in pieces that fit ``--gib``, and the row says in how many: 16,384
tokens at 1,024 experts and ratio 1 are 32 GiB a copy.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    BLUE,
    FLUSH,
    GREEN,
    ORANGE,
    RED,
    RESULTS,
    Row,
    first_line,
    number,
    once,
    provenance,
    read_csv,
    synchronize,
    this_device,
    write_csv,
)
from feed_forward import (
    COPIES,
    GATHERS,
    GROUPED,
    LOOP,
    MEMORY,
    OURS,
    PEER_GATHERS,
    PEER_OURS,
    check,
    makers,
    parameters,
)

FORWARD, TRAINING = "forward", "forward and backward"
STYLES = {  # the plain form of a design is dashed where there is a better one
    LOOP: (RED, "--"),
    GROUPED: (RED, "-"),
    MEMORY: (ORANGE, "-"),
    PEER_GATHERS: (GREEN, "--"),
    PEER_OURS: (GREEN, "-"),
    GATHERS: (BLUE, "--"),
    OURS: (BLUE, "-"),
}
PUBLISHED = {  # milliseconds at 1,024 experts
    "CDMoE": {0.25: 54, 0.5: 100, 0.75: 148, 1.0: 201},
    "SEIMoE": {0.25: 595, 0.5: 921, 0.75: 1219, 1.0: 1497},
    "PKM": {0.25: 110, 0.5: 191, 0.75: 295, 1.0: 442},
}
SLOW = 10  # seconds after which the first passes, which compile and find memory, are told of


def steps_of(layer: Any, x: torch.Tensor, do: torch.Tensor, pieces: list[int]) -> dict[str, Callable[[], object]]:
    """Both passes of a layer, its tokens in so many pieces; gradients of the parameters are summed over them."""
    parameters = list(layer.parameters())

    @torch.no_grad()
    def forward() -> object:
        return [layer(part) for part in x.chunk(pieces[0])]

    def training() -> object:
        dx, total = [], None
        for part, d in zip(x.chunk(pieces[1]), do.chunk(pieces[1]), strict=True):
            part = part.detach().requires_grad_()
            first, *rest = torch.autograd.grad(layer(part), [part, *parameters], d)
            dx.append(first)
            if total is None:
                total = rest
            else:
                torch._foreach_add_(total, rest)
        return dx, total

    return {FORWARD: forward, TRAINING: training}


def measure(N: int, ratio: float, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """One row a contender and pass."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    k = round(ratio * N)
    torch.manual_seed(0)
    x, do = (torch.randn(args.tokens, args.hidden, device=device, dtype=dtype) for _ in range(2))
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device) if gpu else None

    # Other jobs on a shared CPU hit a step that takes longer than their turn more often than a shorter one.
    processor = not gpu and torch.get_num_threads() == 1

    def timed(step: Callable[[], object]) -> Callable[[], float]:
        if processor:
            start = time.process_time()
            step()
            passed = time.process_time() - start
            return lambda: 1e3 * passed
        if flush is not None:
            for _ in range(args.flushes):  # the GPU is busy while Python launches the step
                flush.zero_()
        return once(step, device, flush)

    rows: dict[tuple[str, str], Row] = {}
    steps: dict[tuple[str, str], Callable[[], object]] = {}
    estimate = 0.0
    for name, make in makers(args.hidden, args.intermediate, N, k, args.level).items():
        if name in args.skip.split(";"):
            continue
        layer = make().to(device, dtype)
        total, active = parameters(layer, N, k)
        row: Row = {"experts": N, "ratio": ratio, "k": k, "contender": name, "hidden": args.hidden}
        row["clock"] = "GPU" if gpu else "processor" if processor else "wall"
        row |= {"intermediate": args.intermediate, "tokens": args.tokens, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"parameters": total, "active_parameters": active, "level": int(args.level)}
        copy = args.tokens * k * args.hidden * x.element_size() / (args.gib * 2**30)
        pieces = [max(1, math.ceil(copy * copies)) for copies in COPIES[name]]
        for (what, step), number_of in zip(steps_of(layer, x, do, pieces).items(), pieces, strict=True):
            empty = dict.fromkeys(("ms", "fastest_ms", "rounds", "peak_gib", "note"), "")
            rows[name, what] = row | {"pass": what, "pieces": number_of} | empty
            try:
                before = torch.cuda.memory_allocated() if gpu else 0
                for _ in range(2 if gpu else 1):
                    torch.cuda.reset_peak_memory_stats() if gpu else None
                    begun = time.perf_counter()
                    taken = timed(step)
                    synchronize(device)
                    waited = time.perf_counter() - begun
                    if waited > SLOW:
                        print(f"  {name}, {what}: {waited:.0f} s for one pass of {taken():.0f} ms", flush=True)
                estimate += 1e-3 * taken()
                steps[name, what] = step
                if gpu:
                    rows[name, what]["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
            except Exception as error:  # out of memory, no such operator: the others still run, and the row says why
                rows[name, what]["note"] = first_line(error)
            gc.collect()
    rounds = args.rounds or min(40, max(3, int(args.seconds / estimate)))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    order = list(steps)
    for _ in range(rounds):
        order = order[1:] + order[:1]  # so that nobody always comes after the same other one
        for key in order:
            taken = timed(steps[key])
            synchronize(device)
            times[key].append(taken())
    for key, taken_by in times.items():
        rows[key] |= {"ms": round(median(taken_by), 4), "fastest_ms": round(min(taken_by), 4), "rounds": rounds}
    return list(rows.values())


def report(rows: list[Row]) -> None:
    """Parameters, milliseconds, and what was published beside what is here."""
    found = {(int(row["experts"]), float(row["ratio"]), row["contender"], row["pass"]): row for row in rows}
    cases = list(dict.fromkeys(key[:2] for key in found))
    names = [name for name in STYLES if any(key[2] == name for key in found)]
    first = rows[0]
    print(f"\n{first['device']}, {first['tokens']} tokens, {first['dtype']}, C {first['hidden']}")
    for title, what, column, scale in (
        ("parameters, millions", FORWARD, "parameters", 1e-6),
        ("of these active", FORWARD, "active_parameters", 1e-6),
        ("milliseconds forward", FORWARD, "ms", 1.0),
        ("milliseconds forward and backward", TRAINING, "ms", 1.0),
    ):
        print(f"\n{title:<34}" + "".join(f"{name:>19}" for name in names))
        for N, ratio in cases:
            cells = "".join(f"{scale * number(found.get((N, ratio, name, what)), column):>19.3f}" for name in names)
            print(f"{N:>8} experts, ratio {ratio:<12g}{cells}")
    for row in rows:
        if row["note"]:
            print(f"  {row['contender']}, {row['experts']} experts, ratio {row['ratio']}, {row['pass']}: {row['note']}")

    def best(N: int, ratio: float, design: str) -> float:
        """Of the forms of a design the faster one, forward."""
        ms = [number(found.get((N, ratio, name, FORWARD)), "ms") for name in names if name.split(",")[0] == design]
        return min((t for t in ms if not math.isnan(t)), default=float("nan"))

    print("\nforward, times CDMoE, each design in its faster form (published, at 1,024 experts)")
    for N, ratio in cases:
        cells = ""
        for design in ("SEIMoE", "PKM", "PEER"):
            here = best(N, ratio, design) / best(N, ratio, "CDMoE")
            there = PUBLISHED.get(design, {}).get(ratio) if N == 1024 else None
            cells += f"{design:>10} {here:6.2f}" + (f" ({there / PUBLISHED['CDMoE'][ratio]:.2f})" if there else " " * 7)
        print(f"{N:>8} experts, ratio {ratio:<12g}{cells}")


def draw(rows: list[Row], path: Path, what: str) -> None:
    """A panel a number of experts: milliseconds on a log axis against the share of experts that a token takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["pass"] == what and number(row, "ms") > 0]
    counts = sorted({int(row["experts"]) for row in rows})
    figure, panels = plt.subplots(
        1, len(counts), figsize=(2.7 * len(counts) + 0.6, 4.0), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, N in zip(panels[0], counts, strict=True):
        for name, (color, line) in STYLES.items():
            points = sorted(
                (float(row["ratio"]), number(row, "ms"))
                for row in rows
                if int(row["experts"]) == N and row["contender"] == name
            )
            if points:
                axes.plot(*zip(*points, strict=True), line, color=color, marker="o", markersize=3.5, label=name)
        axes.set_title(f"{N:,} experts", fontsize=10)
        axes.set_yscale("log")
        axes.set_xticks(sorted({float(row["ratio"]) for row in rows}))
        axes.set_xlabel("share of experts a token takes")
        axes.grid(color="#E4E4E4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    clock = " of processor time" if rows[0].get("clock") == "processor" else ""
    panels[0][0].set_ylabel(f"ms{clock}, {what}")
    panels[0][0].yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=len(labels), loc="outside lower center")
    first = rows[0]
    size = f"{int(first['tokens']):,} tokens of {int(first['hidden']):,}, {first['dtype']}"
    size += ", equal active parameters" if number(first, "level") == 1 else ""
    figure.suptitle(f"Feed-forward designs with experts, {first['device']}, {size}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda or cpu; by default a GPU if there is one")
    parser.add_argument("--experts", default="16,64,256,1024")
    parser.add_argument("--ratios", default="0.25,0.5,0.75,1")
    parser.add_argument("--tokens", type=int, help="16,384 on a GPU, 128 on a CPU")
    parser.add_argument("--hidden", type=int, help="C: 1,024 on a GPU, 256 on a CPU")
    parser.add_argument("--intermediate", type=int, help="F, of the SwiGLU in CDMoE: 2,048 on a GPU, 1,024 on a CPU")
    parser.add_argument("--gib", type=float, help="what copies of tokens × k × C may take: 24 on a GPU, 1 on a CPU")
    parser.add_argument("--level", action="store_true", help="PKM and PEER with the SwiGLU that makes them equal")
    parser.add_argument("--rounds", type=int, help="by default as many as --seconds have room for, 3 to 40")
    parser.add_argument("--seconds", type=float, default=2.0, help="for the rounds of one number of experts and ratio")
    parser.add_argument("--flushes", type=int, default=4)
    parser.add_argument("--skip", default="", help=f"contenders to leave out, by ';': {'; '.join(STYLES)}")
    parser.add_argument("--pass", dest="what", choices=(FORWARD, TRAINING), default=FORWARD, help="what is drawn")
    parser.add_argument("--draw", type=Path, metavar="CSV", help="only print and draw an earlier run")
    parser.add_argument("--output", type=Path, help="by default results/experts.csv")
    args = parser.parse_args()
    if args.draw:
        rows = read_csv(args.draw)
        draw(rows, args.draw.with_suffix(".png"), args.what)
        return report(rows)
    device = torch.device(args.device or this_device().type)
    gpu = device.type == "cuda"
    defaults = {"tokens": (16384, 128), "hidden": (1024, 256), "intermediate": (2048, 1024), "gib": (24.0, 1.0)}
    for name, (on_gpu, on_cpu) in defaults.items():
        setattr(args, name, getattr(args, name) or (on_gpu if gpu else on_cpu))
    check(device, torch.bfloat16 if gpu else torch.float32)
    begin, rows, where = time.perf_counter(), [], provenance(device)
    output = args.output or RESULTS / "experts.csv"
    cases = [(int(N), float(ratio)) for N in args.experts.split(",") for ratio in args.ratios.split(",")]
    for i, (N, ratio) in enumerate(cases):
        rows += [row | where for row in measure(N, ratio, args, device)]
        gc.collect()
        torch.cuda.empty_cache() if gpu else None
        write_csv(rows, output)  # after every one: a run that is cut short leaves what it had
        passed = time.perf_counter() - begin
        print(f"{N} experts, ratio {ratio:g}: {i + 1} of {len(cases)}, {passed:.0f} s since the start", flush=True)
    draw(rows, output.with_suffix(".png"), args.what)
    report(rows)


if __name__ == "__main__":
    main()
