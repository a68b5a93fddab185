"""How exact gradients are when that of the residual stream has 16 bits: rounded to the nearest, or dithered.

``ops/residual.py`` gives the stream's gradient in bfloat16 under autocast, rounded up or down at random. Here the same
is done to a Doge of the 20m's width in plain tensor operations, after it has been trained for a few steps on the
standard library's sources as bytes, and every gradient is compared with that in float32: the relative error of each
parameter, medians over layers. A few minutes on two CPU cores.

    python experiments/stream_gradient.py
    python experiments/stream_gradient.py --draw
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from points import BLUE, GREY, ORANGE, Point, Row, parser, save, study

from small_doge.models import DogeForCausalLM, config_for, modeling_doge

KINDS = {"float32": GREY, "to the nearest": ORANGE, "dithered": BLUE}  # of the stream's gradient, under autocast
PARAMETERS = ["embed_tokens", "layernorm", "residual", "v_proj", "o_proj", "gate_proj", "down_proj"]


class Rounded(torch.autograd.Function):
    """x, whose gradient loses its last 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dithered: bool) -> torch.Tensor:
        ctx.dithered = dithered
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        if not ctx.dithered:
            return grads[0].bfloat16().float(), None
        bits = grads[0].view(torch.int32)
        return ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32), None


@contextlib.contextmanager
def stream(kind: str | None) -> Iterator[None]:
    """Where the model is called under autocast, with a gradient of the stream of one of KINDS; None: no autocast."""
    plain = modeling_doge.add_norm_and_scale

    def rounded(x, update, norm, scale):
        y = Rounded.apply(x if update is None else x + update, kind == "dithered")
        return norm(y), Rounded.apply(scale * y, kind == "dithered")

    modeling_doge.add_norm_and_scale = plain if kind in (None, "float32") else rounded
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind is not None):
            yield
    finally:
        modeling_doge.add_norm_and_scale = plain


def gradients(model: torch.nn.Module, ids: torch.Tensor, kind: str | None) -> dict[str, torch.Tensor]:
    """Of all parameters by name; in float32 throughout where ``kind`` is None."""
    with stream(kind):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def text() -> torch.Tensor:
    """The standard library's sources as bytes."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def points_of(args: Any) -> list[Point]:
    return [{"layers": layers, "steps": args.steps} for layers in args.layers]


def measure(point: Point) -> list[Row]:
    layers, steps = point["layers"], point["steps"]
    torch.manual_seed(0)
    config = config_for("20m", vocab_size=256, num_hidden_layers=layers)
    model = DogeForCausalLM(config)
    data = text()

    def batch(rows: int) -> torch.Tensor:
        return torch.stack([data[i : i + 256] for i in torch.randint(len(data) - 256, (rows,))])

    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(steps):
        ids = batch(8)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0:
            print(f"{layers} layers, step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    ids = batch(16)
    exact = gradients(model, ids, None)
    rows: list[Row] = []
    for kind in KINDS:
        found = gradients(model, ids, kind)
        error = {name: float((found[name] - x).norm() / x.norm()) for name, x in exact.items()}
        row: Row = {"stream_gradient": kind}
        rows.append(row | {part: round(median(error[x] for x in error if part in x), 5) for part in PARAMETERS})
    return rows


def report(rows: list[Row]) -> None:
    """Percent, by depth and kind."""
    print("layers", "stream", *PARAMETERS, sep="  ")
    for row in rows:
        print(
            row["layers"], row["stream_gradient"], *(f"{100 * float(row[part]):.2f}" for part in PARAMETERS), sep="  "
        )


def draw(rows: list[Row], path: Path) -> None:
    """Bars by parameter, one panel a depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    depths = list(dict.fromkeys(row["layers"] for row in rows))
    figure, panels = plt.subplots(1, len(depths), figsize=(5 * len(depths), 3.6), layout="constrained", squeeze=False)
    for axes, depth in zip(panels[0], depths, strict=True):
        for i, row in enumerate(row for row in rows if row["layers"] == depth):
            kind = row["stream_gradient"]
            places = [place + 0.27 * (i - 1) for place in range(len(PARAMETERS))]
            axes.bar(places, [100 * float(row[part]) for part in PARAMETERS], 0.25, label=kind, color=KINDS[kind])
        axes.set_xticks(range(len(PARAMETERS)), PARAMETERS, rotation=30, ha="right", fontsize=8)
        axes.set_title(f"{depth} layers", fontsize=10)
        axes.set_axisbelow(True)
    panels[0][0].set_ylabel("error of the gradient, %")
    panels[0][0].legend(title="gradient of the stream", title_fontsize=8, frameon=False, fontsize=8)
    save(figure, path, "Gradients under autocast against those in float32, medians over layers")
    plt.close(figure)


def main() -> None:
    args = parser(__doc__, Path(__file__).with_suffix(".csv"))
    args.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    args.add_argument("--steps", type=int, default=60, help="of training, 2,048 bytes each")
    study(args.parse_args(), points_of, measure, report, draw)


if __name__ == "__main__":
    main()
