"""Doge and transformers' Llama of equal size, trained on the same rows in the same order by the same Trainer.

python experiments/against_llama.py --data runs/doge-20m/data --steps 300      # one GPU; writes against_llama.csv, .png
python experiments/against_llama.py --draw experiments/against_llama.csv       # draws the picture again

The published rate of the size: AdamW, warmup, stable, decay. Doge sees documents apart; Llama gets a row as one text,
as it is usually trained. Both are scored on the same held-out rows, tokens that begin a document left out.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))
from common import BLUE, ORANGE, build, provenance, read_csv, this_device, write_csv  # noqa: E402

from small_doge.data.packing import PackedTokens, collate  # noqa: E402
from small_doge.models import config_for  # noqa: E402
from small_doge.training.arguments import PretrainArguments  # noqa: E402
from small_doge.training.estimates import flops_per_token, peak_flops  # noqa: E402
from small_doge.training.pretrain import PretrainTrainer, _Run  # noqa: E402

OURS, LLAMA = "ours", "transformers Llama"
RATES = {"20m": 8e-3, "60m": 6e-3, "160m": 4e-3, "320m": 2e-3}


class Plain(PretrainTrainer):
    """The same Trainer for a model that computes its loss from logits."""

    compute_loss = Trainer.compute_loss


def inputs_for(kind: str, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collate(rows)
    return batch if kind == OURS else {name: batch[name] for name in ("input_ids", "labels")}


@torch.no_grad()
def held_out(model: Any, kind: str, data: PackedTokens, device: torch.device) -> float:
    """Nats a token over all labelled tokens of the split."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(data), 8):
        batch = inputs_for(kind, [data[i] for i in range(start, min(start + 8, len(data)))])
        labels = int((batch["labels"][:, 1:] != -100).sum())
        with torch.autocast(device.type, torch.bfloat16):
            total += model(**{name: x.to(device) for name, x in batch.items()}, use_cache=False).loss.item() * labels
        count += labels
    return total / count


def train(kind: str, args: argparse.Namespace, data: PackedTokens, validation: PackedTokens) -> list[dict[str, Any]]:
    """The log of one run, a row every ten steps, and its held-out loss in the last."""
    device, row_length = this_device(), data.manifest["row_length"]
    config = config_for(args.size, vocab_size=data.manifest["vocab_size"], max_position_embeddings=row_length)
    torch.manual_seed(args.seed)
    model = build(kind, config)
    for layer in model.model.layers if device.type == "cuda" else ():
        layer.compile(dynamic=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = PretrainArguments(
            output_dir=folder,
            data="-",
            tokenizer="-",
            max_steps=args.steps,
            learning_rate=args.learning_rate or RATES[args.size],
            warmup_steps=args.steps // 10,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": args.steps // 5},
            bf16=device.type == "cuda",
            seed=args.seed,
            per_device_train_batch_size=args.rows,
            gradient_accumulation_steps=args.micro_batches,
            logging_steps=min(10, args.steps),
            save_strategy="no",
            report_to="none",
            dataloader_num_workers=4 if device.type == "cuda" else 0,
            on_bad_step="ignore",
        )
        tokens = args.rows * args.micro_batches * row_length
        bytes_per_token = data.bytes_per_token()
        flops = flops_per_token(config, row_length)
        run = _Run(tokens, bytes_per_token, bytes_per_token, flops, peak_flops(device, bf16=True))
        trainer = (PretrainTrainer if kind == OURS else Plain)(
            model, arguments, train_dataset=data, data_collator=lambda rows: inputs_for(kind, rows), run=run
        )
        trainer.train()
    same = {"model": kind, "size": args.size, "seed": args.seed, "learning_rate": arguments.learning_rate}
    found: list[dict[str, Any]] = [
        same
        | {"step": x["step"], "tokens": x["step"] * tokens, "loss": round(x["loss"], 4)}
        | {"tokens_per_second": round(x["tokens_per_second"])}
        for x in trainer.state.log_history
        if "loss" in x
    ]
    loss = held_out(model, kind, validation, device)
    found[-1] |= {"eval_loss": round(loss, 4)}
    found[-1] |= {"eval_bits_per_byte": round(loss / math.log(2) / validation.bytes_per_token(), 4)}
    print(f"{kind}: held out {loss:.4f} = {found[-1]['eval_bits_per_byte']} bits per byte", flush=True)
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Training loss against tokens, the held-out loss as a point at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for kind, color in ((OURS, BLUE), (LLAMA, ORANGE)):
        mine = [row for row in rows if row["model"] == kind]
        axes.plot([float(x["tokens"]) / 1e6 for x in mine], [float(x["loss"]) for x in mine], color=color, label=kind)
        for row in mine:
            if row.get("eval_loss"):
                at = (float(row["tokens"]) / 1e6, float(row["eval_loss"]))
                label = f"held out {at[1]:.3f}, {float(row['eval_bits_per_byte']):.3f} bits per byte"
                axes.plot(*at, "o", color=color, label=label)
    axes.set_ylim(top=min(7.0, axes.get_ylim()[1]))
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss, nats a token")
    axes.set_title(f"{rows[0]['size']}, the same rows in the same order, {rows[0]['device']}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of `doge prepare`")
    parser.add_argument("--size", default="20m", choices=RATES)
    parser.add_argument("--kinds", default=f"{OURS};{LLAMA}")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=64, help="rows of a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, help="by default the published one of the size")
    parser.add_argument("--seed", type=int, default=233)
    parser.add_argument("--output", type=Path, default=HERE / "against_llama.csv")
    parser.add_argument("--draw", metavar="CSV", type=Path, help="only draw the picture of an earlier run")
    args = parser.parse_args()
    if args.draw:
        return draw(read_csv(args.draw), args.draw.with_suffix(".png"))
    data, validation = (PackedTokens(args.data, split) for split in ("train", "validation"))
    rows: list[dict[str, Any]] = []
    for kind in args.kinds.split(";"):
        rows += [row | provenance(this_device()) for row in train(kind, args, data, validation)]
        write_csv(rows, args.output)  # after every model: a run that is cut short leaves what it had
    return draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
