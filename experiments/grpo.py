"""GRPO with a verified reward, small: a model that was taught wrong answers finds the right ones from 0 and 1 alone.

    python experiments/grpo.py --seeds 0 1 2 --folder runs/grpo

For each seed: questions of arithmetic (`doge arithmetic`), a tokenizer trained on their text, a model of 0.3 million
parameters, supervised fine-tuning on right answers and then for a short time on answers of which 85 % are off by one or
ten, then GRPO on the same training questions, which sees no answer, only whether one is right. Held-out problems are in
none of the three. Writes grpo.csv and grpo.png beside this file: mean reward of sampled completions, accuracy of greedy
held-out answers, KL divergence, length and share of completions that end, against the step.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch

from small_doge import artifacts, recipe
from small_doge.data.arithmetic import ArithmeticRecipe, write_arithmetic
from small_doge.data.tokenizer import TokenizerRecipe, load_tokenizer, train_tokenizer
from small_doge.models import DogeForCausalLM, config_for
from small_doge.training.grpo import GRPOArguments, grpo
from small_doge.training.sft import SFTArguments, sft

HERE = Path(__file__).parent
SIZES = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
KEPT = {
    "reward": "reward", "reward_std": "reward_std", "kl": "kl", "completions/mean_length": "length",
    "completions/ended": "ended", "eval_accuracy": "held_out_accuracy", "eval_ended": "held_out_ended",
}  # fmt: skip


def one(seed: int, root: Path, sft_steps: int, steps: int, largest: int, learning_rate: float) -> list[dict[str, Any]]:
    """Rows of one seed's run; every stage goes on where it was interrupted."""
    questions = {"train_rows": 2000, "test_rows": 200, "largest": largest, "seed": seed}
    data = write_arithmetic(ArithmeticRecipe(output_dir=str(root / "data"), **questions))
    noisy = write_arithmetic(ArithmeticRecipe(output_dir=str(root / "noisy"), wrong_fraction=0.85, **questions))
    corpus = root / "corpus.jsonl"
    if not corpus.exists():
        rows = map(json.loads, (data / "train.jsonl").read_text(encoding="utf-8").splitlines())
        texts = (" ".join(message["content"] for message in row["messages"]) for row in rows)
        artifacts.write_text(corpus, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(TokenizerRecipe(output_dir=str(root / "tokenizer"), corpus=str(corpus), vocab_size=320))
    base = root / "base"
    if not base.exists():
        torch.manual_seed(seed)
        tok = load_tokenizer(tokenizer)
        special = {name: getattr(tok, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        DogeForCausalLM(
            config_for("tiny", vocab_size=len(tok), **SIZES, num_key_value_heads=2, **special)
        ).save_pretrained(base)
        tok.save_pretrained(base)
    common = {
        "data": str(data), "eval_data": str(data), "seed": seed, "use_cpu": True, "report_to": "none",
        "eval_rows": 200, "save_total_limit": 1, "max_grad_norm": 1.0,
    }  # fmt: skip
    start = base
    for name, learned, some, rate in (("right", data, sft_steps, 3e-3), ("blurred", noisy, sft_steps // 10, 1e-3)):
        start = sft(
            recipe.build(
                SFTArguments,
                {
                    **common, "model": str(start), "data": str(learned), "output_dir": str(root / name),
                    "max_steps": some, "max_length": 128, "per_device_train_batch_size": 16,
                    "per_device_eval_batch_size": 32, "learning_rate": rate, "logging_steps": 50, "eval_steps": 0.5,
                    "save_steps": 1000,
                },
            )
        )  # fmt: skip
    folder = grpo(
        recipe.build(
            GRPOArguments,
            {
                **common, "model": str(start), "output_dir": str(root / "grpo"), "max_length": 96,
                "max_completion_length": 8, "max_steps": steps, "per_device_train_batch_size": 128,
                "num_generations": 8, "per_device_eval_batch_size": 200, "learning_rate": learning_rate, "beta": 0.01,
                "logging_steps": 5, "eval_steps": 15, "save_steps": 100,
            },
        )
    )  # fmt: skip
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        {"seed": seed, "step": row["step"], **{words: row[name] for name, words in KEPT.items() if name in row}}
        for row in history
        if "reward" in row or "eval_accuracy" in row
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Reward and held-out accuracy against the step, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, name, title in zip(
        panels,
        ("reward", "held_out_accuracy"),
        ("Mean reward of sampled completions", "Accuracy on held-out problems, greedy"),
        strict=True,
    ):
        for seed, color in zip(sorted({row["seed"] for row in rows}), ("#0072B2", "#D55E00", "#009E73"), strict=False):
            points = [(row["step"], row[name]) for row in rows if row["seed"] == seed and name in row]
            panel.plot(*zip(*points, strict=True), color=color, marker="." * (name != "reward"), label=f"seed {seed}")
        panel.set(title=title, xlabel="GRPO step", ylim=(0, 1))
        panel.grid(color="#E4E4E4")
        panel.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/grpo"))
    parser.add_argument("--sft_steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--largest", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--name", default=str(HERE / "grpo"), help="where the CSV and the picture go, less the ending")
    args = parser.parse_args()
    rows = [
        row
        for seed in args.seeds
        for row in one(seed, args.folder / str(seed), args.sft_steps, args.steps, args.largest, args.learning_rate)
    ]
    with open(f"{args.name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["seed", "step", *KEPT.values()], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
            )
    draw(rows, Path(f"{args.name}.png"))


if __name__ == "__main__":
    main()
