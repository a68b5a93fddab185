"""What 8, 64 and 512 GPUs would give, from one GPU's measured speed and the bytes that a step has to move.

A projection, not a measurement: `docs/many_devices.md` says what it assumes. It needs no GPU:

    python benchmarks/many_devices.py --rates 20m=2500000,60m=750000,160m=330000,320m=180000
    python benchmarks/many_devices.py --csv benchmarks/results/train_throughput_h200.csv --write
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from small_doge.models import SIZES, DogeForCausalLM, config_for

PAGE = Path(__file__).parents[1] / "docs" / "many_devices.md"
BEGIN, END = "<!-- projection -->\n", "<!-- end of projection -->\n"
ROW = 2048  # tokens
STEP = {"20m": 1 << 19, "60m": 1 << 20, "160m": 3 << 19, "320m": 1 << 21}  # tokens of a step, as in the recipes
STEPS = {"20m": 8_000, "60m": 16_000, "160m": 24_000, "320m": 32_000}
MICRO_BATCH = 64  # rows, with which the rates were measured, that of the 20m with 128


@dataclass(frozen=True)
class Cluster:
    """Nodes of eight GPUs; bytes/s and seconds that a GPU gets of each network, one direction."""

    gpus_per_node: int = 8
    nvlink: float = 360e9  # 80 % of the H200's 450 GB/s
    infiniband: float = 40e9  # 80 % of a 400 Gbit/s card for each GPU
    nvlink_hop: float = 2e-6
    infiniband_hop: float = 6e-6
    bucket: float = 25 * 2**20  # bytes that DDP sends at once
    memory: float = 3.4e12  # 70 % of the H200's 4.8 TB/s
    launches: float = 5e-3  # seconds of Python for a layer and micro-batch: 41 ms for the 20m's 8, on an H200's host


def all_reduce(bytes_: float, gpus: int, cluster: Cluster) -> float:
    """Seconds of one ring all-reduce: inside the nodes, and of an eighth of the bytes between them.

    A ring of n moves 2 (n − 1)/n of the bytes through every GPU, in 2 (n − 1) hops. Between nodes NCCL takes trees,
    which move as much in 2 ⌈log₂ nodes⌉ hops.
    """
    g = min(gpus, cluster.gpus_per_node)
    nodes = math.ceil(gpus / g)
    inside = 2 * (g - 1) / g * bytes_ / cluster.nvlink + 2 * (g - 1) * cluster.nvlink_hop
    between = 2 * (nodes - 1) / nodes * bytes_ / g / cluster.infiniband
    between += 2 * math.ceil(math.log2(nodes)) * cluster.infiniband_hop
    return inside + between


def project(size: str, parameters: int, rate: float, gpus: int, cluster: Cluster) -> dict[str, float] | None:
    """A step of a recipe under DDP, its batch shared out over ``gpus``; None where the rows cannot be shared out.

    Args:
        rate: tokens/s of one GPU.
    """
    rows = STEP[size] // ROW / gpus
    if rows != int(rows):
        return None
    # Every GPU updates all weights: AdamW and clipping read and write 40 bytes of each, however few rows there are.
    update = 40 * parameters / cluster.memory
    layers = SIZES[size]["num_hidden_layers"]
    compute = max((STEP[size] / rate - update) / gpus, layers * cluster.launches) + update
    buckets = math.ceil(4 * parameters / cluster.bucket)
    # Gradients are float32. All but the last bucket travel while the last micro-batch's backward pass, two thirds of
    # its time, goes on.
    exchange = buckets * all_reduce(4 * parameters / buckets, gpus, cluster) if gpus > 1 else 0.0
    backward = 2 / 3 * (compute - update) * min(1.0, MICRO_BATCH / rows)
    exposed = max(exchange / buckets, exchange - backward * (buckets - 1) / buckets)
    step = compute + exposed
    tokens = STEP[size] / step
    return {
        "rows": rows,
        "compute_ms": 1e3 * compute,
        "exchange_ms": 1e3 * exchange,
        "exposed_ms": 1e3 * exposed,
        "tokens_per_second": tokens,
        "efficiency": tokens / (gpus * rate),
        "hours": STEPS[size] * step / 3600,
    }


def parameters_of(size: str) -> int:
    """Of a published size with its vocabulary; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in DogeForCausalLM(config_for(size, vocab_size=32_768)).parameters())


def table(rates: dict[str, float], counts: list[int], cluster: Cluster) -> str:
    """The projection as Markdown."""
    names = "size,one GPU,GPUs,rows a GPU,compute,all-reduce,not hidden,tokens/s,efficiency,the recipe's hours"
    columns = names.split(",")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for size, rate in rates.items():
        parameters = parameters_of(size)
        for gpus in counts:
            found = project(size, parameters, rate, gpus, cluster)
            if found is None:
                lines.append(f"| {size} | {rate:,.0f} | {gpus} | {STEP[size] / ROW / gpus:g}: not whole {'| ' * 6}|")
                continue
            lines.append(
                f"| {size} | {rate:,.0f} | {gpus} | {found['rows']:g} | {found['compute_ms']:.1f} ms | "
                f"{found['exchange_ms']:.1f} ms | {found['exposed_ms']:.1f} ms | "
                f"{found['tokens_per_second'] / 1e6:.1f} M | {found['efficiency']:.0%} | {found['hours']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def read_rates(path: str) -> dict[str, float]:
    """The fastest `ours` of each size in a CSV of `train_throughput.py` or `train_step.py`."""
    rates: dict[str, float] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["model"] == "ours" and row["size"] in STEP and row.get("tokens_per_second"):
                rates[row["size"]] = max(rates.get(row["size"], 0.0), float(row["tokens_per_second"]))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--rates", help="tokens/s of one GPU: 20m=2500000,60m=…")
    source.add_argument("--csv", help="results of a benchmark of training on one GPU")
    parser.add_argument("--gpus", default="8,64,512")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    args = parser.parse_args()
    if args.csv:
        rates = read_rates(args.csv)
    else:
        rates = {size: float(rate) for size, _, rate in (pair.partition("=") for pair in args.rates.split(","))}
    unknown = sorted(set(rates) - set(STEP))
    if unknown or not rates:
        parser.error(f"rates are of {', '.join(unknown) or 'no size'}, expected some of {', '.join(STEP)}")
    found = table(rates, [int(n) for n in args.gpus.split(",")], Cluster())
    print(found)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.index(BEGIN) + len(BEGIN), page.index(END)
        PAGE.write_text(page[:before] + "\n" + found + "\n" + page[after:], encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
