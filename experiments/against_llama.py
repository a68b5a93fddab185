"""Doge and transformers' Llama of equal size on the same rows in the same order, and Doge without one of its parts.

    python experiments/against_llama.py --data runs/doge-20m/data       # against_llama.csv, .png; an hour of one GPU
    python experiments/against_llama.py --draw                          # the picture and the table from the CSV

Kinds: ``doge``; ``llama``, with the same width, layers, heads and SwiGLU; ``no bias`` is a Doge whose A stays 0, so
that every score is the same: plain attention; ``no residual weights`` one whose residuals stay 1; ``no q/k norm`` that
of the first releases; ``documents together`` gets a row as one text, as Llama does; ``window 512`` keeps a quarter of
the row; and ``none of the first four``, which should be a Llama, tells whether anything else is different. Learning
rates are swept for Doge and Llama; the parts are left out at Doge's best. Each is scored on the same held-out rows.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from points import BLUE, GREEN, GREY, ORANGE, RED, SKY, Point, Row, build, parser, save, study
from runs import WARMUP, train

from small_doge.data.packing import PackedTokens
from small_doge.models import config_for

DOGE, LLAMA = "doge", "llama"
COLORS = {DOGE: BLUE, LLAMA: ORANGE}
PARTS = {"no bias": SKY, "no residual weights": GREEN, "no q/k norm": RED, "documents together": "#B8A500"}
NONE = "none of the first four"
WITHOUT = PARTS | {"window 512": "#CC79A7", NONE: GREY}
RATES = {"20m": (8e-3, 4e-3, 2e-3, 1e-3, 5e-4), "60m": (6e-3, 3e-3, 1.5e-3)}  # the published one, and lower ones
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # of Student's distribution, by the number of seeds


def model_of(kind: str, config: Any) -> Any:
    """A fresh model of a kind; what a kind leaves out stays at its start."""
    if kind == "window 512":
        config.keep_window_size = 512
    without = PARTS if kind == NONE else (kind,)
    config.qk_norm = "no q/k norm" not in without
    model = build("transformers Llama" if kind == LLAMA else "ours", config)
    for name, parameter in model.named_parameters():
        frozen = "no bias" in without and name.endswith(".A")
        frozen |= "no residual weights" in without and name.endswith("_residual")
        parameter.requires_grad_(not frozen)
    return model


def measure(point: Point) -> list[Row]:
    """The log of one run, a row every few steps, and its held-out loss in the last."""
    data, validation = (PackedTokens(point["data"], split, check=False) for split in ("train", "validation"))
    manifest = data.manifest
    config = config_for(
        point["size"], vocab_size=manifest["vocab_size"], max_position_embeddings=manifest["row_length"]
    )
    torch.manual_seed(point["seed"])
    model = model_of(point["kind"], config)
    parameters = sum(p.numel() for p in model.parameters())
    settings = {name: point[name] for name in ("steps", "rows", "micro_batches", "learning_rate", "seed")}
    apart = point["kind"] not in (LLAMA, "documents together", NONE)
    found = train(model, data, validation, documents_apart=apart, warmup_steps=point["warmup"], **settings)
    rows: list[Row] = [{"parameters": parameters} | row for row in found.log]
    rows[-1] |= found.figures
    return rows


def points_of(args: Any) -> list[Point]:
    """The rates, then what is left out, of one seed after the other."""
    found = []
    for seed in args.seeds:
        found += [(kind, rate, seed) for rate in args.learning_rates or RATES[args.size] for kind in (DOGE, LLAMA)]
        found += [(kind, args.parts_rate, seed) for kind in WITHOUT]
    chosen = dict.fromkeys(found)
    settings = {name: getattr(args, name) for name in ("steps", "warmup", "rows", "micro_batches", "data")}
    return [
        {"kind": kind, "size": args.size, "learning_rate": rate, "seed": seed} | settings
        for kind, rate, seed in chosen
        if kind in args.kinds.split(";")
    ]


def ends(rows: list[Row]) -> dict[tuple[str, str, float], list[float]]:
    """Held-out bits per byte of each seed, by size, kind and rate."""
    found: dict[tuple[str, str, float], list[float]] = {}
    for row in rows:
        if row["eval_bits_per_byte"]:
            key = (row["size"], row["kind"], float(row["learning_rate"]))
            found.setdefault(key, []).append(float(row["eval_bits_per_byte"]))
    return found


def interval(values: list[float]) -> str:
    """The mean and half of its 95 % interval over seeds, by Student's distribution."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.4f} (one seed)"
    half = T95[min(len(values), max(T95))] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.4f} ± {half:.4f} ({len(values)} seeds)"


def report(rows: list[Row]) -> None:
    """Held-out bits per byte of every kind and rate."""
    for (size, kind, rate), values in sorted(ends(rows).items()):
        print(f"{size:>5} {kind:<20} rate {rate:<7g} {interval(values)} bits per byte")


def draw(rows: list[Row], path: Path) -> None:
    """Curves at the best rate of each; held-out bits per byte against the rate; what leaving out a part costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = rows[0]["size"]
    rows = [row for row in rows if row["size"] == size]
    found = ends(rows)
    figure, (curves, rates, parts) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for kind, color in COLORS.items():
        swept = sorted((rate, v) for (_, k, rate), v in found.items() if k == kind)
        _, best = min((statistics.fmean(values), rate) for rate, values in swept)
        mine = [r for r in rows if r["kind"] == kind and float(r["learning_rate"]) == best]
        for i, seed in enumerate(dict.fromkeys(r["seed"] for r in mine)):
            line = [(float(r["tokens"]) / 1e6, float(r["loss"])) for r in mine if r["seed"] == seed]
            curves.plot(*zip(*line, strict=True), color=color, label=None if i else f"{kind}, {best:g}", linewidth=1)
        for rate, values in swept:
            rates.plot([rate] * len(values), values, "o", color=color, markersize=4)
        means = [statistics.fmean(values) for _, values in swept]
        rates.plot([rate for rate, _ in swept], means, color=color, label=kind)
    curves.set_ylim(top=min(7.0, curves.get_ylim()[1]))
    curves.set(xlabel="million tokens", ylabel="training loss, nats a token", title=f"{size}, each at its best rate")
    rates.set(xlabel="peak learning rate", ylabel="held-out bits per byte", title="the rate", xscale="log")
    ticks = sorted({rate for _, kind, rate in found if kind in COLORS})
    rates.set_xticks(ticks, [f"{1e3 * rate:g}e-3" for rate in ticks])
    rates.set_xticks([], minor=True)
    measured = [rate for _, kind, rate in found if kind in WITHOUT]
    rate = max(measured, key=measured.count, default=ticks[0])
    shown = [k for k in (DOGE, *WITHOUT, LLAMA) if (size, k, rate) in found]
    for i, kind in enumerate(shown):
        values = found[size, kind, rate]
        color = (COLORS | WITHOUT)[kind]
        parts.plot(values, [i] * len(values), "o", color=color, alpha=0.6)
        parts.plot([statistics.fmean(values)] * 2, [i - 0.3, i + 0.3], color=color, linewidth=2)
    parts.set_yticks(range(len(shown)), shown)
    parts.invert_yaxis()
    parts.set(xlabel="held-out bits per byte, a dot a seed", title=f"parts left out, rate {rate:g}")
    curves.legend(frameon=False)
    rates.legend(frameon=False)
    save(figure, path, f"Same rows in the same order, {rows[0]['device']}")
    plt.close(figure)


def main() -> None:
    args = parser(__doc__, Path(__file__).with_suffix(".csv"))
    args.add_argument("--data", default="runs/doge-20m/data", help="folder of `doge prepare`")
    args.add_argument("--size", default="20m", choices=RATES)
    args.add_argument("--kinds", default=";".join((DOGE, LLAMA, *WITHOUT)))
    args.add_argument("--learning_rates", type=float, nargs="+", help="of Doge and Llama; by default those of RATES")
    args.add_argument("--parts_rate", type=float, default=1e-3, help="where parts are left out")
    args.add_argument("--steps", type=int, default=480)
    args.add_argument("--warmup", type=int, default=WARMUP, help="steps")
    args.add_argument("--rows", type=int, default=64, help="rows of a micro-batch")
    args.add_argument("--micro_batches", type=int, default=1)
    args.add_argument("--seeds", type=int, nargs="+", default=[233, 1, 2])
    options = args.parse_args()
    study(options, points_of, measure, report, draw)


if __name__ == "__main__":
    main()
