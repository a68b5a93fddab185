"""Training tokens/s of our Doge, transformers' Doge and transformers' Llama of equal size, in turn, in one run.

One step is forward, backward and a fused AdamW update on the same random tokens, without data loading. The three
models take turns in every round, so that a noisy machine is unfair to none; the median over rounds is reported, with
the FLOP a token costs (the roofline's numerator) and the share of the chip's peak beside it.

    python benchmarks/train_step.py --sizes tiny --row_length 256 --rows 16 --modes eager     # a CPU
    python benchmarks/train_step.py --sizes 20m,60m,160m,320m --modes eager,compiled          # one GPU, bfloat16
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from statistics import median

import torch
from common import BLUE, GREY, ORANGE, RESULTS, SKY, build, provenance, read_csv, seconds, this_device, write_csv

from small_doge.models import config_for
from small_doge.training.estimates import flops_per_token, peak_flops

CHUNKED = "ours, loss in chunks"  # as `doge pretrain` trains: no logits are returned
COLORS = {"ours": BLUE, CHUNKED: SKY, "transformers Doge": GREY, "transformers Llama": ORANGE}
ROWS = {"tiny": 16, "20m": 32, "60m": 16, "160m": 8, "320m": 4}  # micro-batches the dense mask still fits into


def stepper(kind: str, model: torch.nn.Module, compiled: bool, ids: torch.Tensor):
    """A function that trains one step; bfloat16 autocast on a GPU, float32 on a CPU."""
    options = {"skip_logits": True} if kind == CHUNKED else {}
    model.to(ids.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    run = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            loss = run(input_ids=ids, labels=ids, use_cache=False, **options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(size: str, mode: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """One row a model kind."""
    config = config_for(size, vocab_size=args.vocab_size, max_position_embeddings=args.row_length)
    rows = args.rows or ROWS[size]
    ids = torch.randint(0, args.vocab_size, (rows, args.row_length), device=device)
    steps, times, gib = {}, {kind: [] for kind in args.kinds}, {}
    for kind in args.kinds:
        torch.manual_seed(0)
        torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else None
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        steps[kind] = stepper(kind, build(kind, config), mode == "compiled", ids)
        seconds(steps[kind], args.warmup, device)
        gib[kind] = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else float("nan")
        gc.collect()
        torch.cuda.empty_cache() if device.type == "cuda" else None
    for _ in range(args.rounds):
        for kind, step in steps.items():
            times[kind].append(seconds(step, args.repeats, device))
    flops, peak = flops_per_token(config, args.row_length), peak_flops(device, bf16=True)
    results = []
    for kind in args.kinds:
        rate = rows * args.row_length / median(times[kind])
        row = {"size": size, "mode": mode, "model": kind, "rows": rows, "row_length": args.row_length}
        row |= {"tokens_per_second": round(rate), "ms_per_step": round(1e3 * median(times[kind]), 2)}
        row |= {"fastest_ms": round(1e3 * min(times[kind]), 2), "peak_gib": round(gib[kind], 2)}
        row |= {"mflop_per_token": round(flops / 1e6, 1), "mfu": round(rate * flops / peak, 4) if peak else ""}
        base = median(times["transformers Doge"]) if "transformers Doge" in times else float("nan")
        row |= {"times_transformers_doge": round(base / median(times[kind]), 2)}
        results.append(row)
        print(
            f"{size:>5} {mode:<9} {kind:<21} {rate:>12,.0f} tok/s  {row['times_transformers_doge']:>5} x Doge  "
            f"{row['peak_gib']:>6} GiB  MFU {row['mfu']}",
            flush=True,
        )
    return results


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Bars of tokens/s relative to transformers' Doge, a group for each size and mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((row["size"], row["mode"]) for row in rows))
    kinds = list(dict.fromkeys(str(row["model"]) for row in rows))
    figure, axes = plt.subplots(figsize=(max(6.0, 1.6 + 1.3 * len(groups)), 3.6), layout="constrained")
    for i, kind in enumerate(kinds):
        of_kind = {(row["size"], row["mode"]): row for row in rows if row["model"] == kind}
        places = [g + (i - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for g in range(len(groups))]
        heights = [float(str(of_kind[group]["times_transformers_doge"])) for group in groups]
        bars = axes.bar(places, heights, 0.75 / len(kinds), label=kind, color=COLORS.get(kind))
        labels = [f"{int(str(of_kind[group]['tokens_per_second'])) / 1e3:,.0f}k" for group in groups]
        axes.bar_label(bars, labels, fontsize=7)
    axes.set_xticks(range(len(groups)), [f"{size}\n{mode}" for size, mode in groups])
    axes.set_ylabel("training speed, × transformers' Doge")
    axes.set_title(f"Tokens per second, {rows[0]['device']}", fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny")
    parser.add_argument("--modes", default="eager", help="eager, compiled or both")
    parser.add_argument("--kinds", default=f"ours;{CHUNKED};transformers Doge;transformers Llama")
    parser.add_argument("--row_length", type=int, default=2048)
    parser.add_argument("--rows", type=int, help="rows a step; by default what fits the dense mask at each size")
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--draw", metavar="CSV", help="only draw the picture of an earlier run")
    parser.add_argument("--output", default=str(RESULTS / "train_step.csv"))
    args = parser.parse_args()
    if args.draw:
        return draw(read_csv(args.draw), Path(args.draw).with_suffix(".png"))
    args.kinds = args.kinds.split(";")
    device = this_device()
    where = provenance(device)
    rows = []
    for size in args.sizes.split(","):
        for mode in args.modes.split(","):
            rows += [row | where for row in measure(size, mode, args, device)]
            torch.compiler.reset()
            gc.collect()
            path = write_csv(rows, args.output)  # after every size: a run that is cut short leaves what it had
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
