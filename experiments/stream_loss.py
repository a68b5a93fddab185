"""What a training loses, if anything, to a gradient of the residual stream in 16 bits.

Three trainings from the same weights on the same bytes, for each seed: with a float32 gradient of the stream, with one
rounded to the nearest bfloat16, and with one that is dithered, as ``ops/residual.py`` gives it on a GPU (done here in
plain tensor operations, see stream_gradient.py). 32 layers, where rounding to the nearest does most harm to gradients,
and a width of 128, so that two CPU cores do it: some four minutes a training.

    python experiments/stream_loss.py
    python experiments/stream_loss.py --draw
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from points import Point, Row, parser, save, study
from stream_gradient import KINDS, stream, text

from small_doge.models import DogeForCausalLM, config_for

LENGTH, ROWS, PEAK = 256, 4, 2e-3
EVERY = 20  # steps whose mean loss is a row
HELD_OUT = 1 << 17  # bytes at the end of the text


def points_of(args: Any) -> list[Point]:
    return [
        {"layers": args.layers, "steps": args.steps, "seed": seed, "stream_gradient": kind}
        for seed in range(args.seeds)
        for kind in KINDS
    ]


def measure(point: Point) -> list[Row]:
    steps, kind = point["steps"], point["stream_gradient"]
    torch.manual_seed(point["seed"])
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    model = DogeForCausalLM(config_for("20m", vocab_size=256, num_hidden_layers=point["layers"], **shape))
    data = text()
    training, held_out = data[:-HELD_OUT], data[-HELD_OUT:].view(-1, LENGTH)
    order = torch.Generator().manual_seed(point["seed"])  # not the one that dithering draws from
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / 50, 5 * (1 - n / steps)))
    rows: list[Row] = []
    losses: list[float] = []
    for step in range(1, steps + 1):
        starts = torch.randint(len(training) - LENGTH, (ROWS,), generator=order)
        ids = torch.stack([training[i : i + LENGTH] for i in starts])
        with stream(kind):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item() / math.log(2))
        if step % EVERY == 0:
            rows.append({"step": step, "bits_per_byte": round(mean(losses), 4), "held_out": ""})
            losses = []
            if step % 100 == 0:
                print(f"{point}, step {step}, {rows[-1]['bits_per_byte']} bits a byte", flush=True)
    with torch.no_grad(), stream(None):
        found = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in held_out.split(32)]
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
    """The curve of each training, and the held-out text after it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, ends) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(2, 1))
    found = last(rows)
    seeds = list(dict.fromkeys(seed for seed, _ in found))
    for n, (kind, color) in enumerate(KINDS.items()):
        for seed in seeds:
            mine = [x for x in rows if str(x["seed"]) == seed and x["stream_gradient"] == kind]
            steps = [int(x["step"]) for x in mine]
            label = kind if seed == seeds[0] else None
            curves.plot(steps, [float(x["bits_per_byte"]) for x in mine], color=color, lw=1, label=label)
        ends.plot([int(x) + 0.12 * (n - 1) for x in seeds], [found[x, kind] for x in seeds], "o", color=color)
    curves.set_xlabel("step")
    curves.set_ylabel("bits a byte, training")
    curves.legend(title="gradient of the stream", title_fontsize=8, frameon=False, fontsize=8)
    ends.set_xticks([int(x) for x in seeds], [f"seed {x}" for x in seeds])
    ends.set_ylabel("bits a byte, held-out text")
    save(figure, path, "32 layers trained with each gradient of the stream")
    plt.close(figure)


def main() -> None:
    args = parser(__doc__, Path(__file__).with_suffix(".csv"))
    args.add_argument("--layers", type=int, default=32)
    args.add_argument("--steps", type=int, default=600)
    args.add_argument("--seeds", type=int, default=3)
    study(args.parse_args(), points_of, measure, report, draw)


if __name__ == "__main__":
    main()
