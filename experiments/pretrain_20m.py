"""The curves of pretraining runs: loss, learning rate and speed against tokens, as one CSV and one picture.

python experiments/pretrain_20m.py --runs NAME=runs/doge-20m/pretrain     # writes pretrain_20m.csv and .png
python experiments/pretrain_20m.py                                        # draws the picture from the CSV again
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

HERE = Path(__file__).parent
COLORS = ("#0072B2", "#E69F00", "#009E73")
FIELDS = ("run", "step", "tokens", "loss", "eval_loss", "bits_per_byte", "eval_bits_per_byte", "learning_rate")
FIELDS += ("grad_norm", "tokens_per_second", "mfu")


def collect(name: str, folder: Path) -> list[dict[str, object]]:
    """The log of one run, a row for every entry."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    per_step = json.loads((folder / "stage.json").read_text())["tokens_per_step"]
    rows = [row for row in log if "loss" in row or "eval_loss" in row]
    rounded = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    return [
        {"run": name, "tokens": row["step"] * per_step}
        | {k: row.get(k, "") for k in FIELDS[3:]}
        | {"step": row["step"]}
        for row in rounded
    ]


def draw(rows: list[dict[str, str]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, rate, speed) = plt.subplots(
        3, 1, figsize=(7.5, 7), sharex=True, layout="constrained", height_ratios=(3, 1, 1)
    )
    for i, (color, name) in enumerate(zip(COLORS, dict.fromkeys(row["run"] for row in rows), strict=False)):
        mine = [row for row in rows if row["run"] == name]

        def curve(axes, field: str, style: str, label: str | None = None, mine=mine, color=color) -> None:
            found = [(float(row["tokens"]) / 1e6, float(row[field])) for row in mine if row[field]]
            axes.plot(*zip(*found, strict=True), style, color=color, label=label, linewidth=1.2, markersize=4)

        curve(loss, "loss", "-", f"{name}, training")
        curve(loss, "eval_loss", "o--", f"{name}, held out")
        curve(rate, "learning_rate", "-")
        curve(speed, "tokens_per_second", "-")
        final = [row for row in mine if row["eval_loss"]][-1]
        text = f"{float(final['eval_loss']):.3f} = {float(final['eval_bits_per_byte']):.3f} bits per byte"
        at = (float(final["tokens"]) / 1e6, float(final["eval_loss"]))
        loss.annotate(text, at, (-8, 26 - 12 * i), textcoords="offset points", ha="right", fontsize=8, color=color)
    loss.set_ylim(3.4, 6)
    loss.set_ylabel("loss, nats a token")
    loss.legend(frameon=False, fontsize=8)
    rate.set_ylabel("learning rate")
    speed.set_ylabel("tokens/s")
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(lambda value, _: f"{value / 1e6:.1f} M")
    speed.set_xlabel("million tokens")
    for axes in (loss, rate, speed):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="*", default=[], metavar="NAME=FOLDER", help="finished runs to collect")
    parser.add_argument("--output", type=Path, default=HERE / "pretrain_20m.csv")
    args = parser.parse_args()
    if args.runs:
        rows = [row for run in args.runs for row in collect(run.split("=", 1)[0], Path(run.split("=", 1)[1]))]
        with open(args.output, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    with open(args.output, newline="", encoding="utf-8") as file:
        draw(list(csv.DictReader(file)), args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
