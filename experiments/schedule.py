"""The schedule: warmup, stable, decay against cosine at several lengths, and going on with new text afterwards.

    python experiments/schedule.py --data runs/doge-20m/data --new runs/new/data      # schedule.csv, .png; one GPU
    python experiments/schedule.py --draw                                             # the picture from the CSV

Length: a cosine needs a run of its own for each number of steps. Warmup, stable, decay needs one stable run, of which a
checkpoint is decayed for the last fifth; rows are a function of seed and step, so a whole run of that length, which is
what is made here, is the same. Going on: half as many steps again on text of another kind, the rate at its peak and
then decayed over the last fifth. From the stable checkpoint everything goes on, moments too (as `--continue_from`
does); a decayed model, or the end of a cosine, starts again with fresh moments and a short warmup (as `--model` does),
the decayed one also without any, at the full rate from the first step.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from points import BLUE, GREEN, ORANGE, RED, Point, Row, parser, save, study
from runs import WARMUP, held_out, train

from small_doge.data.packing import PackedTokens
from small_doge.models import DogeForCausalLM, config_for

WSD, COSINE = "warmup, stable, decay", "cosine"
STABLE, DECAYED, ANNEALED = "from the stable checkpoint", "from the decayed model", "from the end of the cosine"
COLD = "from the decayed model, no warmup"
GOING_ON = (STABLE, DECAYED, ANNEALED, COLD)
COLORS = {WSD: BLUE, COSINE: ORANGE, STABLE: BLUE, DECAYED: GREEN, ANNEALED: ORANGE, COLD: RED}
REWARMUP = 20  # steps
BEFORE = 20  # logged losses that a running mean is over


class Then:
    """Rows of one text in a random order, then rows of another; an order follows from the seed and the text's place."""

    def __init__(self, parts: list[tuple[PackedTokens, int]], seed: int):
        orders = [np.random.default_rng([seed, i]).permutation(len(data)) for i, (data, _) in enumerate(parts)]
        self.rows = [
            (data, int(order[j % len(order)]))
            for (data, count), order in zip(parts, orders, strict=True)
            for j in range(count)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        data, row = self.rows[i]
        return data[row]


def measure(point: Point) -> list[Row]:
    """The losses of the later steps; the last row has the held-out losses, of the new text too where there was some."""
    kind, steps, seed = point["kind"], point["steps"], point["seed"]
    old, old_validation = (PackedTokens(point["data"], split, check=False) for split in ("train", "validation"))
    new, new_validation = (PackedTokens(point["new"], split, check=False) for split in ("train", "validation"))
    manifest, more = old.manifest, steps // 2
    config = config_for(
        point["size"], vocab_size=manifest["vocab_size"], max_position_embeddings=manifest["row_length"]
    )
    torch.manual_seed(seed)
    model = DogeForCausalLM(config)
    settings = {name: point[name] for name in ("rows", "micro_batches", "learning_rate")}
    settings |= {"seed": seed, "logging_steps": 1, "train_sampling_strategy": "sequential"}
    settings |= {"warmup_steps": point["warmup"]}
    per_step = point["rows"] * point["micro_batches"]
    cosine = {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {}}

    first, later = [(old, steps * per_step)], [(new, more * per_step)]
    if kind == STABLE:
        both = Then(first + later, seed)
        rows = train(model, both, new_validation, steps=steps + more, decay_steps=more // 5, **settings).log
    else:
        found = train(model, Then(first, seed), old_validation, steps=steps, **settings, **(
            cosine if kind in (COSINE, ANNEALED) else {}
        ))  # fmt: skip
        rows = found.log
        if kind in GOING_ON:
            rows[-1]["eval_loss"] = round(found.eval_loss, 4)
            again = settings | {"decay_steps": more // 5, "warmup_steps": 0 if kind == COLD else REWARMUP}
            found = train(model, Then([(old, 0), *later], seed), new_validation, steps=more, **again)
            rows += [row | {"step": row["step"] + steps} for row in found.log]
    rows = [{name: row[name] for name in ("step", "loss", "eval_loss") if name in row} for row in rows]
    rows[-1]["eval_loss"] = round(held_out(model, old_validation), 4)
    if kind in (WSD, COSINE):
        return rows[-1:]
    rows[-1]["new_eval_loss"] = round(held_out(model, new_validation), 4)
    return rows[steps // 2 :]  # what comes long before the new text is in no figure


def points_of(args: Any) -> list[Point]:
    names = ("size", "learning_rate", "warmup", "rows", "micro_batches", "data", "new")
    settings = {name: getattr(args, name) for name in names}
    found = []
    for seed in args.seeds:
        found += [(kind, max(args.lengths), seed) for kind in GOING_ON]
        found += [(kind, steps, seed) for steps in args.lengths for kind in (WSD, COSINE)]
    return [{"kind": kind, "steps": steps, "seed": seed} | settings for kind, steps, seed in found]


def one(rows: list[Row], kind: str, steps: int, seed: str) -> list[Row]:
    return [r for r in rows if (r["kind"], int(r["steps"]), r["seed"]) == (kind, steps, seed)]


def jump(rows: list[Row], steps: int) -> tuple[float, float]:
    """By how many standard deviations a loss on the new text exceeds the mean of those before it, and the excess.

    The mean and deviation are of the 20 losses before it on the new text, so the change of text itself is no jump.
    """
    losses = [float(row["loss"]) for row in rows if int(row["step"]) > steps]
    found = []
    for i in range(BEFORE, len(losses)):
        before = losses[i - BEFORE : i]
        over = losses[i] - statistics.fmean(before)
        found.append((over / max(statistics.stdev(before), 1e-9), over))
    return max(found)


def report(rows: list[Row]) -> None:
    """Held-out losses at each length; after the new text on both texts, and the highest loss on the way."""
    lengths = sorted({int(row["steps"]) for row in rows})
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    for steps in lengths:
        for kind in (WSD, COSINE):
            losses = [
                float(one(rows, kind, steps, seed)[-1]["eval_loss"]) for seed in seeds if one(rows, kind, steps, seed)
            ]
            if losses:
                print(f"{steps:>5} steps, {kind:<22} held out {', '.join(f'{x:.4f}' for x in losses)}")
    for kind in GOING_ON:
        for seed in seeds:
            if mine := one(rows, kind, lengths[-1], seed):
                last, (deviations, over) = mine[-1], jump(mine, lengths[-1])
                after = [float(r["loss"]) for r in mine if int(r["step"]) > lengths[-1]]
                print(
                    f"going on {kind:<27} seed {seed}: new text {float(last['new_eval_loss']):.4f}, old text "
                    f"{float(last['eval_loss']):.4f} held out; first loss {after[0]:.3f}, highest of the 40 after "
                    f"{max(after[1:41]):.3f}; largest jump {over:.3f} = {deviations:.1f} deviations"
                )


def draw(rows: list[Row], path: Path) -> None:
    """Held-out loss against length; the curve into the new text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = sorted({int(row["steps"]) for row in rows})
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    figure, (ends, curves) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for kind in (WSD, COSINE):
        points = [
            (steps, float(one(rows, kind, steps, seed)[-1]["eval_loss"]))
            for steps in lengths
            for seed in seeds
            if one(rows, kind, steps, seed)
        ]
        ends.plot(*zip(*points, strict=True), "o", color=COLORS[kind], markersize=4)
        means = {steps: statistics.fmean([y for x, y in points if x == steps]) for steps, _ in points}
        ends.plot(list(means), list(means.values()), color=COLORS[kind], label=kind)
    ends.set(xlabel="steps", ylabel="held-out loss, nats a token", title="the same length, two schedules")
    ends.set_xticks(lengths)
    steps = lengths[-1]
    for kind in GOING_ON:
        if mine := one(rows, kind, steps, seeds[0]):
            line = [(int(r["step"]) - steps, float(r["loss"])) for r in mine if int(r["step"]) > 0.75 * steps]
            label = f"{kind}: {float(mine[-1]['new_eval_loss']):.3f} held out"
            curves.plot(
                *zip(*line, strict=True), color=COLORS[kind], linewidth=1, label=label.removeprefix("from the ")
            )
    curves.axvline(0, color="#999999", linewidth=0.8)
    curves.set(xlabel="steps on the new text", ylabel="training loss, nats a token", title="going on with new text")
    for axes in (ends, curves):
        axes.legend(frameon=False, fontsize=8)
    save(figure, path, f"{rows[0]['size']}, {rows[0]['device']}")
    plt.close(figure)


def main() -> None:
    args = parser(__doc__, Path(__file__).with_suffix(".csv"))
    args.add_argument("--data", default="runs/doge-20m/data", help="folder of `doge prepare`")
    args.add_argument("--new", default="runs/new/data", help="another, of text of another kind, same tokenizer")
    args.add_argument("--size", default="20m")
    args.add_argument("--warmup", type=int, default=WARMUP, help="steps")
    args.add_argument("--lengths", type=int, nargs="+", default=[200, 400, 800], help="steps")
    args.add_argument("--rows", type=int, default=64, help="rows of a micro-batch")
    args.add_argument("--micro_batches", type=int, default=1)
    args.add_argument("--learning_rate", type=float, default=8e-3)
    args.add_argument("--seeds", type=int, nargs="+", default=[233, 1])
    options = args.parse_args()
    study(options, points_of, measure, report, draw)


if __name__ == "__main__":
    main()
