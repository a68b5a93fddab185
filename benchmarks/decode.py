"""Generating one token after another: what a token costs in the middle of a long text, and whether that ever grows.

    python benchmarks/decode.py --what steps                    # time per token at 32,768 tokens, against transformers
    python benchmarks/decode.py --what steps --sizes 20m,60m,160m,320m --contexts 2048,8192,32768    # a GPU
    python benchmarks/decode.py --what flat --check             # 65,536 tokens with one bounded cache, on a CPU

``steps`` times our DogeForCausalLM with its own cache and transformers' DogeForCausalLM with a DynamicCache, in turn,
in one run: bfloat16 on a GPU, float32 on a CPU, random weights of the same shapes. Our context is read in chunks;
transformers' cache is filled with random keys and values, since its forward pass over the context would build masks of
(H, T, T). transformers runs with eager and with sdpa attention, and what ours is compared with is the faster of the
two. On a GPU our step is also captured in a CUDA graph, and its logits are held to those of the step that was not.

``flat`` generates greedily with a tiny model and records the time per token (medians of blocks) and the bytes that the
cache holds, and for the first tokens the same, in turn, with an unbounded DynamicCache. ``--check`` first compares the
tokens of the two caches in float64.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    BLUE,
    GREY,
    ORANGE,
    RESULTS,
    SKY,
    Row,
    build,
    first_line,
    number,
    provenance,
    read_csv,
    seconds,
    synchronize,
    this_device,
    write_csv,
)
from transformers import DynamicCache

from small_doge.models import DogeConfig, config_for

OURS, GRAPH, EAGER, SDPA = "ours", "ours, CUDA graph", "transformers Doge, eager", "transformers Doge, sdpa"
COLORS = {OURS: BLUE, GRAPH: SKY, EAGER: GREY, SDPA: ORANGE}
BOUNDED, UNBOUNDED = "bounded", "unbounded"


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache holds."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes() if callable(cache.nbytes) else cache.nbytes)
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values) if x is not None)


def random_model(
    kind: str, config: DogeConfig, device: torch.device, dtype: torch.dtype, **options: Any
) -> torch.nn.Module:
    """A model with random weights; A, which starts at zero, is uniform in (−1, 1), so that keys differ in score."""
    torch.manual_seed(0)
    model = build(kind, config, **options)
    for name, parameter in model.named_parameters():
        if name.endswith(".A"):
            torch.nn.init.uniform_(parameter, -1, 1)
    return model.to(device, dtype).eval()


class Decoder:
    """A model in the middle of a text. Each call generates the next token, greedily."""

    def __init__(self, model: torch.nn.Module, cache: Any, token: torch.Tensor):
        self.model, self.cache, self.token = model, cache, token  # token (1, 1) is read by the next call
        self.logits: torch.Tensor | None = None

    def twin(self) -> Decoder:
        """Another in the same place of the same text, with the same model and a cache of its own."""
        return Decoder(self.model, copy.deepcopy(self.cache), self.token.clone())

    @torch.no_grad()
    def __call__(self) -> None:
        out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.logits, self.cache = out.logits, out.past_key_values
        self.token = self.logits[:, -1:].argmax(-1)


class Captured:
    """The same with the step as one CUDA graph. Ids and position are tensors, which the graph reads and moves on.

    A cache that counts in Python stops counting in a graph; :func:`disagreement` tells whether that matters.
    """

    WARMUP = 3  # steps in which libraries and kernels make themselves ready, before the graph

    def __init__(self, decoder: Decoder):
        self.model, self.cache, self.token = decoder.model, decoder.cache, decoder.token.clone()
        self.position = torch.tensor([[self.cache.get_seq_length()]], device=self.token.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARMUP):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._step()

    @torch.no_grad()
    def _step(self) -> torch.Tensor:
        out = self.model(
            input_ids=self.token,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.position.add_(1)
        return out.logits

    def __call__(self) -> None:
        self.graph.replay()


def ours_at(model: torch.nn.Module, config: DogeConfig, context: int, chunk: int, device: torch.device) -> Decoder:
    """Our model after a context of random tokens, read in chunks."""
    ids = torch.randint(0, config.vocab_size, (1, context + 1), device=device)
    cache, start = None, time.perf_counter()
    with torch.no_grad():
        for first in range(0, context, chunk):
            now = ids[:, first : min(first + chunk, context)]
            cache = model(input_ids=now, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            if isinstance(cache, DynamicCache):  # unbounded: filling it is as good, and reading is quadratic
                fill(cache, config, context - now.shape[1], device, next(model.parameters()).dtype)
                break
            progress(
                f"  ours reads its context: {first + now.shape[1]:,} of {context:,}", start, first + chunk, context
            )
    return Decoder(model, cache, ids[:, -1:])


def fill(cache: DynamicCache, config: DogeConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
    """Append random keys and values of so many tokens to every layer."""
    _, G, _, D = config.heads
    if tokens > 0:
        for i in range(config.num_hidden_layers):
            cache.update(*(torch.randn(1, G, tokens, D, device=device, dtype=dtype) for _ in range(2)), i)


def transformers_at(name: str, config: DogeConfig, context: int, device: torch.device, dtype: torch.dtype) -> Decoder:
    """transformers' model with a DynamicCache that holds a random context."""
    model = random_model(name, config, device, dtype, attn_implementation=name.split(", ")[1])
    cache = DynamicCache(config=model.config)
    fill(cache, config, context, device, dtype)
    return Decoder(model, cache, torch.randint(0, config.vocab_size, (1, 1), device=device))


def disagreement(decoder: Decoder, captured: Captured, steps: int = 64) -> float:
    """The largest difference of the logits over some steps on the same tokens, relative to the largest logit."""
    worst = 0.0
    for i in range(steps):
        token = torch.full_like(decoder.token, 7 * i + 1)
        decoder.token = token
        captured.token.copy_(token)
        decoder(), captured()
        expected = decoder.logits.float()
        worst = max(worst, float((captured.logits.float() - expected).abs().max() / expected.abs().max()))
    return worst


_last = time.perf_counter()


def progress(what: str, start: float, done: int, total: int) -> None:
    """A line every few seconds, with the time left if it goes on like this."""
    global _last
    now = time.perf_counter()
    if now - _last > 5 and 0 < done < total:
        _last = now
        print(f"{what}, {(now - start) / done * (total - done):.0f} s left", flush=True)


def measure_steps(size: str, context: int, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """One row a contender: time per token at a context."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    config = config_for(size, vocab_size=args.vocab_size, max_position_embeddings=context + 4096)
    model = random_model(OURS, config, device, dtype)
    makers: dict[str, Callable[[], Any]] = {OURS: lambda: ours_at(model, config, context, args.chunk, device)}
    decoders: dict[str, Any] = {}
    notes: dict[str, str] = {}

    def capture() -> Captured:
        plain, captured = decoders[OURS].twin(), Captured(decoders[OURS].twin())
        for _ in range(Captured.WARMUP):  # the steps that the other one took before its graph
            plain()
        difference = disagreement(plain, captured)
        notes[GRAPH] = f"logits within {difference:.1e} of the step that was not captured"
        if not difference < 0.05:
            notes[GRAPH] += ": NOT the same computation, its time is no result"
        return captured

    makers |= {name: lambda name=name: transformers_at(name, config, context, device, dtype) for name in (EAGER, SDPA)}
    if gpu:
        makers[GRAPH] = capture  # last: what a failed capture leaves behind is in nobody's way
    for name, make in makers.items():
        try:
            decoders[name] = make()
            seconds(decoders[name], args.warmup, device)
        except Exception as error:  # the others still run, and the row says why
            notes[name] = first_line(error)
            decoders.pop(name, None)
        gc.collect()

    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(args.rounds):
        for name, decoder in decoders.items():
            times[name].append(1e3 * seconds(decoder, args.repeats, device))
    ms = {name: median(taken) for name, taken in times.items()}
    base = min((ms[name] for name in (EAGER, SDPA) if name in ms), default=float("nan"))
    rows = []
    for name in makers:
        row: Row = {"what": "steps", "size": size, "context": context, "window": config.keep_window_size}
        row |= {"contender": name, "cache": "", "dtype": str(dtype).removeprefix("torch."), "ms_per_token": ""}
        if name in ms:
            cache = decoders[name].cache
            row |= {"cache": type(cache).__name__, "ms_per_token": round(ms[name], 4)}
            row |= {"fastest_ms": round(min(times[name]), 4), "tokens_per_second": round(1e3 / ms[name], 1)}
            row |= {"cache_mib": round(cache_bytes(cache) / 2**20, 3), "times_transformers": round(base / ms[name], 3)}
            row["steps"] = args.rounds * args.repeats
        row["note"] = notes.get(name, "")
        rows.append(row)
    return rows


def report_steps(rows: list[Row]) -> None:
    print(f"\nmilliseconds a token, {rows[0]['dtype']}, {rows[0]['device']}")
    print(
        f"{'size':>5} {'context':>8} {'contender':<26} {'cache':<18} {'ms':>9} {'tokens/s':>9} {'x Doge':>7} {'MiB':>9}"
    )
    for row in rows:
        values = [
            number(row, name) for name in ("ms_per_token", "tokens_per_second", "times_transformers", "cache_mib")
        ]
        cells = "{:>9.3f} {:>9,.1f} {:>7.2f} {:>9,.2f}".format(*values)
        print(f"{row['size']:>5} {row['context']:>8} {row['contender']:<26} {row['cache']:<18} {cells}  {row['note']}")


def draw_steps(rows: list[Row], path: Path) -> None:
    """Milliseconds a token, a group of bars for each size and context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if number(row, "ms_per_token") > 0]
    groups = list(dict.fromkeys((row["size"], str(row["context"])) for row in rows))
    names = [name for name in COLORS if any(row["contender"] == name for row in rows)]
    figure, axes = plt.subplots(figsize=(max(6.0, 1.4 + 1.7 * len(groups)), 3.8), layout="constrained")
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        found = {(row["size"], str(row["context"])): row for row in rows if row["contender"] == name}
        heights = [number(found.get(group), "ms_per_token") for group in groups]
        places = [g + (i - (len(names) - 1) / 2) * width for g in range(len(groups))]
        bars = axes.bar(places, heights, 0.92 * width, label=name, color=COLORS[name])
        axes.bar_label(bars, ["" if math.isnan(ms) else f"{ms:.3g}" for ms in heights], fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), [f"{size}\n{int(context):,} tokens" for size, context in groups])
    axes.set_ylabel("ms per generated token")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, ncols=2, loc="outside lower center")
    figure.suptitle(f"Time per token in a long text, {rows[0]['device']}, {rows[0]['dtype']}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def check(model: torch.nn.Module, config: DogeConfig, tokens: int, device: torch.device) -> str:
    """The first tokens with our cache and with an unbounded one, in float64: equal, or an error that says where not."""
    model = copy.deepcopy(model).double()
    first = torch.zeros(1, 1, dtype=torch.long, device=device)
    ours, other = Decoder(model, None, first), Decoder(model, DynamicCache(config=config), first)
    start, worst, seen = time.perf_counter(), 0.0, set()
    for i in range(tokens):
        ours(), other()
        worst = max(worst, float((ours.logits - other.logits).abs().max()))
        if int(ours.token) != int(other.token):
            raise SystemExit(f"token {i + 1} is {int(ours.token)} with our cache, {int(other.token)} with all keys")
        seen.add(int(ours.token))
        progress(f"  check: {i + 1:,} of {tokens:,} tokens equal", start, i + 1, tokens)
    return f"{tokens} tokens equal ({len(seen)} different ones), logits within {worst:.1e}, float64"


def measure_flat(args: argparse.Namespace, device: torch.device, where: Row) -> list[Row]:
    """One row a cache and block of tokens."""
    config = config_for(
        "tiny",
        vocab_size=args.vocab_size,
        keep_window_size=args.window,
        max_position_embeddings=args.tokens + 1,
        # Tied embeddings, or weights of the usual size, soon repeat one token for ever; these wander.
        tie_word_embeddings=False,
        initializer_range=0.05,
    )
    model = random_model(OURS, config, device, torch.float32)
    checked = ""
    if args.check:
        checked = check(model, config, min(args.check_tokens, args.tokens), device)
        print(checked, flush=True)
    first = torch.zeros(1, 1, dtype=torch.long, device=device)
    decoders = {BOUNDED: Decoder(model, None, first), UNBOUNDED: Decoder(model, DynamicCache(config=config), first)}
    rows: list[Row] = []
    start = written = time.perf_counter()
    spent = dict.fromkeys(decoders, 0.0)
    for done in range(0, args.tokens, args.block):
        length = min(args.block, args.tokens - done)
        for name, decoder in decoders.items():
            if name == UNBOUNDED and done >= args.compare:
                continue
            taken = []
            for _ in range(length):
                before = time.perf_counter()
                decoder()
                synchronize(device)
                taken.append(1e3 * (time.perf_counter() - before))
            spent[name] += 1e-3 * sum(taken)
            row: Row = {"what": "flat", "cache": name, "class": type(decoder.cache).__name__, "window": args.window}
            row |= {"tokens": done + length, "ms_per_token": round(median(taken), 4)}
            row |= {"cache_bytes": cache_bytes(decoder.cache), "checked": checked if name == BOUNDED else ""}
            rows.append(row | where)
        now, end = time.perf_counter(), done + length
        if now - written > 10 and end < args.tokens:
            written = now
            write_csv(rows, args.output)  # a run that is cut short leaves what it had
            left = spent[BOUNDED] / end * (args.tokens - end) + spent[UNBOUNDED] / end * max(0, args.compare - end)
            print(f"{end:>8,} of {args.tokens:,} tokens, {left:.0f} s left", flush=True)
    print(f"{time.perf_counter() - start:.0f} s")
    return rows


def report_flat(rows: list[Row]) -> None:
    """Whether time and bytes stay what they are when the cache is full."""
    bounded = [row for row in rows if row["cache"] == BOUNDED]
    full = [row for row in bounded if number(row, "tokens") > 2 * number(row, "window")]
    print(f"\n{rows[0]['device']}, window {rows[0]['window']}, cache {bounded[0]['class']}")
    if len(full) >= 2:
        some = max(1, min(16, len(full) // 2))
        early = median(number(row, "ms_per_token") for row in full[:some])
        late = median(number(row, "ms_per_token") for row in full[-some:])
        held = {int(number(row, "cache_bytes")) for row in full}
        print(
            f"  ms per token: {early:.3f} after token {full[0]['tokens']}, {late:.3f} at the end, x {late / early:.3f}"
        )
        print(f"  bytes from there on: {min(held):,} to {max(held):,}  {'ok' if len(held) == 1 else 'NOT CONSTANT'}")
    others = [row for row in rows if row["cache"] == UNBOUNDED]
    if others:
        last = others[-1]
        print(f"  unbounded after {last['tokens']} tokens: {last['ms_per_token']} ms, {last['cache_bytes']} bytes")
    if bounded[0]["checked"]:
        print(f"  {bounded[0]['checked']}")


def draw_flat(rows: list[Row], path: Path) -> None:
    """Time per token and bytes against tokens generated."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    for name, color, label in (
        (UNBOUNDED, ORANGE, "all keys kept"),
        (BOUNDED, BLUE, f"the {int(number(rows[0], 'window')):,} best keys of each head kept"),
    ):
        of_cache = [row for row in rows if row["cache"] == name]
        tokens = [number(row, "tokens") for row in of_cache]
        left.plot(tokens, [number(row, "ms_per_token") for row in of_cache], color=color, linewidth=1.6, label=label)
        mib = [number(row, "cache_bytes") / 2**20 for row in of_cache]
        right.plot(tokens, mib, color=color, linewidth=1.8, label=label)
    # A moment in which the machine was busy elsewhere must not flatten everything else.
    times = sorted(number(row, "ms_per_token") for row in rows)
    top = 1.4 * times[int(0.95 * (len(times) - 1))]
    above = sum(ms > top for ms in times)
    if above:
        note = f"{above} of {len(times)} blocks lie above, up to {times[-1]:.0f} ms"
        left.text(0.98, 0.97, note, fontsize=8, ha="right", va="top", transform=left.transAxes, color="#555555")
    left.set_ylabel("ms per token (median of a block)")
    right.set_ylabel("cache, MiB")
    for axes in (left, right):
        axes.set_xlabel("tokens generated")
        axes.set_xlim(left=0)
        axes.set_ylim(0, top if axes is left else None)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.grid(color="#E4E4E4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=2, loc="outside lower center")
    figure.suptitle(f"Generating on and on, doge-tiny, {rows[0]['device']}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("steps", "flat"), default="steps")
    parser.add_argument("--device", help="cuda or cpu; by default a GPU for steps if there is one, the CPU for flat")
    parser.add_argument("--vocab_size", type=int, default=32768)
    parser.add_argument("--draw", metavar="CSV", help="only draw the picture and print the table of an earlier run")
    parser.add_argument("--output", help="by default results/decode_steps.csv or decode_flat.csv")
    steps = parser.add_argument_group("steps")
    steps.add_argument("--sizes", default="20m")
    steps.add_argument("--contexts", default="32768")
    steps.add_argument("--chunk", type=int, default=512, help="tokens of the context that our model reads at a time")
    steps.add_argument("--rounds", type=int, default=7)
    steps.add_argument("--repeats", type=int, default=8, help="tokens a contender generates in each of its turns")
    steps.add_argument("--warmup", type=int, default=4)
    flat = parser.add_argument_group("flat")
    flat.add_argument("--tokens", type=int, default=65536)
    flat.add_argument("--block", type=int, default=256)
    flat.add_argument("--window", type=int, default=512, help="keep_window_size")
    flat.add_argument("--compare", type=int, default=8192, help="tokens of the unbounded cache")
    flat.add_argument("--check", action="store_true", help="compare the first tokens with an unbounded cache's")
    flat.add_argument("--check_tokens", type=int, default=4096)
    args = parser.parse_args()
    if args.draw:
        rows = read_csv(args.draw)
        (draw_steps if rows[0]["what"] == "steps" else draw_flat)(rows, Path(args.draw).with_suffix(".png"))
        return (report_steps if rows[0]["what"] == "steps" else report_flat)(rows)
    device = torch.device(args.device or ("cpu" if args.what == "flat" else this_device().type))
    args.output = args.output or RESULTS / f"decode_{args.what}.csv"
    where = provenance(device)
    if args.what == "flat":
        rows = measure_flat(args, device, where)
        path = write_csv(rows, args.output)
        draw_flat(rows, path.with_suffix(".png"))
        return report_flat(rows)
    rows = []
    todo = [(size, int(context)) for size in args.sizes.split(",") for context in args.contexts.split(",")]
    start = time.perf_counter()
    for i, (size, context) in enumerate(todo):
        rows += [row | where for row in measure_steps(size, context, args, device)]
        gc.collect()
        torch.cuda.empty_cache() if device.type == "cuda" else None
        path = write_csv(rows, args.output)  # after every one: a run that is cut short leaves what it had
        passed = time.perf_counter() - start
        left = passed / (i + 1) * (len(todo) - i - 1)
        print(f"{size} at {context:,} tokens, {passed:.0f} s since the start, about {left:.0f} s left", flush=True)
    draw_steps(rows, path.with_suffix(".png"))
    report_steps(rows)


if __name__ == "__main__":
    main()
