"""What SFT and DPO did to a model: curves as one CSV and one picture, and the same questions answered before and after.

python experiments/align_20m.py --sft runs/doge-20m/sft --dpo runs/doge-20m/dpo         # writes align_20m.csv and .png
python experiments/align_20m.py --answers runs/doge-20m/{pretrain,sft,dpo} --questions sft/test.jsonl    # …_answers.md
python experiments/align_20m.py                                                  # draws the picture from the CSV again

Several runs of a stage stand side by side: --dpo first=runs/a second=runs/b.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9")
HELD_OUT = ("eval_loss", "eval_preference_accuracy", "eval_preference_margin", "eval_reward_accuracy")
HELD_OUT += ("eval_reward_margin", "eval_chosen_loss")
FIELDS = ("stage", "run", "step", "loss", *HELD_OUT, "learning_rate", "grad_norm", "tokens_per_second")


def collect(stage: str, named: str) -> list[dict[str, Any]]:
    """The log of one run, ``NAME=FOLDER`` or a folder, a row for every entry."""
    name, _, folder = named.rpartition("=")
    log = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    rows = [row for row in log if "loss" in row or "eval_loss" in row]
    return [
        {"stage": stage, "run": name or Path(folder).name}
        | {k: float(f"{row[k]:.5g}") if isinstance(row.get(k), float) else row.get(k, "") for k in FIELDS[2:]}
        for row in rows
    ]


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """SFT's losses; DPO's held-out accuracy, margin of rewards and loss of what was chosen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    panels = (
        ("sft", "eval_loss", "SFT: loss of an answer's token, nats"),
        ("dpo", "eval_preference_accuracy", "DPO: held-out preference accuracy"),
        ("dpo", "eval_reward_margin", "DPO: held-out margin of rewards"),
        ("dpo", "eval_chosen_loss", "DPO: held-out loss of a chosen reply's token, nats"),
    )
    for axis, (stage, field, title) in zip(axes.flat, panels, strict=True):
        here = [row for row in rows if row["stage"] == stage]
        for color, run in zip(COLORS, dict.fromkeys(row["run"] for row in here), strict=False):
            mine = [row for row in here if row["run"] == run]

            def curve(field: str, style: str, label: str, mine=mine, color=color, axis=axis) -> None:
                found = [(float(row["step"]), float(row[field])) for row in mine if row[field]]
                axis.plot(*zip(*found, strict=True), style, color=color, label=label, linewidth=1.2, markersize=4)

            if stage == "sft":
                curve("loss", "-", f"{run}, training")
            curve(field, "o--" if stage == "sft" else "o-", f"{run}, held out" if stage == "sft" else run)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("steps", fontsize=8)
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def answers(folders: list[str], questions: Path, number: int, tokens: int) -> str:
    """The first questions of each source, answered greedily by each model, as Markdown."""
    import torch

    from small_doge.data.tokenizer import load_tokenizer
    from small_doge.models import load_model

    by_source: dict[str, list[str]] = {}
    for line in questions.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if len(row["messages"][0]["content"]) < 300 and row["messages"][0]["role"] == "user":
            by_source.setdefault(row["source"], []).append(row["messages"][0]["content"])
    asked = [question for those in by_source.values() for question in those[:number]]
    said: dict[str, list[str]] = {question: [] for question in asked}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for folder in folders:
        tokenizer: Any = load_tokenizer(folder)
        model: Any = load_model(folder).to(device)
        for question in asked:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
            )["input_ids"].to(device)
            output = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id)[0]
            said[question].append(tokenizer.decode(output[ids.shape[1] :], skip_special_tokens=True).strip())
    lines = [f"Greedy answers, {tokens} tokens at most, of {', '.join(Path(f).name for f in folders)}.\n"]
    for question, replies in said.items():
        lines.append(f"**{question.strip()}**\n")
        lines += [f"- {Path(f).name}: {' '.join(reply.split())}" for f, reply in zip(folders, replies, strict=True)]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", nargs="*", default=[], metavar="[NAME=]FOLDER", help="finished runs to collect")
    parser.add_argument("--dpo", nargs="*", default=[], metavar="[NAME=]FOLDER", help="finished runs to collect")
    parser.add_argument("--answers", nargs="*", default=[], metavar="FOLDER", help="models to ask")
    parser.add_argument("--questions", type=Path, help="conversations whose first message they get")
    parser.add_argument("--output", type=Path, default=HERE / "align_20m.csv")
    args = parser.parse_args()
    if args.answers:
        text = answers(args.answers, args.questions, number=2, tokens=96)
        return print(args.output.with_name(f"{args.output.stem}_answers.md").write_text(text, encoding="utf-8"))
    if args.sft or args.dpo:
        rows = [row for stage in ("sft", "dpo") for run in getattr(args, stage) for row in collect(stage, run)]
        with open(args.output, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    with open(args.output, newline="", encoding="utf-8") as file:
        return draw(list(csv.DictReader(file)), args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
