"""Tokens/s of pretraining: our Doge, transformers' Doge and its Llama of equal size, in turn, in one run.

The Trainer trains as `doge pretrain` does: compiled, bfloat16, data loaded by workers, gradients accumulated to the
recipe's tokens a step (or to --micro_batches), clipped, fused AdamW. Ours sees documents apart; transformers' models
get the same rows as one text, which is faster for them. A CUDA event marks the end of every step; the first ones, in
which it compiles, are left out, and the median over the others is reported, with the FLOP a token costs (the
roofline's numerator) and the share of the chip's peak beside it. ``floor_tokens_per_second`` is what ours would have if
all products ran at the rate of a large one and all that lies between them at that of a large copy, both measured.

    python benchmarks/train_throughput.py --sizes 20m,60m,160m,320m        # one GPU
    python benchmarks/train_throughput.py --sizes 60m,160m,320m --layers "transformers Llama"   # it is faster so
    python benchmarks/train_throughput.py --sizes 20m --kinds ours --profile
    python benchmarks/train_throughput.py --sizes 20m,40m-moe --kinds ours    # what experts cost
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    BLUE,
    GREY,
    ORANGE,
    RESULTS,
    build,
    first_line,
    provenance,
    rates,
    read_csv,
    this_device,
    write_csv,
)
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from small_doge.data.packing import PackedTokens, collate
from small_doge.models import SIZES, DogeConfig, config_for
from small_doge.training.arguments import PretrainArguments
from small_doge.training.estimates import flops_per_token, peak_flops
from small_doge.training.pretrain import PretrainTrainer, _Run

OURS, DOGE, LLAMA = "ours", "transformers Doge", "transformers Llama"
COLORS = {OURS: BLUE, DOGE: GREY, LLAMA: ORANGE}
TOKENS = {"20m": 1 << 19, "60m": 1 << 20, "160m": 3 << 19, "320m": 1 << 21}  # a step, as in the recipes
# Micro-batches: of ours what recipes find, of the others the largest that fit.
ROWS = {
    OURS: {"20m": 128, "60m": 64, "160m": 64, "320m": 64},
    DOGE: {"20m": 32, "60m": 16, "160m": 8, "320m": 4},
    LLAMA: {"20m": 128, "60m": 64, "160m": 64, "320m": 48},
}
BARS = {"20m": 2.5e6, "60m": 750e3, "160m": 330e3, "320m": 180e3}
KEPT = {"input_ids", "labels"}


class RandomDocuments(Dataset):
    """Rows of random tokens, cut into documents of some 1,000 tokens on average, as those of web text are."""

    def __init__(self, rows: int, row_length: int, vocab_size: int):
        self.rows, self.row_length, self.vocab_size = rows, row_length, vocab_size

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(index)
        ids = torch.randint(0, self.vocab_size, (self.row_length,), generator=g)
        starts = torch.rand(self.row_length, generator=g) < 1e-3
        starts[0] = True
        at = torch.arange(self.row_length)
        positions = at - torch.where(starts, at, 0).cummax(0).values
        return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


class Plain(PretrainTrainer):
    """The same Trainer for transformers' models, which compute their loss from logits."""

    compute_loss = Trainer.compute_loss


class Clock(TrainerCallback):
    """When each step ended (on a GPU by its events), and a profile of the last one if asked for."""

    def __init__(self, profile: bool = False):
        self.ends: list[Any] = []
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if profile else None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.profiler and state.global_step == state.max_steps - 1:
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        else:
            self.ends.append(time.perf_counter())
        if self.profiler and state.global_step == state.max_steps:
            torch.cuda.synchronize()
            self.profiler.stop()
            print(self.profiler.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=70))

    def seconds(self, skip: int) -> list[float]:
        """Of each step after the first ``skip``."""
        counted = itertools.pairwise(self.ends[skip - 1 :])
        if not torch.cuda.is_available():
            return [b - a for a, b in counted]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in counted]


def floor(config: DogeConfig, parameters: int, seen: float, step: int, micro: int, rate: tuple[float, float]) -> float:
    """Seconds a token of a dense Doge: its products, and what kernels between them read and write at least.

    Of a layer that is the residual stream in float32 and what products read and write in 16 bits, both ways: 24 C and
    32 C bytes of two norms with their residuals, 10 (H + G) D of rotary q and k, 18 I of the SwiGLU, some of which
    products can do while they multiply (ops/products.py). Logits become their gradient once; AdamW reads and writes 28
    bytes a parameter and step, and weights are cast twice a micro-batch.

    Args:
        seen: keys that a token attends to on average.
        step, micro: tokens.
        rate: FLOP/s and bytes/s.
    """
    H, G, _, D = config.heads
    C, layers = config.hidden_size, config.num_hidden_layers
    whole = flops_per_token(config, 1) - 6.0 * layers * H * D  # of the weights: a row of one token sees half a key
    flop = whole + 12.0 * layers * H * D * seen
    moved = layers * (56 * C + 10 * (H + G) * D + 18 * config.intermediate_size) + 4 * config.vocab_size + 24 * C
    return flop / rate[0] + (moved + 28 * parameters / step + 12 * parameters / micro) / rate[1]


def measure(size: str, kind: str, args: argparse.Namespace, data: Any, rate: tuple[float, float]) -> dict[str, Any]:
    """One row: a model of one kind and size, trained for some steps."""
    start, device, row_length = time.perf_counter(), this_device(), args.row_length
    config = config_for(size, vocab_size=args.vocab_size, max_position_embeddings=row_length)
    dense = next(name for name in TOKENS if SIZES[name]["hidden_size"] == SIZES[size]["hidden_size"])  # of its batches
    rows = args.rows or ROWS[kind][dense]
    micro_batches = min(TOKENS[dense] // (rows * row_length), args.micro_batches)
    tokens = rows * row_length * micro_batches
    torch.manual_seed(0)
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model, clock = build(kind, config), Clock(args.profile)
    parameters = sum(p.numel() for p in model.parameters())
    by_layer = kind in args.layers.split(";") or args.layers == "all"
    if by_layer:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = PretrainArguments(
            output_dir=folder,
            data="-",
            tokenizer="-",
            max_steps=args.steps + args.skip,
            bf16=this_device().type == "cuda",
            save_strategy="no",
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=micro_batches,
            torch_compile=not args.eager and not by_layer,
            report_to="none",
            dataloader_num_workers=args.workers,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            on_bad_step="ignore",
        )
        run = _Run(tokens, 4.0, 4.0, flops_per_token(config, row_length), peak_flops(device, bf16=True))
        options: dict[str, Any] = {"train_dataset": data, "callbacks": [clock], "run": run}
        if kind == OURS:
            trainer = PretrainTrainer(model, arguments, data_collator=collate, **options)
        else:
            trainer = Plain(
                model,
                arguments,
                data_collator=lambda rows: collate([{k: v for k, v in row.items() if k in KEPT} for row in rows]),
                **options,
            )
        trainer.train()
    step, losses = median(clock.seconds(args.skip)), [x["loss"] for x in trainer.state.log_history if "loss" in x]
    speed, peak = tokens / step, peak_flops(device, bf16=True)
    flops = flops_per_token(config, row_length)
    compiled = "no" if args.eager else "layer" if by_layer else "model"
    row = {
        "size": size,
        "model": kind,
        "compiled": compiled,
        "rows": rows,
        "micro_batches": micro_batches,
        "row_length": row_length,
    }
    row |= {"tokens_per_step": tokens, "steps": args.steps, "ms_per_step": round(1e3 * step, 1)}
    row |= {"seconds": round(time.perf_counter() - start, 1)}
    row |= {"tokens_per_second": round(speed), "loss": round(losses[-1], 4) if losses else ""}
    row |= {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "mflop_per_token": round(flops / 1e6, 1)}
    row |= {"mfu": round(speed * flops / peak, 4) if peak else ""}
    if kind == OURS and not config.is_moe:
        seen = float(torch.cat([data[i]["position_ids"] + 1.0 for i in range(64)]).mean())
        least = floor(config, parameters, seen, tokens, rows * row_length, rate)
        row |= {"floor_tokens_per_second": round(1 / least)}
    del trainer, model
    gc.collect()
    torch.cuda.empty_cache()
    return row


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of tokens/s a size, on a logarithmic axis, with the share of the chip's peak above them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes, kinds = (list(dict.fromkeys(str(row[x]) for row in rows)) for x in ("size", "model"))
    figure, axes = plt.subplots(figsize=(1.6 + 1.7 * len(sizes), 3.8), layout="constrained")
    for i, kind in enumerate(kinds):
        of_kind: dict[str, dict[str, Any]] = {}  # the faster way to compile, where both were measured
        for row in rows:
            there = of_kind.get(str(row["size"]), row)
            if row["model"] == kind and float(row["tokens_per_second"]) >= float(there["tokens_per_second"]):
                of_kind[str(row["size"])] = row
        places = [g + (i - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for g, s in enumerate(sizes) if s in of_kind]
        found = [of_kind[s] for s in sizes if s in of_kind]
        heights = [float(row["tokens_per_second"]) for row in found]
        bars = axes.bar(places, heights, 0.75 / len(kinds), label=kind, color=COLORS.get(kind))
        shares = [f"{float(row['mfu']):.0%}" if row["mfu"] else "" for row in found]
        axes.bar_label(bars, [f"{h / 1e3:,.0f}k\n{m}" for h, m in zip(heights, shares, strict=True)], fontsize=7)
    for g, size in enumerate(sizes):
        if size in BARS:
            ours = g + (kinds.index(OURS) - len(kinds) / 2) * 0.8 / len(kinds) if OURS in kinds else g
            axes.hlines(BARS[size], ours, ours + 0.8 / len(kinds), "black", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    least = min(float(row["tokens_per_second"]) for row in rows)
    axes.set_ylim(10 ** math.floor(math.log10(least)), axes.get_ylim()[1] * 1.6)  # bars begin at a whole decade
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_ylabel("tokens per second (share of peak)")
    axes.set_title(f"Pretraining, {rows[0]['device']}, 2,048 context, compiled", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="20m,60m,160m,320m")
    parser.add_argument("--kinds", default=";".join((OURS, DOGE, LLAMA)))
    parser.add_argument("--data", help="folder of `doge prepare`; random documents without it")
    parser.add_argument("--row_length", type=int, default=2048)
    parser.add_argument("--rows", type=int, help="rows of a micro-batch; by default what fits")
    parser.add_argument("--micro_batches", type=int, default=1 << 20, help="at most so many a step")
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skip", type=int, default=2, help="steps before those that count")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument(
        "--layers", nargs="?", const="all", default="", help="of these kinds, or all, compile one layer for all"
    )
    parser.add_argument("--profile", action="store_true", help="print what the last step's kernels take")
    parser.add_argument("--draw", metavar="CSV", help="only draw the picture of an earlier run")
    parser.add_argument("--output", default=str(RESULTS / "train_throughput.csv"))
    args = parser.parse_args()
    if args.draw:
        return draw(read_csv(args.draw), Path(args.draw).with_suffix(".png"))
    by_layer = [name for name in args.layers.split(";") if name not in ("", "all")]
    for given, known in ((args.kinds.split(";") + by_layer, ROWS), (args.sizes.split(","), SIZES)):
        if unknown := [name for name in given if name not in known]:
            raise SystemExit(f"unknown: {', '.join(unknown)}, expected some of {'; '.join(known)}")
    where, rate, rows = provenance(this_device()), rates(this_device()), []
    data = PackedTokens(args.data, "train") if args.data else RandomDocuments(1 << 20, args.row_length, args.vocab_size)
    for size in args.sizes.split(","):
        for kind in args.kinds.split(";"):
            try:
                row = measure(size, kind, args, data, rate)
            except torch.OutOfMemoryError as error:
                row = {"size": size, "model": kind, "error": first_line(error)}
            rows.append(row | where)
            path = write_csv(rows, args.output)  # after every model: a run that is cut short leaves what it had
            speed = f"{row['tokens_per_second']:>12,} tok/s  MFU {row['mfu']}" if "mfu" in row else row["error"]
            least = row.get("floor_tokens_per_second")
            bar = f"  floor {least:,}" if least else ""
            bar += f"  bar {BARS[size]:,.0f}" if kind == OURS and size in BARS else ""
            rest = f"{row.get('peak_gib', '')} GiB  loss {row.get('loss')}  {row.get('seconds')} s{bar}"
            print(f"{size:>5} {kind:<19} {speed}  {rest}", flush=True)
    return draw([row for row in rows if row.get("tokens_per_second")], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
