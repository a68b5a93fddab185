"""What experts cost in decoding on a CPU: the 60M dense model against the same with 4,096 experts in every layer.

    OMP_NUM_THREADS=1 python benchmarks/moe_decode.py --threads 1,2    # about two minutes
    python benchmarks/moe_decode.py --profile                          # where the time of a token goes, both models

Sizes 60m and 180m-moe (hidden 512, N 4,096, k 16), random weights, float32, batch 1, our own cache, greedy. The two
take turns, a few tokens each, in one run. On a machine that is shared, times wander by more than experts cost: so the
figure is the median over rounds of the ratio within a round, whose two turns follow each other, with the quartiles
beside it; and with one thread the clock is the processor time of this process. With two it is the one on the wall, and
means little where the second core is taken. The bar: an MoE model decodes at no less than 70 % of its dense model's
tokens/s.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from common import RESULTS, Row, number, provenance, seconds, write_csv
from decode import OURS, Decoder, ours_at, random_model

from small_doge.models import config_for

DENSE, EXPERTS = "60m", "180m-moe"
LEAST = 0.70  # of the dense model's tokens/s
CPU = torch.device("cpu")


def decoders_at(context: int, args: argparse.Namespace) -> dict[str, Decoder]:
    """Both models, each after the same context of random tokens."""
    made = {}
    for size in (DENSE, EXPERTS):
        config = config_for(size, vocab_size=args.vocab_size, max_position_embeddings=context + 4096)
        model = random_model(OURS, config, CPU, torch.float32)
        torch.manual_seed(1)
        made[size] = ours_at(model, config, context, 512, CPU)
    return made


def taken_by(decoder: Decoder, tokens: int, threads: int) -> float:
    """Seconds a token."""
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    for _ in range(tokens):
        decoder()
    return (clock() - start) / tokens


def measure(context: int, threads: int, start: dict[str, Decoder], args: argparse.Namespace) -> list[Row]:
    """One row a model: both in turn from the same place in the text on."""
    torch.set_num_threads(threads)
    decoders = {size: decoder.twin() for size, decoder in start.items()}
    for decoder in decoders.values():
        seconds(decoder, args.warmup, CPU)
    times: dict[str, list[float]] = {size: [] for size in decoders}
    order = list(decoders)
    for _ in range(args.rounds):
        order.reverse()  # so that neither always comes second
        for size in order:
            times[size].append(taken_by(decoders[size], args.repeats, threads))
    rates = {size: 1 / median(taken) for size, taken in times.items()}
    ratios = [dense / moe for dense, moe in zip(times[DENSE], times[EXPERTS], strict=True)]
    quarters = quantiles(ratios, n=4)
    rows = []
    for size, decoder in decoders.items():
        row: Row = {"size": size, "context": context, "tokens": args.rounds * args.repeats, "dtype": "float32"}
        row["clock"] = "processor" if threads == 1 else "wall"
        row["parameters"] = sum(p.numel() for p in decoder.model.parameters())
        row |= {"ms_per_token": round(1e3 / rates[size], 3), "tokens_per_second": round(rates[size], 2)}
        row["fastest_ms"] = round(1e3 * min(times[size]), 3)
        if size == EXPERTS:
            row |= {"of_dense": round(median(ratios), 4), "of_dense_fastest": 0.0, "bar": LEAST}
            row["of_dense_fastest"] = round(min(times[DENSE]) / min(times[EXPERTS]), 4)
            row |= {"of_dense_lower_quartile": round(quarters[0], 4), "of_dense_upper_quartile": round(quarters[2], 4)}
        rows.append(row | provenance(CPU))
    return rows


def report(rows: list[Row]) -> None:
    """Tokens/s, their ratio and the bar."""
    print(f"\n{'threads':>7} {'context':>8} {'model':<9} {'ms/token':>9} {'tokens/s':>9}  of dense (quartiles)")
    for row in rows:
        ratio = ""
        if row["size"] == EXPERTS:
            low, middle, high = (
                number(row, name) for name in ("of_dense_lower_quartile", "of_dense", "of_dense_upper_quartile")
            )
            ratio = f"{middle:.3f} ({low:.3f} to {high:.3f})  {'ok' if middle >= LEAST else 'MISSED'}"
        print(
            f"{row['threads']:>7} {row['context']:>8} {row['size']:<9} {number(row, 'ms_per_token'):>9.2f} "
            f"{number(row, 'tokens_per_second'):>9.1f}  {ratio}"
        )


def profile(decoder: Decoder, tokens: int) -> Any:
    """torch's operators by the time that each takes itself."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(tokens):
            decoder()
    return found.key_averages()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="64,2048")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=4, help="tokens a model generates in each of its turns")
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--profile", action="store_true", help="print where the time goes, and measure nothing")
    parser.add_argument("--output", type=Path, default=RESULTS / "moe_decode_cpu.csv")
    args = parser.parse_args()
    begin, rows = time.perf_counter(), []
    for context in map(int, args.contexts.split(",")):
        start = decoders_at(context, args)
        if args.profile:
            torch.set_num_threads(int(args.threads.split(",")[0]))
            for size, decoder in start.items():
                seconds(decoder, args.warmup, CPU)
                print(size, profile(decoder, 16).table(sort_by="self_cpu_time_total", row_limit=40), sep="\n")
            return
        for threads in map(int, args.threads.split(",")):
            rows += measure(context, threads, start, args)
            write_csv(rows, args.output)  # after every one: a run that is cut short leaves what it had
            print(f"{context:,} tokens, {threads} threads: {time.perf_counter() - begin:.0f} s so far", flush=True)
        del start
        gc.collect()
    report(rows)


if __name__ == "__main__":
    main()
