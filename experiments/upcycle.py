"""Does growing pay? A dense model trained on, and the same model with experts beside its SwiGLU, on the same rows.

    OMP_NUM_THREADS=1 python experiments/upcycle.py        # 25 minutes of a free core; upcycle.csv and .png

For each seed a tiny model is trained on the standard library with AdamW, to the stable stage of its schedule and no
further. Then it goes on twice for the same steps, with the same rows in the same order and the same rates (a fresh
optimiser, a short warmup, no decay): as it is, and grown by `doge upcycle`. Every stage is the command a user would
give, in a folder below --work; a run that was cut short goes on where it was. --replot draws from the CSV alone.

The training loss of the grown model has the balance loss in it (router_aux_loss_coef times about 1 to 3); the held-out
loss has not.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

from small_doge import recipe
from small_doge.data.packing import PrepareRecipe, prepare
from small_doge.data.tokenizer import TokenizerRecipe, train_tokenizer
from small_doge.models import upcycle
from small_doge.training.pretrain import PretrainArguments, pretrain

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes" / "doge-tiny"
KINDS = ("dense", "experts")
COLORS = {"dense": "#999999", "experts": "#0072B2"}  # Okabe and Ito's


def run(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Train, grow and train on with one seed; one row a step and kind."""
    folder = args.work / f"seed-{seed}"
    common = {"data": str(args.work / "data"), "tokenizer": str(args.work / "tokenizer"), "muon_learning_rate": None}
    common |= {"max_minutes": None, "learning_rate": args.learning_rate, "warmup_steps": 0.1, "decay_steps": 0}
    common |= {"logging_steps": 1, "eval_on_start": True, "eval_steps": 25, "eval_rows": args.eval_rows, "seed": seed}
    common |= {"save_steps": 100, "save_total_limit": 1, "sample_prompts": [], "report_to": "none", "use_cpu": True}
    before = {"model": "tiny", "output_dir": str(folder / "before"), "max_steps": args.before, "eval_on_start": False}
    pretrain(recipe.load(PretrainArguments, RECIPES / "pretrain.yaml", common | before))
    models = {"dense": folder / "before", "experts": folder / "grown"}
    if not models["experts"].exists():
        k = args.num_experts_per_tok
        upcycle(models["dense"], models["experts"], num_experts=args.num_experts, num_experts_per_tok=k, seed=seed)
    rows = []
    for kind in KINDS:
        # Another seed is another order of rows, the same for both.
        own = {"model": str(models[kind]), "output_dir": str(folder / kind), "max_steps": args.steps}
        out = pretrain(recipe.load(PretrainArguments, RECIPES / "pretrain.yaml", common | own | {"seed": seed + 1000}))
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        by_step: dict[int, dict[str, Any]] = {}
        for entry in history:
            row = by_step.setdefault(entry["step"], {"seed": seed, "kind": kind, "step": entry["step"]})
            row |= {name: round(entry[name], 5) for name in COLUMNS[3:] if name in entry}
        rows += [by_step[step] for step in sorted(by_step)]
    return rows


COLUMNS = ("seed", "kind", "step", "loss", "grad_norm", "eval_loss", "eval_bits_per_byte", "tokens_per_second")


def column(rows: list[dict[str, Any]], seed: Any, kind: str, name: str) -> dict[int, float]:
    """The values of a column by step."""
    return {
        int(row["step"]): float(row[name])
        for row in rows
        if str(row["seed"]) == str(seed) and row["kind"] == kind and row.get(name) not in (None, "")
    }


def report(rows: list[dict[str, Any]]) -> None:
    """Held-out loss at the end, and the training loss of the last 50 steps, by seed."""
    for seed in dict.fromkeys(str(row["seed"]) for row in rows):
        ends = {}
        for kind in KINDS:
            held_out, training = (column(rows, seed, kind, name) for name in ("eval_loss", "loss"))
            ends[kind] = (held_out[max(held_out)], statistics.fmean([training[s] for s in sorted(training)[-50:]]))
        parts = [f"{kind} held-out {end[0]:.4f}, training {end[1]:.4f}" for kind, end in ends.items()]
        gain = ends["dense"][0] - ends["experts"][0]
        print(f"seed {seed}: {'; '.join(parts)}; held-out loss lower by {gain:.4f} with experts")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss of both, and how much lower the grown model's training loss is on the same rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for i, seed in enumerate(dict.fromkeys(str(row["seed"]) for row in rows)):
        for kind in KINDS:
            held_out = column(rows, seed, kind, "eval_loss")
            label, width = (kind if i == 0 else None), (5 if kind == "dense" else 1.5)  # one can lie on the other
            left.plot(list(held_out), list(held_out.values()), color=COLORS[kind], label=label, linewidth=width)
        dense, experts = (column(rows, seed, kind, "loss") for kind in KINDS)
        steps = sorted(dense.keys() & experts.keys())
        difference = [experts[s] - dense[s] for s in steps]
        smooth = [statistics.fmean(difference[max(0, j - 9) : j + 1]) for j in range(len(steps))]
        right.plot(steps, smooth, color=COLORS["experts"], alpha=1 - 0.3 * i, label=f"seed {seed}")
    left.set(xlabel="steps after growing", ylabel="held-out loss, nats a token", title="Held-out loss")
    right.set(
        xlabel="steps after growing", ylabel="experts − dense", title="Training loss, same rows (mean of 10 steps)"
    )
    right.axhline(0, color="#999999", linewidth=0.8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E4E4E4")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--before", type=int, default=400, help="steps of the dense model before it is grown")
    parser.add_argument("--steps", type=int, default=200, help="steps after")
    parser.add_argument("--num_experts", type=int, default=1024)
    parser.add_argument("--num_experts_per_tok", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--eval_rows", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("runs/experiments/upcycle"))
    parser.add_argument("--output", type=Path, default=HERE / "upcycle.csv")
    parser.add_argument("--replot", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.replot:
        with open(args.output, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    else:
        tokenizer, data = args.work / "tokenizer", args.work / "data"
        train_tokenizer(recipe.load(TokenizerRecipe, RECIPES / "tokenizer.yaml", {"output_dir": str(tokenizer)}))
        paths = {"tokenizer": str(tokenizer), "output_dir": str(data)}
        prepare(recipe.load(PrepareRecipe, RECIPES / "prepare.yaml", paths))
        for seed in map(int, args.seeds.split(",")):
            rows += run(args, seed)
            with open(args.output, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
    report(rows)
    draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
