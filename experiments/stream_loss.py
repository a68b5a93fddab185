"""What a training loses, if anything, to a gradient of the residual stream in 16 bits.

A small model of 32 layers, where rounding does most harm, learns the standard library's sources as bytes with a float32
gradient of the stream. From there trainings go on with one in float32, one rounded to the nearest bfloat16 and one that
is dithered, as ``ops/residual.py`` gives it on a GPU (done here in plain tensor operations, see stream_gradient.py), on
the same bytes for each seed, while the learning rate falls to nothing. From the first step on it would say little: when
so deep and narrow a model begins to learn is a matter of chance, and 600 steps end 0.2 bits apart for that alone. Half
an hour on two CPU cores.

    python experiments/stream_loss.py
    python experiments/stream_loss.py --draw
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from points import Point, Row, parser, save, study
from stream_gradient import KINDS, stream, text

from small_doge.models import DogeForCausalLM, config_for

LENGTH, ROWS, PEAK = 256, 4, 1e-3
EVERY = 20  # steps whose mean loss is a row
HELD_OUT = 1 << 17  # bytes at the end of the text


def points_of(args: Any) -> list[Point]:
    return [{"layers": args.layers, "before": args.before, "steps": args.steps, "seeds": args.seeds}]


def measure(point: Point) -> list[Row]:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    model = DogeForCausalLM(config_for("20m", vocab_size=256, num_hidden_layers=point["layers"], **shape))
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, weight_decay=0.01)
    data = text()
    training, held_out = data[:-HELD_OUT], data[-HELD_OUT:].view(-1, LENGTH)

    def train(kind: str, steps: int, order: torch.Generator, rate: Callable[[int], float]) -> list[float]:
        """Bits a byte of each step."""
        losses: list[float] = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = PEAK * rate(step)
            starts = torch.randint(len(training) - LENGTH, (ROWS,), generator=order)
            ids = torch.stack([training[i : i + LENGTH] for i in starts])
            with stream(kind):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item() / math.log(2))
            if (step + 1) % 100 == 0:
                print(f"{kind}, step {step + 1} of {steps}, {mean(losses[-100:]):.3f} bits a byte", flush=True)
        return losses

    train("float32", point["before"], torch.Generator().manual_seed(0), lambda step: min(1, (step + 1) / 100))
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    rows: list[Row] = []
    for seed in range(1, point["seeds"] + 1):
        for kind in KINDS:
            model.load_state_dict(start[0])
            optimizer.load_state_dict(copy.deepcopy(start[1]))
            torch.manual_seed(seed)  # of dithering; the bytes have a generator of their own
            steps = point["steps"]
            losses = train(kind, steps, torch.Generator().manual_seed(seed), lambda step: 1 - step / steps)  # noqa: B023
            with torch.no_grad(), stream(None):
                found = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in held_out.split(32)]
            for n in range(0, steps, EVERY):
                row: Row = {"seed": seed, "stream_gradient": kind, "step": n + EVERY}
                rows.append(row | {"bits_per_byte": round(mean(losses[n : n + EVERY]), 4), "held_out": ""})
            rows[-1]["held_out"] = round(mean(found) / math.log(2), 5)
    return rows


def last(rows: list[Row]) -> dict[tuple[str, str], float]:
    """Bits a byte of held-out text, by seed and kind."""
    return {(str(x["seed"]), str(x["stream_gradient"])): float(x["held_out"]) for x in rows if x["held_out"]}


def report(rows: list[Row]) -> None:
    """Held-out bits a byte, and differences from a float32 gradient seed by seed."""
    found = last(rows)
    for kind in KINDS:
        seeds = [seed for seed, other in found if other == kind]
        apart = [found[seed, kind] - found[seed, "float32"] for seed in seeds]
        print(f"{kind:<15}", *(f"{found[seed, kind]:.4f}" for seed in seeds), f"  {mean(apart):+.4f} from float32")


def draw(rows: list[Row], path: Path) -> None:
    """The curves with a float32 gradient, and how far from them the others are, in thousandths of a bit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, apart) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    curve: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        curve.setdefault((str(row["seed"]), row["stream_gradient"]), []).append(float(row["bits_per_byte"]))
    for (seed, kind), mine in curve.items():
        steps = [EVERY * (n + 1) for n in range(len(mine))]
        if kind == "float32":
            curves.plot(steps, mine, color=KINDS[kind], ls="--" if seed == "1" else "-", label=f"float32, bytes {seed}")
            continue
        difference = [1000 * (a - b) for a, b in zip(mine, curve[seed, "float32"], strict=True)]
        label = kind if seed == "1" else None
        apart.plot(steps, difference, color=KINDS[kind], ls="--" if seed == "1" else "-", label=label)
    curves.set_ylabel("bits a byte, training")
    apart.set_ylabel("thousandths of a bit, from float32")
    for axes in (curves, apart):
        axes.set_xlabel("step")
        axes.legend(title="gradient of the stream", title_fontsize=8, frameon=False, fontsize=8)
    save(figure, path, "A trained model of 32 layers goes on with each gradient of the stream")
    plt.close(figure)


def main() -> None:
    args = parser(__doc__, Path(__file__).with_suffix(".csv"))
    args.add_argument("--layers", type=int, default=32)
    args.add_argument("--before", type=int, default=1500, help="steps with a float32 gradient of the stream")
    args.add_argument("--steps", type=int, default=400, help="of each training that goes on from there")
    args.add_argument("--seeds", type=int, default=2)
    study(args.parse_args(), points_of, measure, report, draw)


if __name__ == "__main__":
    main()
