"""Does a window of w keys keep what was said long ago? DMA, full attention, sliding windows on rows of 32,768 tokens.

    python experiments/long_context.py --data runs/long/data      # folder of `doge prepare`; long_context.csv, .png
    python experiments/long_context.py --draw                     # the picture and the table from the CSV

All kinds are the same Doge on the same rows in the same order. ``full`` has A frozen at 0 and a window as long as the
row: causal attention with q and k norm. ``window`` has A frozen at 0, so that all keys tie: a sliding window of w.
``dma:W:L:H`` is DMA whose last L keys stay visible whatever their score, and whose scores age: one that is higher by 1
makes up for H tokens (0: for any number, as published).

Training rows are sown with needles (needles.py), and those of the first steps are cut into short texts. Of the needles
in held-out text right is the greedy value, both tokens; held-out loss is that of text without them. Speed is a forward
pass over eight rows' tokens in bfloat16, cut to the length, memory that of one text of the length read into a cache;
``full`` too is computed by our kernels, which carry the score along. Every figure has a row of its own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from needles import DEPTHS, POOL, SIZE, Sown, haystack, recalled
from points import BLUE, GREEN, GREY, ORANGE, RED, SKY, Point, Row, parser, save, study, this_device
from runs import IGNORED, train
from transformers import DynamicCache

from small_doge.data.packed import read_manifest
from small_doge.data.packing import PackedTokens
from small_doge.models import DogeForCausalLM, DynamicMaskCache, config_for
from small_doge.ops.linear_cross_entropy import linear_cross_entropy
from small_doge.report.plots import attention_and_scores

DMA, FULL, WINDOW = "dma", "full", "window"
NAMES = {DMA: "DMA", FULL: "full attention", WINDOW: "sliding window"}
COLORS = {DMA: BLUE, FULL: GREY, WINDOW: ORANGE}
KEPT, AGED, BOTH = GREEN, RED, SKY  # DMA whose last keys stay, or whose scores age
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
KINDS = (
    "full;window:1024;dma:512:0:32768;dma:1024:0:32768;dma:2048:0:32768;dma:1024:0:327680;dma:512:512;"
    "dma:512:512:3276800"
)
SETTINGS = ("size", "steps", "stages", "density", "rows", "micro_batches", "learning_rate", "pairs", "tests", "data")
STAGES = "64:2000 128:200 256:200 512:200 1024:200 4096:200"
LOADERS = 4  # processes that sow rows of many short texts, which takes longer than a step

ROWS = 8  # of a batch as long as training rows
FIRST = 64  # where the first bucket of losses ends; each after it ends at twice the position


def model_of(point: Point, manifest: dict[str, Any]) -> DogeForCausalLM:
    """A fresh model of the kind."""
    sizes = {"vocab_size": manifest["vocab_size"], "max_position_embeddings": manifest["row_length"]}
    sizes |= {"keep_window_size": point["w"], "local_window": point["local"]}
    sizes |= {"score_lifetime": point["lifetime"] or None}
    model = DogeForCausalLM(config_for(point["size"], **sizes))
    for layer in model.model.layers if point["kind"] != DMA else ():
        layer.self_attn.A.requires_grad_(False)
    return model


def whole_rows(data: PackedTokens) -> list[int]:
    """Which rows are from one document, so that a position in the row is one in a text."""
    found = [i for i in range(len(data)) if bool((data[i]["labels"][1:] != IGNORED).all())]
    if not found:
        raise ValueError(f"no {data.split} row of {data.folder} lies within one document, expected longer documents")
    return found


def batches(data: PackedTokens, rows: Sequence[int], device: torch.device) -> Iterator[torch.Tensor]:
    """Token ids (B, T) of some rows."""
    for start in range(0, len(rows), ROWS):
        yield torch.stack([data[i]["input_ids"] for i in rows[start : start + ROWS]]).to(device)


def loss_by_position(model: Any, rows: Iterator[torch.Tensor], edges: Sequence[int]) -> list[float]:
    """Mean nats of the tokens at positions low to high − 1, for each two edges low and high that follow one another.

    Args:
        rows: token ids (B, T) of one text each.
        edges: from 1 on, as the first token is not predicted.
    """
    sums, counts = [0.0] * (len(edges) - 1), [0] * (len(edges) - 1)
    for ids in rows:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        for i, (low, high) in enumerate(pairwise(edges)):
            states, wanted = hidden[:, low - 1 : high - 1].flatten(0, 1), ids[:, low:high].flatten()
            sums[i] += linear_cross_entropy(states, model.lm_head.weight, wanted, 1.0).item()  # in chunks of its own
            counts[i] += wanted.numel()
    return [total / count for total, count in zip(sums, counts, strict=True)]


def found_needles(model: Any, data: PackedTokens, rows: Sequence[int], length: int, tests: int) -> list[Row]:
    """Accuracy and loss at each depth of one length; the same tests for every model."""
    device, vocab_size = next(model.parameters()).device, data.manifest["vocab_size"]
    rng = np.random.default_rng(length)
    made = [haystack(data[rows[i % len(rows)]]["input_ids"].numpy(), length, rng, vocab_size) for i in range(tests)]
    ids, asked = (torch.from_numpy(np.stack(x)) for x in zip(*made, strict=True))
    size = ROWS * data.row_length // length
    parts = zip(ids.split(size), asked.split(size), strict=True)
    right, nats = zip(*(recalled(model, i.to(device), a.to(device)) for i, a in parts), strict=True)
    figures = {"needle": torch.cat(right).float().mean(0), "needle_loss": torch.cat(nats).mean(0)}
    return [
        figure(name, round(value, 4), length=length, depth=depth)
        for name, values in figures.items()
        for depth, value in zip(DEPTHS, values.tolist(), strict=True)
    ]


def scores_of_needles(model: Any, data: PackedTokens, rows: Sequence[int]) -> list[Row]:
    """How far scores lie apart within a head, and those of a needle's tokens above the rest: largest of all heads.

    Times the lifetime, that is the age which they make up for.
    """
    length, vocab_size = min(1024, data.row_length), data.manifest["vocab_size"]
    rng, found = np.random.default_rng(length), []
    for i in range(ROWS):
        ids, asked = haystack(data[rows[i % len(rows)]]["input_ids"].numpy(), length, rng, vocab_size)
        hidden = (ids >= vocab_size - 2 * POOL) & (np.arange(length) < asked.min())
        _, heads = attention_and_scores(model, torch.from_numpy(ids)[None].to(next(model.parameters()).device))
        s = np.concatenate(heads)
        found.append([s[:, ~hidden].std(1), s[:, hidden].mean(1) - s[:, ~hidden].mean(1)])
    spread, ahead = np.mean(found, 0).max(1)
    return [figure(name, float(f"{x:.4g}"), length=length) for name, x in (("spread", spread), ("ahead", ahead))]


def speed(model: Any, kind: str, length: int, tokens: int, repeats: int = 5) -> list[Row]:
    """Of a forward pass without the head over so many tokens, and of one text read into the kind's cache."""
    from common import seconds  # which is found since points was imported

    device, config = next(model.parameters()).device, model.config
    ids = torch.randint(config.vocab_size, (tokens // length, length), device=device)

    def forward() -> None:
        model.base_model(input_ids=ids, use_cache=False)

    forward()
    found = {"forward_ms": 1e3 * seconds(forward, repeats, device), "forward_tokens": ids.numel()}
    cache = DynamicCache() if kind == FULL else DynamicMaskCache(config)
    held = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    model.base_model(input_ids=ids[:1], use_cache=True, past_key_values=cache)
    if device.type == "cuda":
        found["peak_gib"] = (torch.cuda.max_memory_allocated() - held) / 2**30
    plain = [x for layer in cache.layers for x in (layer.keys, layer.values)] if kind == FULL else []
    found["cache_bytes"] = sum(x.nbytes for x in plain) if kind == FULL else cache.nbytes
    return [figure(name, round(value, 4), length=length) for name, value in found.items()]


def figure(measure: str, value: float, **where: float) -> Row:
    """A row, all of the same columns."""
    names = ("length", "position_from", "position_to", "depth")
    return {"measure": measure} | {name: where.get(name, "") for name in names} | {"value": value}


@torch.no_grad()
def scores(model: Any, point: Point, validation: PackedTokens) -> list[Row]:
    """What a trained model can do at every length."""
    device, longest = next(model.parameters()).device, validation.row_length
    rows = whole_rows(validation)
    lengths = [n for n in (longest >> i for i in (4, 3, 2, 1, 0)) if n >= 4 * len(DEPTHS) * SIZE]
    edges = [1, *(FIRST << i for i in range(longest.bit_length()) if FIRST << i < longest), longest]
    model.eval()
    # Layer by layer as written: compiling anew for every shape would take longer than all of this.
    with torch.compiler.set_stance("force_eager"):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = loss_by_position(model, batches(validation, rows, device), edges)
            found = [
                figure("loss_by_position", round(loss, 4), length=longest, position_from=low, position_to=high)
                for (low, high), loss in zip(pairwise(edges), losses, strict=True)
            ]
            for length in lengths:
                found += found_needles(model, validation, rows, length, point["tests"])
            if point["kind"] == DMA:
                found += scores_of_needles(model, validation, rows)
        model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
        for length in lengths:
            found += speed(model, point["kind"], length, ROWS * longest)
    return found


def measure(point: Point) -> list[Row]:
    """Train one kind, and all its figures."""
    data, validation = (PackedTokens(point["data"], split, check=False) for split in ("train", "validation"))
    per_step = point["rows"] * point["micro_batches"]
    cut = [(int(length), int(steps) * per_step) for length, steps in (x.split(":") for x in point["stages"].split())]
    counts = {"count": point["steps"] * per_step, "pairs": point["pairs"], "density": point["density"]}
    sown = Sown(data, point["seed"], stages=cut, **counts)
    torch.manual_seed(point["seed"])
    model = model_of(point, data.manifest).to(this_device())
    settings = {name: point[name] for name in ("steps", "rows", "micro_batches", "learning_rate", "seed")}
    settings |= {"train_sampling_strategy": "sequential"}
    settings |= {"dataloader_num_workers": LOADERS if this_device().type == "cuda" else 0}
    figures = train(model, sown, validation, **settings).figures
    return [figure(name, value) for name, value in figures.items()] + scores(model, point, validation)


def points_of(args: Any) -> list[Point]:
    row_length = read_manifest(Path(args.data))["row_length"]
    found = []
    for seed in args.seeds:
        for name in args.kinds.split(";"):
            kind, *windows = name.split(":")
            if kind not in NAMES or len(windows) not in {FULL: (0,), WINDOW: (1,), DMA: (1, 2, 3)}[kind]:
                raise SystemExit(f"kind {name!r}, expected {FULL}, {WINDOW}:W, {DMA}:W, {DMA}:W:LOCAL[:LIFETIME]")
            w, local, lifetime = [*map(int, windows), *(row_length, 0, 0)[len(windows) :]]
            point = {"kind": kind, "w": w, "local": local, "lifetime": lifetime, "seed": seed}
            found.append(point | {name: getattr(args, name) for name in SETTINGS})
    return found


def means(rows: list[Row], measure: str, x: Callable[[Row], float]) -> dict[float, float]:
    """A measure of one kind by something, over seeds and whatever else differs."""
    values: dict[float, list[float]] = {}
    for row in rows:
        if row["measure"] == measure:
            values.setdefault(x(row), []).append(float(row["value"]))
    return {at: statistics.fmean(values[at]) for at in sorted(values)}


def by_kind(rows: list[Row]) -> dict[tuple[str, int, int, int], list[Row]]:
    """Rows of each kind and window, of the settings that were measured last."""
    same = [row for row in rows if all(row[name] == rows[-1][name] for name in SETTINGS)]
    found: dict[tuple[str, int, int, int], list[Row]] = {}
    for row in same:
        windows = (int(row[name]) for name in ("w", "local", "lifetime"))
        found.setdefault((row["kind"], *windows), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (list(NAMES).index(item[0][0]), item[0][1:])))


def name_of(kind: str, w: int, local: int, lifetime: int) -> str:
    named = NAMES[kind] if kind == FULL else f"{NAMES[kind]} {w:,}"
    return named + (f", last {local:,} kept" if local else "") + (f", lifetime {lifetime:,}" if lifetime else "")


def color_of(key: tuple[str, int, int, int]) -> str:
    return BOTH if key[2] and key[3] else AGED if key[3] else KEPT if key[2] else COLORS[key[0]]


def report(rows: list[Row]) -> None:
    """Speed, losses, cache and recall by depth at the longest length."""
    print(f"{'':<44}tokens/s  held out    bits/B  at the end  cache MiB  recalled from depth {DEPTHS}")
    for key, mine in by_kind(rows).items():
        one = {name: means(mine, name, lambda _: 0)[0] for name in ("tokens_per_second", "eval_loss")}
        bits = means(mine, "eval_bits_per_byte", lambda _: 0)[0]
        late = [*means(mine, "loss_by_position", lambda row: float(row["position_from"])).values()][-1]
        cache = means(mine, "cache_bytes", lambda row: float(row["length"]))
        deep = means(
            [row for row in mine if row["length"] == f"{max(cache):.0f}"], "needle", lambda row: float(row["depth"])
        )
        print(
            f"{name_of(*key):<44}{one['tokens_per_second']:>8,.0f}  {one['eval_loss']:>8.4f}  {bits:>8.4f}  "
            f"{late:>10.4f}  {cache[max(cache)] / 2**20:>9.2f}  {' '.join(f'{x:.2f}' for x in deep.values())}"
        )


def draw(rows: list[Row], path: Path) -> None:
    """Loss by position, recall by distance over all lengths, speed and cache by length; a line a kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = any(row["measure"] == "forward_ms" for row in rows)  # left out where several kinds shared a GPU
    shape, size = ((2, 2), (10, 7.5)) if timed else ((1, 3), (13, 4.2))
    figure, panels = plt.subplots(*shape, figsize=size, layout="constrained")
    losses, recall, *speeds, caches = panels.flat
    kinds = by_kind(rows)
    for key, mine in kinds.items():
        color = color_of(key)
        alike = [one for one in kinds if color_of(one) == color]
        style: Any = {"color": color, "linestyle": LINES[alike.index(key) % len(LINES)], "label": name_of(*key)}
        style |= {"marker": "o", "markersize": 3}

        def length(row: Row) -> float:
            return float(row["length"])

        def middle(row: Row) -> float:
            return math.sqrt(float(row["position_from"]) * float(row["position_to"]))

        def distance(row: Row) -> float:
            return max(SIZE, float(row["depth"]) * length(row))  # a needle right before its question is SIZE away

        def plot(axes: Any, values: dict[float, float], style: Any = style) -> None:
            axes.plot(list(values), list(values.values()), **style)

        plot(losses, means(mine, "loss_by_position", middle))
        plot(recall, means(mine, "needle", distance))
        tokens, ms = means(mine, "forward_tokens", length), means(mine, "forward_ms", length)
        for axes in speeds:
            plot(axes, {n: tokens[n] / ms[n] / 1e3 for n in ms})
        plot(caches, {n: x / 2**20 for n, x in means(mine, "cache_bytes", length).items()})
    losses.set(xlabel="position in the text", ylabel="nats a token", title="Held-out loss")
    recall.set(xlabel="tokens from the needle to its question", ylabel="share recalled", title="Needles, all lengths")
    recall.set_ylim(-0.03, 1.03)
    for axes in speeds:
        axes.set(xlabel="tokens of a text", ylabel="million tokens/s", title="Forward pass, the same tokens in all")
        axes.set_ylim(0)
    caches.set(xlabel="tokens of a text", ylabel="MiB", title="Cache of one text", yscale="log")
    losses.legend(frameon=False, fontsize=8)
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
    one = rows[-1]
    save(figure, path, f"Doge {one['size']}, {one['steps']} steps on the same rows, {one['device']}")
    plt.close(figure)


def main() -> None:
    args = parser(__doc__, Path(__file__).with_suffix(".csv"))
    args.add_argument("--data", default="runs/long/data", help="folder of `doge prepare`; its rows are the context")
    args.add_argument("--kinds", default=KINDS)
    args.add_argument("--size", default="20m")
    args.add_argument("--steps", type=int, default=3500)
    args.add_argument("--rows", type=int, default=2, help="rows of a micro-batch")
    args.add_argument("--micro_batches", type=int, default=1)
    args.add_argument("--learning_rate", type=float, default=2e-3)
    args.add_argument("--pairs", type=int, default=256, help="needles and questions of a training row")
    args.add_argument(
        "--stages", default=STAGES, help="LENGTH:STEPS …: rows of the first steps are cut into such texts"
    )
    args.add_argument("--density", type=int, default=20, help="tokens of a short text for each of its needles")
    args.add_argument("--tests", type=int, default=128, help="haystacks of each length")
    args.add_argument("--seeds", type=int, nargs="+", default=[233])
    options = args.parse_args()
    study(options, points_of, measure, report, draw)


if __name__ == "__main__":
    main()
