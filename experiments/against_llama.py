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
from collections import Counter
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
RATES = {"20m": (8e-3, 4e-3, 2e-3, 1e-3, 5e-4), "60m": (4e-3, 2e-3, 1e-3, 5e-4)}  # published: 8e-3 and 6e-3
FILLED = {"-": "full", ":": "none"}  # markers of a line
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


def ends(rows: list[Row]) -> dict[tuple[str, str, int, float], list[float]]:
    """Held-out bits per byte of each seed, by size, kind, steps of warmup and rate."""
    found: dict[tuple[str, str, int, float], list[float]] = {}
    for row in rows:
        if row["eval_bits_per_byte"]:
            key = (row["size"], row["kind"], int(row["warmup"]), float(row["learning_rate"]))
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
    """Held-out bits per byte of every kind, warmup and rate."""
    for (size, kind, warmup, rate), values in sorted(ends(rows).items()):
        print(f"{size:>5} {kind:<23} warmup {warmup:<4} rate {rate:<7g} {interval(values)} bits per byte")


def draw_rates(axes: Any, found: dict[tuple[str, str, int, float], list[float]], size: str) -> None:
    """Held-out bits per byte against the rate, a line a kind and warmup."""
    for kind, color in COLORS.items():
        for warmup, line in zip(sorted({w for s, k, w, _ in found if (s, k) == (size, kind)}), "-:", strict=False):
            swept = sorted((rate, v) for (s, k, w, rate), v in found.items() if (s, k, w) == (size, kind, warmup))
            for rate, values in swept:
                axes.plot([rate] * len(values), values, "o", color=color, markersize=4, fillstyle=FILLED[line])
            means = [statistics.fmean(values) for _, values in swept]
            axes.plot([rate for rate, _ in swept], means, line, color=color)
            style: Any = {"color": color, "marker": "o", "markersize": 4, "fillstyle": FILLED[line]}
            axes.plot([], [], line, label=f"{kind}, warmup {warmup}", **style)
    ticks = sorted({rate for s, kind, _, rate in found if s == size and kind in COLORS})
    axes.set(xlabel="peak learning rate", ylabel="held-out bits per byte", title=f"{size}, the rate", xscale="log")
    axes.set_xticks(ticks, [f"{1e3 * rate:g}e-3" for rate in ticks])
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False, fontsize=9)


def draw_parts(
    axes: Any, found: dict[tuple[str, str, int, float], list[float]], size: str, warmup: int, rate: float
) -> None:
    """What leaving out a part costs."""
    shown = [kind for kind in (DOGE, *WITHOUT, LLAMA) if (size, kind, warmup, rate) in found]
    for i, kind in enumerate(shown):
        values, color = found[size, kind, warmup, rate], (COLORS | WITHOUT)[kind]
        axes.plot(values, [i] * len(values), "o", color=color, alpha=0.6)
        axes.plot([statistics.fmean(values)] * 2, [i - 0.3, i + 0.3], color=color, linewidth=2)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    title = f"{size}, parts left out, rate {rate:g}, warmup {warmup}"
    axes.set(xlabel="held-out bits per byte, a dot a seed", title=title)


def draw(rows: list[Row], path: Path) -> None:
    """Of each size curves at the best of each, and bits per byte against the rate; what leaving out a part costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = ends(rows)
    sizes = [size for size in RATES if any(key[0] == size for key in found)]
    parts = [size for size in sizes if any(key[0] == size and key[1] in WITHOUT for key in found)]
    figure, panels = plt.subplots(
        2, len(sizes) + bool(parts), figsize=(5 * len(sizes) + 5, 7.5), layout="constrained", squeeze=False
    )
    for size, (curves, rates) in zip(sizes, panels.T, strict=False):
        draw_rates(rates, found, size)
        for kind, color in COLORS.items():
            swept = [(statistics.fmean(v), w, rate) for (s, k, w, rate), v in found.items() if (s, k) == (size, kind)]
            if not swept:
                continue
            _, warmup, best = min(swept)
            wanted = (size, kind, str(warmup), best)
            mine = [r for r in rows if (r["size"], r["kind"], r["warmup"], float(r["learning_rate"])) == wanted]
            for i, seed in enumerate(dict.fromkeys(r["seed"] for r in mine)):
                line = [(float(r["tokens"]) / 1e6, float(r["loss"])) for r in mine if r["seed"] == seed]
                label = None if i else f"{kind}, {best:g}, warmup {warmup}"
                curves.plot(*zip(*line, strict=True), color=color, label=label, linewidth=1)
        curves.set_ylim(top=min(7.0, curves.get_ylim()[1]))
        curves.set(xlabel="million tokens", ylabel="training loss, nats a token", title=f"{size}, each at its best")
        curves.legend(frameon=False, fontsize=9)
    if parts:
        most = Counter(key[2:] for key in found if key[0] == parts[0] and key[1] in WITHOUT).most_common(2)
        for axes, (where, _) in zip(panels[:, -1], sorted(most), strict=False):
            draw_parts(axes, found, parts[0], *where)
        for axes in panels[len(most) :, -1]:
            axes.set_axis_off()
    devices = " and ".join(dict.fromkeys(row["device"] for row in rows))
    save(figure, path, f"Same rows in the same order, {devices}")
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
