"""Tokens a second of `doge prepare`, beside the tokenizers library alone on the same text.

    python benchmarks/prepare.py --corpus my_texts --tokenizer runs/mine/tokenizer

Three things are timed, in turn, several times over, each in processes of its own: the library encoding what has been
read into memory, with 1 thread and with 2 (`encode_batch`, and `encode_batch_fast` without offsets); the same in two
processes of one thread; and the command as a whole, reading, packing and hashing counted, imports not. It encodes the
first 64 MB by threads of its own in any case, so the corpus should be several times that. The median and the spread are
kept. "per core" divides by the threads or processes that encode; where others use the machine, tokens a second of CPU
time say more (for the command they count its imports too).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from common import Row, provenance, this_device, write_csv

from small_doge.data.corpora import open_corpus
from small_doge.data.encoding import cores
from small_doge.data.tokenizer import load_tokenizer, plain_tokenizer

LIBRARY = [("encode_batch", 1, 1), ("encode_batch", 2, 1), ("encode_batch_fast", 1, 1), ("encode_batch_fast", 2, 1)]
LIBRARY += [("encode_batch_fast", 1, 2)]  # the last: two processes of one thread


def texts_of(corpus: str, megabytes: float) -> list[str]:
    """The first texts of a corpus, of so many megabytes."""
    found, size = [], 0
    for document in open_corpus(corpus):
        found.append(document.text)
        size += len(document.text)
        if size >= megabytes * 1e6:
            break
    return found


def encode_alone(arguments: argparse.Namespace) -> None:
    """In a process of its own: print tokens and seconds of encoding texts that are already in memory."""
    texts = texts_of(arguments.corpus, arguments.megabytes)[arguments.part :: arguments.parts]
    encode = getattr(plain_tokenizer(load_tokenizer(arguments.tokenizer)), arguments.encode)
    print("ready", flush=True)
    sys.stdin.readline()
    tokens, start, cpu = 0, time.perf_counter(), time.process_time()
    for first in range(0, len(texts), 256):
        tokens += sum(len(found) for found in encode(texts[first : first + 256], add_special_tokens=False))
    print(json.dumps([tokens, time.perf_counter() - start, time.process_time() - cpu]), flush=True)


def library(arguments: argparse.Namespace, name: str, threads: int, processes: int) -> tuple[float, float]:
    """Tokens a second, and a second of CPU time, of the library: threads of processes that begin together."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    environment["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    running = []
    for part in range(processes):
        words = ["--corpus", arguments.corpus, "--tokenizer", arguments.tokenizer, "--encode", name]
        words += ["--megabytes", str(arguments.megabytes), "--part", str(part), "--parts", str(processes)]
        running.append(
            subprocess.Popen(
                [sys.executable, __file__, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [json.loads(process.communicate()[0]) for process in running]
    tokens, seconds, cpu = zip(*found, strict=True)
    return sum(tokens) / max(seconds), sum(tokens) / sum(cpu)


def whole(arguments: argparse.Namespace, workers: int) -> tuple[float, float]:
    """Tokens a second, and a second of CPU time, of `doge prepare`: by threads of its own (1), or by processes."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--corpus", arguments.corpus, "--tokenizer", arguments.tokenizer, "--workers", str(workers)]
        command = [str(Path(sys.executable).with_name("doge")), "prepare", *words, "--output_dir", f"{folder}/out"]
        before = os.times()
        subprocess.run(command, check=True, capture_output=True)
        after = os.times()
        cpu = sum(after[2:4]) - sum(before[2:4])  # of children that have ended, and theirs
        stage = json.loads(Path(folder, "out", "stage.json").read_text(encoding="utf-8"))
        tokens = sum(split["tokens"] for split in stage["splits"].values())
        return tokens / stage["seconds"], tokens / cpu


def write(rates: dict[tuple[str, int], list[tuple[float, float]]], results: Path) -> None:
    """Print the medians so far and write them down."""
    rows: list[Row] = []
    for (what, count), found in rates.items():
        speeds, cpu = zip(*found, strict=True)
        middle = statistics.median(speeds)
        row: Row = {"what": what, "cores": count, "tokens_per_second": round(middle), "per_core": round(middle / count)}
        row |= {
            "per_cpu_second": round(statistics.median(cpu)),
            "least": round(min(speeds)),
            "most": round(max(speeds)),
        }
        rows.append(row | {"rounds": len(found)} | provenance(this_device()))
        print(", ".join(f"{name} {value}" for name, value in itertools.islice(row.items(), 6)))
    print(f"wrote {write_csv(rows, results)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--megabytes", type=float, default=30, help="of text for the library alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "prepare_cpu.csv")
    for name, default in (("encode", ""), ("part", 0), ("parts", 1)):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.encode:
        encode_alone(arguments)
        return
    used = cores()
    rates: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for name, threads, processes in LIBRARY:
            what = f"tokenizers {name}" + (", processes" if processes > 1 else "")
            rates[what, threads * processes].append(library(arguments, name, threads, processes))
        rates["doge prepare, threads", used].append(whole(arguments, 1))
        rates["doge prepare, processes", used].append(whole(arguments, max(2, used)))
        write(rates, arguments.results)  # after every round: it takes minutes, and may be stopped


if __name__ == "__main__":
    main()
