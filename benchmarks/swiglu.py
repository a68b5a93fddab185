"""A SwiGLU of the published sizes, forward and backward: PyTorch's products with our kernel between them, and QuACK's
products that compute silu(gate) · up and its gradient themselves. Medians on the device, in one run.

Beside the times stands the roofline: FLOP of the three products and their gradients at the measured rate of a large
one, and what our kernel reads and writes at that of a large copy (QuACK moves as much, while it multiplies).
``launch_ms`` is what Python takes for a step of one row, while the GPU waits.

    python benchmarks/swiglu.py                                   # one Hopper, half a minute
    python benchmarks/swiglu.py --sizes 20m --rows 1 --rounds 3   # anywhere; without QuACK or Hopper our kernel alone
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from common import RESULTS, Row, milliseconds, over_sizes, seconds

from small_doge.models import config_for
from small_doge.ops.products import can_multiply
from small_doge.ops.swiglu import swiglu_linear, swiglu_mlp


def with_a_kernel(x, gate, up, down):
    return swiglu_linear(F.linear(x, torch.cat((gate, up)).to(x.dtype)), down)


def measure(size: str, rows: int, rounds: int, device: torch.device, rate: tuple[float, float]) -> list[Row]:
    config, T = config_for(size), 2048
    C, width = config.hidden_size, config.intermediate_size
    torch.manual_seed(0)
    x, grad = (torch.randn(rows, T, C, device=device, dtype=torch.bfloat16) for _ in range(2))
    shapes = (width, C), (width, C), (C, width)
    weights = [(torch.randn(shape, device=device) / shape[1] ** 0.5).requires_grad_() for shape in shapes]

    def training(run: Callable, rows: int) -> Callable[[], object]:
        leaves = [x[:rows].detach().requires_grad_(), *weights]
        return lambda: torch.autograd.grad(run(*leaves), leaves, grad[:rows])

    contenders = {"a kernel between": with_a_kernel}
    if can_multiply(x, C, width):
        contenders["QuACK"] = swiglu_mlp
    flop, moved = 18 * rows * T * C * width, 18 * rows * T * width
    products, floor = 1e3 * flop / rate[0], 1e3 * (flop / rate[0] + moved / rate[1])
    found: list[Row] = []
    for name, run in contenders.items():
        torch._dynamo.reset()
        compiled = torch.compile(run, dynamic=False)
        row: Row = {"size": size, "rows": rows, "T": T, "C": C, "I": width, "contender": name}
        row["ms"] = round(milliseconds(training(compiled, rows), rounds, device), 4)
        small = training(compiled, 1)
        milliseconds(small, 1, device)
        row["launch_ms"] = round(1e3 * median(seconds(small, 10, device) for _ in range(5)), 4)
        row |= {"products_ms": round(products, 4), "floor_ms": round(floor, 4), "mib": round(moved / 2**20, 1)}
        found.append(row)
        print(f"{size:>5} {name:<16} {row['ms']:.3f} ms, floor {floor:.3f}, products {products:.3f}", flush=True)
    return found


if __name__ == "__main__":
    over_sizes(measure, __doc__, RESULTS / "swiglu.csv")
