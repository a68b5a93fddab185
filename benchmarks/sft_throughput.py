"""Tokens/s of supervised fine-tuning beside pretraining's: same model, rows, micro-batches and optimiser, in one run.

Both trainers are those of `doge pretrain` and `doge sft`, on full rows of the same random documents or conversations,
1,000 tokens long on average. What the second may cost more is TRL's bookkeeping, and rows that are put together from
lists. Times are from train_throughput.py: an event at the end of every step, the first ones left out, the median.

    python benchmarks/sft_throughput.py --sizes 20m --compiled no,model                         # one GPU
    python benchmarks/sft_throughput.py --sizes tiny --row_length 256 --rows 8 --vocab_size 4096 --compiled no   # CPU
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, Row, build, provenance, this_device, write_csv
from datasets import Dataset
from tokenizers import Tokenizer, models
from train_throughput import OURS, Clock, RandomDocuments
from transformers import PreTrainedTokenizerFast

from small_doge.data.packing import collate
from small_doge.models import config_for
from small_doge.training.arguments import PretrainArguments
from small_doge.training.estimates import flops_per_token, peak_flops
from small_doge.training.pretrain import PretrainTrainer, _Run
from small_doge.training.sft import DogeSFTTrainer, SFTArguments

PRETRAINING, SFT = "pretraining", "SFT"


def conversations(documents: RandomDocuments) -> Dataset:
    """The rows of the documents as `doge sft` packs conversations."""
    found = []
    for i in range(len(documents)):
        row = documents[i]
        starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), documents.row_length]
        lengths = [b - a for a, b in itertools.pairwise(starts)]
        found.append({"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist(), "seq_lengths": lengths})
    return Dataset.from_list(found)


def trainer_for(stage: str, args: argparse.Namespace, size: str, compiled: str, folder: str, clock: Clock) -> Any:
    """The trainer of a stage on a new model."""
    device, steps = this_device(), args.steps + args.skip
    config = config_for(size, vocab_size=args.vocab_size, max_position_embeddings=args.row_length)
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = build(OURS, config)
    documents = RandomDocuments(steps * args.rows * args.micro_batches, args.row_length, args.vocab_size)
    same: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "bf16": device.type == "cuda",
        "save_strategy": "no",
        "per_device_train_batch_size": args.rows,
        "gradient_accumulation_steps": args.micro_batches,
        "torch_compile": compiled == "model",
        "report_to": "none",
        "dataloader_num_workers": args.workers,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
    }
    if stage == PRETRAINING:
        arguments = PretrainArguments(data="-", tokenizer="-", on_bad_step="ignore", **same)
        tokens = args.rows * args.micro_batches * args.row_length
        run = _Run(tokens, 4.0, 4.0, flops_per_token(config, args.row_length), peak_flops(device, bf16=True))
        options = {"train_dataset": documents, "data_collator": collate, "run": run, "callbacks": [clock]}
        return PretrainTrainer(model, arguments, **options)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, "<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")  # noqa: S106
    arguments = SFTArguments(model="-", data="-", max_length=args.row_length, eval_strategy="no", **same)
    dataset = conversations(documents)  # one epoch: at its end workers begin anew
    return DogeSFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock])


def measure(size: str, compiled: str, args: argparse.Namespace) -> list[Row]:
    """Both stages in turn, ``args.rounds`` times; a row each with its median step."""
    seconds: dict[str, list[float]] = {PRETRAINING: [], SFT: []}
    for _ in range(args.rounds):
        for stage, found in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                clock = Clock()
                trainer_for(stage, args, size, compiled, folder, clock).train()
                found += clock.seconds(args.skip)
    tokens = args.rows * args.micro_batches * args.row_length
    rates = {stage: tokens / median(found) for stage, found in seconds.items()}
    rows = []
    for stage, rate in rates.items():
        row: Row = {"size": size, "stage": stage, "compiled": compiled, "rows": args.rows}
        row |= {"micro_batches": args.micro_batches, "row_length": args.row_length, "steps": args.steps}
        row |= {"tokens_per_second": round(rate), "of_pretraining": round(rate / rates[PRETRAINING], 3)}
        print(f"{size} {stage:<12} compiled {compiled:<6} {rate:>12,.0f} tok/s  {row['of_pretraining']}", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="20m")
    parser.add_argument("--compiled", default="no,model", help="no, model, or both in turn")
    parser.add_argument("--row_length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=64, help="rows of a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skip", type=int, default=3, help="steps before those that count")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4 if torch.cuda.is_available() else 0)
    parser.add_argument("--output", type=Path, default=RESULTS / "sft_throughput.csv")
    args = parser.parse_args()
    where, rows = provenance(this_device()), []
    for size in args.sizes.split(","):
        for compiled in args.compiled.split(","):
            rows += [row | where for row in measure(size, compiled, args)]
            write_csv(rows, args.output)


if __name__ == "__main__":
    main()
