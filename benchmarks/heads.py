"""From hidden states to the heads of attention: one product, norm and rotation of q and k, and the layer of v that
gives scores, by our kernels or left to torch.compile. Forward and backward, medians on the device, in one run.

Beside the times stands the roofline: FLOP of the product and its two gradients at the measured rate of a large one, and
bytes of what lies between the product and attention, each read or written once, at that of a large copy.

    python benchmarks/heads.py                                   # one GPU, half a minute: the four published sizes
    python benchmarks/heads.py --sizes 20m --rows 1 --rounds 3   # anywhere; on a CPU the compiler alone
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import RESULTS, Row, milliseconds, over_sizes

from small_doge.models import config_for
from small_doge.models.rotary import rotary_angles, rotate
from small_doge.ops.heads import can_project_heads, projected_heads


def as_written(x, weight, bias, norms, angles, scorer, H, eps):
    """What :func:`projected_heads` gives, for torch.compile to make kernels of."""
    D = norms[0].shape[0]
    heads = F.linear(x, weight, bias).unflatten(-1, (-1, D))
    q, k, v = heads.split([H, (heads.shape[2] - H) // 2, (heads.shape[2] - H) // 2], 2)
    q, k = (F.rms_norm(y.float(), (D,), norm, eps).transpose(1, 2) for y, norm in zip((q, k), norms, strict=True))
    q, k = (rotate(y, angles).to(x.dtype) for y in (q, k))
    return q, k, v.transpose(1, 2), F.linear(v.flatten(2), *scorer)


def measure(size: str, rows: int, rounds: int, device: torch.device, rate: tuple[float, float]) -> list[Row]:
    config, T = config_for(size), 2048
    H, G, M, D = config.heads
    C, dtype = config.hidden_size, torch.bfloat16
    torch.manual_seed(0)
    x = torch.randn(rows, T, C, device=device, dtype=dtype)
    weight = torch.randn((H + 2 * G) * D, C, device=device, dtype=dtype) / C**0.5
    norms = tuple(torch.ones(D, device=device) for _ in range(2))
    scorer = torch.randn(M, G * D, device=device, dtype=dtype) / C**0.5
    angles = rotary_angles(config, torch.arange(T, device=device).expand(rows, T), torch.float32, None)
    leaves = [y.requires_grad_() for y in (x, weight, *norms, scorer)]
    grads = [torch.randn(rows, n, T, D, device=device, dtype=dtype) for n in (H, G, G)]
    grads.append(torch.randn(rows, T, M, device=device, dtype=dtype))

    def training(heads: Callable) -> Callable[[], object]:
        inputs = (x, weight, None, norms, angles, (scorer, None), H, config.rms_norm_eps)
        return lambda: torch.autograd.grad(heads(*inputs), leaves, grads)

    torch._dynamo.reset()
    steps = {"torch.compile": training(torch.compile(as_written))}
    if can_project_heads(x, D):
        steps["ours"] = training(torch.compile(projected_heads))
    flop = 6 * rows * T * C * (H + 2 * G) * D
    # q and k forward and backward, the gradient of v, and v for its layer and for that of its weight
    moved = 2 * rows * T * D * (2 * (H + G) + 3 * (H + G) + 2 * G + 2 * G)
    floor = 1e3 * (flop / rate[0] + moved / rate[1])
    found: list[Row] = []
    for name, step in steps.items():
        row: Row = {"size": size, "rows": rows, "T": T, "C": C, "H": H, "G": G, "D": D, "contender": name}
        row |= {"ms": round(milliseconds(step, rounds, device), 4), "floor_ms": round(floor, 4)}
        row |= {"product_ms": round(1e3 * flop / rate[0], 4), "mib": round(moved / 2**20, 1)}
        found.append(row)
        print(f"{size:>5} {name:<14} {row['ms']:.3f} ms, floor {floor:.3f}", flush=True)
    return found


if __name__ == "__main__":
    over_sizes(measure, __doc__, RESULTS / "heads.csv")
