"""Requests of an evaluation answered a second: ours, and lm-evaluation-harness's own HFLM with the same model.

    python benchmarks/likelihood.py --data_dir FOLDER                     # random weights of size 20m, HellaSwag only
    python benchmarks/likelihood.py --data_dir FOLDER --what hellaswag,mmlu,triviaqa --model runs/20m/pretrain

FOLDER holds hellaswag/validation.jsonl, mmlu/*/{dev,test}.jsonl and triviaqa/{train,validation}.jsonl with the columns
of the Hub. Requests are five-shot and written as the harness writes them: HellaSwag's examples are drawn for each
question, so that only a question's endings share a context; MMLU's are the same for a subject; TriviaQA's answers are
generated. The contenders answer the same requests with the same model, in turn, in one run, tokenizing included: HFLM
at its default batch size of 1 and at 8, and ours. Without --model the weights are random and the tokenizer is trained
on FOLDER's text: that changes what is answered, not what it costs, except that nothing random ends an answer, so
TriviaQA stops after --answer_tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import BLUE, GREY, ORANGE, RESULTS, Row, number, provenance, read_csv, synchronize, this_device, write_csv
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.hellaswag.utils import preprocess

from small_doge.data.tokenizer import TokenizerRecipe, load_tokenizer, train_tokenizer
from small_doge.evaluation.likelihood import HarnessModel
from small_doge.models import DogeForCausalLM, config_for, load_model

SHOTS = 5
HFLM_1, HFLM_8, OURS = "HFLM, batch size 1 (its default)", "HFLM, batch size 8", "ours"
COLORS = {HFLM_1: GREY, HFLM_8: ORANGE, OURS: BLUE}
NAMES = {"hellaswag": "HellaSwag", "mmlu": "MMLU", "triviaqa": "TriviaQA"}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def hellaswag(folder: Path, documents: int) -> list[Instance]:
    """Four requests a document."""
    rng = random.Random(0)
    found = []
    for row in read(folder / "hellaswag" / "validation.jsonl"):
        query = preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        found.append((query, [preprocess(ending) for ending in row["endings"]], int(row["label"])))
    rng.shuffle(found)
    requests = []
    for i, (query, endings, _) in enumerate(found[:documents]):
        shots = [f"{q} {choices[gold]}\n\n" for q, choices, gold in rng.sample(found[documents:], SHOTS)]
        context = "".join(shots) + query
        requests += [
            Instance("loglikelihood", {}, (context, f" {ending}"), j, doc_id=i) for j, ending in enumerate(endings)
        ]
    return requests


def mmlu(folder: Path, documents: int) -> list[Instance]:
    """Four requests a document, from as many subjects as hold half of the documents each."""
    requests: list[Instance] = []
    for subject in sorted(path for path in (folder / "mmlu").iterdir() if path.is_dir())[:2]:

        def text(row: dict[str, Any]) -> str:
            choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True))
            return f"{row['question'].strip()}\n{choices}Answer:"

        about = f"The following are multiple choice questions (with answers) about {subject.name.replace('_', ' ')}."
        shots = [f"{text(row)} {'ABCD'[row['answer']]}" for row in read(subject / "dev.jsonl")[:SHOTS]]
        for row in read(subject / "test.jsonl")[: documents // 2]:
            context, i = "\n\n".join([about, *shots, text(row)]), len(requests) // 4
            requests += [Instance("loglikelihood", {}, (context, f" {c}"), j, doc_id=i) for j, c in enumerate("ABCD")]
    return requests


def triviaqa(folder: Path, documents: int, tokens: int) -> list[Instance]:
    """One request a document."""
    rng = random.Random(0)
    options = {"until": ["\n", ".", ","], "do_sample": False, "temperature": 0.0, "max_gen_toks": tokens}
    train, requests = read(folder / "triviaqa" / "train.jsonl"), []
    for i, row in enumerate(read(folder / "triviaqa" / "validation.jsonl")[:documents]):
        shots = [f"Question: {s['question']}?\nAnswer: {s['answer']['value']}\n\n" for s in rng.sample(train, SHOTS)]
        context = f"{''.join(shots)}Question: {row['question']}?\nAnswer:"
        requests.append(Instance("generate_until", {}, (context, dict(options)), 0, doc_id=i))
    return requests


def model_and_tokenizer(args: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """Those of --model, or random weights and a tokenizer of the text itself."""
    if args.model:
        return load_model(args.model).to(device), load_tokenizer(args.model)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "text.txt")
        files = [args.data_dir / task / "validation.jsonl" for task in ("hellaswag", "triviaqa")]
        rows = itertools.chain.from_iterable(map(read, files))
        corpus.write_text("\n".join(" ".join(map(str, _strings(row))) for row in rows), encoding="utf-8")
        recipe = TokenizerRecipe(str(Path(folder, "made")), str(corpus), args.vocab_size, validation_fraction=0)
        tokenizer = load_tokenizer(train_tokenizer(recipe))
    config = config_for(args.size, vocab_size=args.vocab_size)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    model = DogeForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".A"):
            torch.nn.init.uniform_(parameter, -1, 1)  # at zero all scores would be 1
    return model.to(device).eval(), tokenizer


def _strings(value: Any) -> list[str]:
    if isinstance(value, (list, dict)):
        return [s for item in (value.values() if isinstance(value, dict) else value) for s in _strings(item)]
    return [value] if isinstance(value, str) else []


def measure(what: str, requests: list[Instance], contenders: dict[str, Callable[[], Any]], rounds: int) -> list[Row]:
    """One row a contender."""
    device = this_device()
    kind = requests[0].request_type
    times: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    answers: dict[str, list[Any]] = {}
    for turn in range(rounds):
        for name, make in contenders.items():
            lm = make()
            synchronize(device)
            start, start_cpu = time.perf_counter(), time.process_time()
            answers[name] = getattr(lm, kind)(requests, disable_tqdm=True)
            synchronize(device)
            times[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
            print(f"  {what}, {name}, turn {turn + 1} of {rounds}: {times[name][-1]:.1f} s", flush=True)
    rows = []
    for name in contenders:
        taken = median(times[name])
        row: Row = {"what": what, "contender": name, "requests": len(requests), "rounds": rounds}
        row |= {"seconds": round(taken, 2), "requests_per_second": round(len(requests) / taken, 2)}
        row["cpu_seconds"] = round(median(cpu[name]), 2)  # where others use the machine too, the fairer measure
        row["times_hflm_cpu"] = round(median(cpu[HFLM_1]) / median(cpu[name]), 2)
        row["times_hflm"] = round(median(times[HFLM_1]) / taken, 2)
        row["times_hflm_8"] = round(median(times[HFLM_8]) / taken, 2)
        rows.append(row | compare(requests, answers[name], answers[HFLM_1]))
    return rows


def compare(requests: list[Instance], found: list[Any], expected: list[Any]) -> Row:
    """How answers differ from HFLM's: the largest difference, and the share of documents answered alike."""
    if requests[0].request_type == "generate_until":
        return {"same_answers": round(sum(a == b for a, b in zip(found, expected, strict=True)) / len(found), 4)}
    choices: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        choices.setdefault(request.doc_id, []).append(i)
    same = [max(of, key=lambda i: found[i][0]) == max(of, key=lambda i: expected[i][0]) for of in choices.values()]
    difference = max(abs(a[0] - b[0]) for a, b in zip(found, expected, strict=True))
    greedy = sum(a[1] == b[1] for a, b in zip(found, expected, strict=True)) / len(found)
    return {"largest_difference": f"{difference:.1e}", "same_answers": sum(same) / len(same), "same_greedy": greedy}


def report(rows: list[Row]) -> None:
    print(f"\n{rows[0]['model']}, {rows[0]['device']}, threads: {rows[0]['threads']}")
    print(
        f"{'':<10} {'contender':<34} {'requests/s':>10} {'x HFLM':>7} {'x of 8':>7} {'x CPU s':>7} "
        f"{'difference':>11} {'same answers':>13}"
    )
    for row in rows:
        print(
            f"{row['what']:<10} {row['contender']:<34} {number(row, 'requests_per_second'):>10.2f} "
            f"{number(row, 'times_hflm'):>7.2f} {number(row, 'times_hflm_8'):>7.2f} "
            f"{number(row, 'times_hflm_cpu'):>7.2f} "
            f"{row.get('largest_difference', '') or '':>11} {number(row, 'same_answers'):>13.1%}"
        )


def draw(rows: list[Row], path: Path) -> None:
    """Requests a second, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["what"] for row in rows))
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(max(6.0, 1.6 + 2.6 * len(tasks)), 3.6), layout="constrained", squeeze=False
    )
    for axes, task in zip(panels[0], tasks, strict=True):
        of_task = [row for row in rows if row["what"] == task]
        for i, row in enumerate(of_task):
            bar = axes.bar(
                i, number(row, "requests_per_second"), 0.8, color=COLORS[row["contender"]], label=row["contender"]
            )
            times = "" if row["contender"] == HFLM_1 else f"\n× {number(row, 'times_hflm'):.1f}"
            axes.bar_label(bar, [f"{number(row, 'requests_per_second'):.3g}{times}"], fontsize=8, padding=2)
        axes.margins(y=0.2)
        axes.set_title(f"{NAMES[task]}, {of_task[0]['requests']} requests", fontsize=9)
        axes.set_xticks([])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("requests per second")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    where = f"{rows[0]['device']}, threads: {rows[0]['threads']}"
    figure.suptitle(f"Five-shot evaluation of {rows[0]['model']}, {where}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="folder of the tasks' JSONL files")
    parser.add_argument("--what", default="hellaswag", help="hellaswag, mmlu and triviaqa, some of them")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", help="folder of a model and its tokenizer; by default random weights of --size")
    parser.add_argument("--size", default="20m")
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--tokens_per_batch", type=int, help="of ours")
    parser.add_argument("--answer_tokens", type=int, default=16, help="of TriviaQA, at most")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--draw", metavar="CSV", help="only draw the picture and print the table of an earlier run")
    parser.add_argument("--output", type=Path, help="by default results/likelihood_cpu.csv or likelihood_gpu.csv")
    args = parser.parse_args()
    if args.draw:
        rows = read_csv(args.draw)
        report(rows)
        draw(rows, Path(args.draw).with_suffix(".png"))
        return
    if not args.data_dir:
        parser.error("--data_dir is missing")
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    device = this_device()
    output = args.output or RESULTS / f"likelihood_{'gpu' if device.type == 'cuda' else 'cpu'}.csv"
    model, tokenizer = model_and_tokenizer(args, device)
    contenders: dict[str, Callable[[], Any]] = {
        HFLM_1: lambda: HFLM(model, tokenizer=tokenizer),
        HFLM_8: lambda: HFLM(model, tokenizer=tokenizer, batch_size=8),
        OURS: lambda: HarnessModel(model, tokenizer, tokens_per_batch=args.tokens_per_batch, progress=False),
    }
    makers: dict[str, Callable[[], list[Instance]]] = {
        "hellaswag": lambda: hellaswag(args.data_dir, args.documents),
        "mmlu": lambda: mmlu(args.data_dir, args.documents),
        "triviaqa": lambda: triviaqa(args.data_dir, args.documents, args.answer_tokens),
    }
    where = {"model": args.model or f"doge-{args.size}", "vocab_size": model.config.vocab_size} | provenance(device)
    rows: list[Row] = []
    for what in args.what.split(","):
        rows += [row | where for row in measure(what, makers[what](), contenders, args.rounds)]
        write_csv(rows, output)  # a run that is cut short leaves what it had
    report(rows)
    draw(rows, output.with_suffix(".png"))
    print(f"wrote {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
