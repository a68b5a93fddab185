"""`doge serve` under load: 32 clients at once, some that hang up, some that send nonsense; what it answers and holds.

    python benchmarks/serve_load.py MODEL --precision int8 --threads 1

1,000 requests in blocks of 100. A third are conversations, a third texts, half of these streamed; a sixth hang up,
some at once and some after the first event; a sixth are malformed: fields of the server's own OpenAPI schema with any
values, or no JSON at all. After each block the server has to be idle, and the memory of its process is read.
Fails if anything is answered otherwise than by 200, a 4xx or 503 in OpenAI's shape, or a whole stream.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
import torch
from common import RESULTS, Row, first_line, provenance, write_csv

JUNK: list[Any] = [None, True, -1, 0, 1e999, 1 << 70, 0.5, "", "x", "\ud800", [], [[]], {}, {"a": 1}, [1, "a"]]
WORDS = "The small dog reads a long book about é 🐕 and 中 houses".split()


class Client:
    """Asks a server; each request is drawn from its number, so that every run asks the same."""

    def __init__(self, address: str, tokens: int):
        self.address, self.tokens = urlsplit(address).netloc, tokens
        self.name = json.loads(self.get("/v1/models"))["data"][0]["id"]
        schemas = json.loads(self.get("/openapi.json"))["components"]["schemas"]
        self.fields = sorted({*schemas["ChatRequest"]["properties"], *schemas["CompletionRequest"]["properties"], "n"})

    def get(self, path: str) -> bytes:
        return urlopen(f"http://{self.address}{path}", timeout=60).read()

    def idle(self) -> bool:
        """Whether nobody is being answered."""
        health = json.loads(self.get("/health"))
        return health["active"] == health["waiting"] == 0

    def ask(self, number: int) -> tuple[str, float]:
        """One request: what became of it, in how many seconds."""
        draw, start = random.Random(number), time.perf_counter()
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 120)))
        chat, kind = draw.random() < 0.5, draw.choices(("ask", "leave", "junk"), (4, 1, 1))[0]
        body: dict[str, Any] = {"model": self.name, "max_tokens": draw.randint(1, self.tokens), "seed": number}
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        body |= {"stream": True} if draw.random() < 0.5 else {}
        if kind == "junk":
            body |= {draw.choice(self.fields): draw.choice(JUNK) for _ in range(draw.randint(1, 3))}
        raw = json.dumps(body).encode()
        if kind == "junk" and draw.random() < 0.3:
            raw = draw.choice((draw.randbytes(200), raw[:-3], b"[" * 5000, b"x" * (2 << 20)))
        try:
            with contextlib.closing(http.client.HTTPConnection(self.address, timeout=300)) as connection:
                path = "/v1/chat/completions" if chat else "/v1/completions"
                connection.request("POST", path, raw, {"Content-Type": "application/json"})
                if kind == "leave":
                    time.sleep(draw.random() * 0.2)
                    if draw.random() < 0.5:
                        with connection.getresponse() as answer:
                            answer.readline()
                    return "left", time.perf_counter() - start
                answer = connection.getresponse()
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            what = "413" if len(raw) > 1 << 20 else f"failed: {first_line(error)}"  # closed while still being told
            return what, time.perf_counter() - start
        return self.judge(answer, content), time.perf_counter() - start

    def judge(self, answer: http.client.HTTPResponse, content: bytes) -> str:
        """The status of an answer that is as it should be."""
        try:
            if answer.status != 200:
                found, grave = json.loads(content)["error"], answer.status >= 500 and answer.status != 503
                fits = found.keys() == {"message", "type", "param", "code"} and not grave
                return str(answer.status) if fits else f"failed: {answer.status}"
            if "event-stream" in answer.headers["Content-Type"]:
                return "200" if content.endswith(b"data: [DONE]\n\n") else "failed: half a stream"
            return "200" if json.loads(content)["usage"]["completion_tokens"] else "failed: no tokens"
        except (ValueError, KeyError) as error:
            return f"failed: {first_line(error)}"


def main() -> None:
    """Start a server, ask, write the table; exits with status 1 after a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer at most")
    for name, default in (("precision", "auto"), ("threads", "1")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--output", default=str(RESULTS / "serve_load_cpu.csv"))
    options = parser.parse_args()
    command = [sys.executable, "-m", "small_doge", "serve", options.model, "--port", "0", "--threads", options.threads]
    server = subprocess.Popen([*command, "--precision", options.precision], stdout=subprocess.PIPE, text=True)
    rows: list[Row] = []
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        client = Client(next(word for word in line.split() if word.startswith("http")).rstrip(","), options.tokens)
        process, block = psutil.Process(server.pid), 100
        for first in range(0, options.requests, block):
            start = time.perf_counter()
            with ThreadPoolExecutor(options.clients) as pool:
                found = list(pool.map(client.ask, range(first, min(first + block, options.requests))))
            while not client.idle():
                time.sleep(0.05)
            wall, waits = time.perf_counter() - start, sorted(s for what, s in found if what == "200")
            kinds = Counter(what if not what.startswith("failed") else "failed" for what, _ in found)
            row: Row = {"precision": options.precision, "clients": options.clients, "requests": first + len(found)}
            row |= {kind: kinds[kind] for kind in ("200", "left", "400", "404", "413", "503", "failed")}
            row |= {"other_4xx": len(found) - sum(row[kind] for kind in list(row)[3:]), "seconds": round(wall, 1)}
            row |= {"median_wait": round(median(waits), 2), "longest_wait": round(waits[-1], 2)}
            row |= {"memory_mib": round(process.memory_info().rss / 2**20, 1), "threads_held": process.num_threads()}
            rows.append(row | provenance(torch.device("cpu")))
            print(row, *(what for what, _ in found if what.startswith("failed")), flush=True)
    finally:
        server.terminate()
        server.wait(timeout=30)
    print(f"wrote {write_csv(rows, options.output)}")
    sys.exit(any(row["failed"] for row in rows))


if __name__ == "__main__":
    main()
