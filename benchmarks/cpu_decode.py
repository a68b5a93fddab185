"""What a token costs on a CPU: our engine, transformers' Doge and llama.cpp in turn, one row, in one run.

    python benchmarks/cpu_decode.py                                  # 20m and 60m, 1 and 2 threads, some ten minutes
    python benchmarks/cpu_decode.py --sizes 20m,60m,160m,320m
    python benchmarks/cpu_decode.py --sizes 20m --contexts 2048,32768 --threads 1    # what a long text costs

Random weights. Ours and transformers' are Doge models; llama.cpp runs a Llama of the same hidden size, layers, heads
and intermediate size, embeddings tied, with the same bits a weight: float32, bf16, q8_0 (ours int8), q4_0 (ours int4).
Its keys and values are float16, its default; ours are float32 with float32 weights and bf16 else. A context is read
before the clock starts; one that is longer than the window is stood for by random keys, ranks and values (ours), and by
random keys and values (transformers). llama.cpp reads contexts within the window only: no Llama of its size drops keys.

All take turns, some tokens each, round after round, and the figure is the median over rounds: a machine that is shared
slows all of them. With one thread the clock is this process's processor time, with more the one on the wall. Then the
machine rests before each turn: threads of OpenMP (llama.cpp, torch) spin for some 40 ms after their last work, on cores
that the next contender is to use.

llama.cpp is used where `llama_cpp` and `gguf` can be imported (`llama.py` says how) and is no dependency.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import BLUE, GREEN, GREY, ORANGE, RED, RESULTS, SKY, Row, number, provenance, read_csv, write_csv
from decode import EAGER, SDPA, random_model, transformers_at
from llama import Llama, llama_is_here, write_llama

from small_doge.inference.engine import Engine, Session
from small_doge.inference.engine.numbers import ARRIVALS, grid
from small_doge.inference.engine.pack import read, write
from small_doge.inference.engine.weights import pack_model
from small_doge.models import config_for

OURS, LLAMA = "ours", "llama.cpp"
SAME_BITS = {"float32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
CPU = torch.device("cpu")
# Of llama.cpp in bf16 and int8, of transformers' Doge in float32 with int8, and of our own time at a short context.
BARS = {"20m": 1.0, "60m": 1.0, "160m": 0.9, "320m": 0.9}
TIMES_DOGE, LONG_CONTEXT = 10.0, 1.3
REST, UNTIMED = 0.1, 3  # seconds before a turn, and tokens of it before its clock starts


class Ours:
    """A session of our engine in the middle of a text; each call generates a token, greedily."""

    def __init__(self, packed: Any, context: int, threads: int):
        self.engine = Engine(packed, threads)
        self.session, self.token = self.engine.session(), 1
        if context <= self.engine.shape.window:
            self.session.feed(np.random.default_rng(0).integers(0, self.engine.shape.vocabulary, context))
        else:
            fill(self.session, context)

    def __call__(self) -> None:
        self.token = int(self.session.feed((self.token,)).argmax())


def fill(session: Session, context: int) -> None:
    """Stand for a text of so many tokens: slots all taken, by random keys that arrived at random places of it."""
    random, slots = np.random.default_rng(0), session.slots
    L, M, _ = slots.s.shape
    used = session.engine.shape.window + session.engine.shape.local_window
    for x in (slots.k, slots.v):
        values = random.standard_normal(len(x) // 4, dtype=np.float32)
        x[:] = values.view(np.uint8)
        if session.engine.shape.cache_kind:  # the upper halves of so many floats, and again
            halves = (values.view(np.uint32) >> 16).astype(np.uint16)
            x[:] = np.concatenate([halves, halves]).view(np.uint8)
    slots.s[..., :used] = np.exp(random.uniform(-1, 1, (L, M, used)))
    for layer in range(L):
        for m in range(M):
            arrivals = np.sort(random.choice(context, used, replace=False))
            places = np.array([grid(s) for s in slots.s[layer, m, :used]], np.int64)
            slots.ranks[layer, m, :used] = places * ARRIVALS + arrivals
    session.seen = context


def measure(size: str, context: int, threads: int, folder: Path, args: argparse.Namespace) -> list[Row]:
    """One row a contender and precision."""
    torch.set_num_threads(threads)
    config = config_for(size, vocab_size=args.vocab_size, max_position_embeddings=context + 4096)
    doge = random_model(OURS, config, CPU, torch.float32)
    contenders: dict[tuple[str, str], Any] = {}
    for precision in args.precisions.split(","):
        packed = folder / f"{size}-{precision}.doge"
        if not packed.exists():
            write(pack_model("", precision, doge), packed)
        contenders[OURS, precision] = Ours(read(packed), context, threads)
        if args.llama and context <= config.keep_window_size:
            path = folder / f"{size}-{precision}.gguf"
            if not path.exists():
                write_llama(config, SAME_BITS[precision], path)
            contenders[LLAMA, precision] = Llama(path, context, threads, config.vocab_size)
    del doge
    for name in (EAGER, SDPA):
        if name.split(", ")[1] in args.transformers.split(","):
            contenders[name, "float32"] = transformers_at(name, config, context, CPU, torch.float32)
    times = take_turns(contenders, threads, args)
    base = min((median(t) for (name, _), t in times.items() if name in (EAGER, SDPA)), default=float("nan"))
    rows = []
    for (name, precision), taken in times.items():
        ms = 1e3 * median(taken)
        row: Row = {"size": size, "threads": threads, "context": context, "window": config.keep_window_size}
        row |= {"contender": name, "precision": precision, "ms_per_token": round(ms, 4)}
        row |= {"fastest_ms": round(1e3 * min(taken), 4), "tokens_per_second": round(1e3 / ms, 1)}
        row |= {"times_transformers": round(1e3 * base / ms, 3), "times_llama_cpp": ""}
        if (LLAMA, precision) in times and name == OURS:
            ratios = [theirs / ours for ours, theirs in zip(taken, times[LLAMA, precision], strict=True)]
            row["times_llama_cpp"] = round(median(ratios), 3)
        if name == OURS:
            row["state_mib"] = round(contenders[name, precision].session.nbytes / 2**20, 2)
        rows.append(row | {"clock": "processor" if threads == 1 else "wall", "rounds": args.rounds})
    for contender in contenders.values():
        with contextlib.suppress(AttributeError):
            (contender.engine if isinstance(contender, Ours) else contender).close()
    return rows


def take_turns(contenders: dict[Any, Callable[[], None]], threads: int, args: argparse.Namespace) -> dict[Any, Any]:
    """Seconds a token of each contender in each round, whose turns last about ``args.turn`` seconds."""
    clock = time.process_time if threads == 1 else time.perf_counter
    repeats = {}
    for name, generate in contenders.items():
        generate()
        start = time.perf_counter()
        for _ in range(2):
            generate()
        repeats[name] = max(2, min(64, round(args.turn * 2 / (time.perf_counter() - start))))
    times: dict[Any, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(args.rounds):
        order.reverse()  # so that none always comes after the same one
        for name in order:
            if threads > 1:
                time.sleep(REST)
            for _ in range(UNTIMED):  # what is held near the processor is of the one before
                contenders[name]()
            start = clock()
            for _ in range(repeats[name]):
                contenders[name]()
            times[name].append((clock() - start) / repeats[name])
    return times


def report(rows: list[Row]) -> None:
    """A table, and the bars."""
    print(f"\n{'size':>5} {'thr':>3} {'context':>7} {'contender':<26} {'precision':<9} {'ms':>9} {'tokens/s':>9} "
          f"{'x Doge':>7} {'x llama.cpp':>11}")  # fmt: skip
    for row in rows:
        print(f"{row['size']:>5} {row['threads']:>3} {row['context']:>7} {row['contender']:<26} {row['precision']:<9} "
              f"{number(row, 'ms_per_token'):>9.3f} {number(row, 'tokens_per_second'):>9.1f} "
              f"{number(row, 'times_transformers'):>7.1f} {number(row, 'times_llama_cpp'):>11.2f}")  # fmt: skip
    for row in rows:
        if row["contender"] != OURS:
            continue
        where = f"{row['size']}, {row['threads']} threads, {row['precision']} at {row['context']}"
        times = number(row, "times_llama_cpp")
        if row["precision"] in ("bf16", "int8") and times < BARS[row["size"]]:
            print(f"MISSED: {where}: {times:.2f} of llama.cpp, bar {BARS[row['size']]}")
        if row["precision"] == "int8" and number(row, "times_transformers") < TIMES_DOGE:
            print(f"MISSED: {where}: {number(row, 'times_transformers'):.1f} times transformers, bar {TIMES_DOGE}")
        for other in rows:
            same = all(other[name] == row[name] for name in ("size", "threads", "contender", "precision"))
            if same and int(other["context"]) == int(row["window"]) < int(row["context"]):
                ratio = number(row, "ms_per_token") / number(other, "ms_per_token")
                word = "MISSED" if ratio > LONG_CONTEXT else "held"
                print(f"{word}: {where}: {ratio:.2f} of the time at {other['context']}, bar {LONG_CONTEXT}")


def draw(rows: list[Row], path: Path) -> None:
    """Tokens a second at the shortest context, a panel a number of threads, a group a size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = sorted({int(row["threads"]) for row in rows})
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    bars = [(OURS, p, c) for p, c in zip(SAME_BITS, (GREEN, SKY, BLUE, ORANGE), strict=True)]
    bars = [bar for ours in bars for bar in (ours, (LLAMA, ours[1], GREY))] + [(EAGER, "float32", RED)]
    figure, axes = pyplot.subplots(1, len(threads), figsize=(6 * len(threads), 4), squeeze=False, sharey=True)
    for axis, n in zip(axes[0], threads, strict=True):
        shortest = min(int(row["context"]) for row in rows)
        here = [row for row in rows if int(row["threads"]) == n and int(row["context"]) == shortest]
        for j, (name, precision, color) in enumerate(bars):
            found = {row["size"]: number(row, "tokens_per_second") for row in here
                     if (row["contender"], row["precision"]) == (name, precision)}  # fmt: skip
            places = [i + (j - len(bars) / 2) * 0.09 for i in range(len(sizes))]
            label = f"{name}, {precision}" if name != LLAMA else ("llama.cpp, same bits" if j == 1 else None)
            axis.bar(places, [found.get(s, 0) for s in sizes], 0.085, color=color, label=label)
        axis.set(yscale="log", xticks=range(len(sizes)), xticklabels=sizes, title=f"{n} thread{'s' * (n > 1)}")
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("tokens / s, one row, CPU")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="20m,60m")
    parser.add_argument("--contexts", default="64")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--precisions", default=",".join(SAME_BITS))
    parser.add_argument("--transformers", default="eager,sdpa", help="its attentions; nothing leaves it out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn", type=float, default=0.05, help="seconds of a contender's turn, about")
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_decode_cpu.csv")
    parser.add_argument("--draw", metavar="CSV", type=Path, help="only print and draw an earlier run")
    args = parser.parse_args()
    if args.draw:
        rows = read_csv(args.draw)
        draw(rows, args.draw.with_suffix(".png"))
        return report(rows)
    args.llama, rows = llama_is_here(), []
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes.split(","):
            for context in map(int, args.contexts.split(",")):
                for threads in map(int, args.threads.split(",")):
                    found = measure(size, context, threads, Path(folder), args)
                    rows += [row | (provenance(CPU) | {"threads": threads}) for row in found]
                    gc.collect()
                    write_csv(rows, args.output)  # after every one: a run that is cut short leaves what it had
                    print(f"{size} at {context:,} tokens, {threads} threads: done", flush=True)
    report(rows)
    draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
