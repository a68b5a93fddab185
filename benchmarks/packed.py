"""Attention over packed documents on a GPU: `packed`, `sparse` with the same documents, and cuDNN without any.

Forward and backward, bfloat16, medians, in one run. Documents have random lengths around a mean; cuDNN computes plain
causal attention over whole rows, which is more pairs and no score. Beside the times stand the roofline's terms: FLOP of
the pairs that are seen, and bytes of inputs, outputs and gradients, each read or written once.

    python benchmarks/packed.py                                          # one GPU, a minute
    python benchmarks/packed.py --draw benchmarks/results/packed_h200.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    BLUE,
    GREEN,
    GREY,
    RESULTS,
    Row,
    milliseconds,
    number,
    provenance,
    read_csv,
    this_device,
    write_csv,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from small_doge.ops.dynamic_mask import eviction_times, packed, sparse

PACKED, SPARSE, CUDNN = "packed", "sparse", "cuDNN causal"
COLORS = {PACKED: BLUE, SPARSE: GREEN, CUDNN: GREY}


def contenders(
    shape: tuple[int, int, int, int], D: int, documents: torch.Tensor
) -> tuple[list[torch.Tensor], dict[str, Callable[[], torch.Tensor]]]:
    """Leaves of shape (B, H, G, T) and head size D, and what computes an output (B, H, T, D) from them."""
    B, H, G, T = shape
    device, g = documents.device, torch.Generator(documents.device).manual_seed(0)
    q, k, v = (
        torch.randn(B, T, n, D, generator=g, device=device).bfloat16().transpose(1, 2).requires_grad_()
        for n in (H, G, G)
    )
    s = torch.rand(B, G, T, generator=g, device=device).requires_grad_()

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)

    def through_lists() -> torch.Tensor:
        return sparse(q, k, v, s, eviction_times(s, T, documents=documents), T)

    return [q, k, v, s], {PACKED: lambda: packed(q, k, v, s, documents), SPARSE: through_lists, CUDNN: cudnn}


def measure(shape: tuple[int, int, int, int], D: int, mean: float, rounds: int) -> list[Row]:
    B, H, G, T = shape
    device = this_device()
    new = torch.rand(B, T, generator=torch.Generator(device).manual_seed(1), device=device) < (1 / mean if mean else 0)
    documents = new.cumsum(-1)
    leaves, computed = contenders(shape, D, documents)
    do = torch.randn_like(leaves[0])
    lengths = torch.cat([torch.unique_consecutive(row, return_counts=True)[1] for row in documents]).double()
    pairs = float((lengths * (lengths + 1) / 2).sum()) * H
    rows = []
    for name, attention in computed.items():
        wanted = leaves[:3] if name == CUDNN else leaves
        ms = milliseconds(lambda a=attention, w=wanted: torch.autograd.grad(a(), w, do), rounds, device)
        row: Row = {"B": B, "H": H, "G": G, "T": T, "D": D, "mean_length": mean or "", "contender": name}
        row |= {"ms": round(ms, 4), "gflop": round(14 * pairs * D / 1e9, 1)}  # two products forward, five backward
        row |= {"mib": round(2 * D * B * T * (5 * H + 6 * G) / 2**20, 1)}
        row |= {"tflop_per_second": round(14 * pairs * D / ms / 1e9, 1)}
        rows.append(row)
        print(f"{shape} {mean or 'one document':>12} {name:<13} {ms:.3f} ms", flush=True)
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Milliseconds against the mean length of a document, a panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(tuple(str(row[x]) for x in "BHGT") for row in rows))
    figure, panels = plt.subplots(1, len(shapes), figsize=(4.2 * len(shapes), 3.4), layout="constrained", squeeze=False)
    for axes, shape in zip(panels[0], shapes, strict=True):
        mine = [row for row in rows if tuple(str(row[x]) for x in "BHGT") == shape]
        means = dict.fromkeys(row["mean_length"] for row in mine)
        names = [f"{float(mean):,.0f}" if mean else "one a row" for mean in means]
        for name, color in COLORS.items():
            heights = [number(row, "ms") for row in mine if row["contender"] == name]
            axes.plot(names, heights, "o-", color=color, label=name)
        axes.set_title("B, H, G, T = " + ", ".join(shape), fontsize=9)
        axes.set_xlabel("tokens a document, on average")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("ms, forward and backward")
    panels[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="16,8,4,2048;64,8,4,2048", help="B,H,G,T;…")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--means", default="100,300,1000,0", help="tokens a document; 0: a row is one")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS / "packed.csv")
    parser.add_argument("--draw", metavar="CSV", type=Path, help="only draw the picture of an earlier run")
    args = parser.parse_args()
    if args.draw:
        return draw(read_csv(args.draw), args.draw.with_suffix(".png"))
    where, rows = provenance(this_device()), []
    for shape in args.shapes.split(";"):
        B, H, G, T = map(int, shape.split(","))
        for mean in map(float, args.means.split(",")):
            rows += [row | where for row in measure((B, H, G, T), args.head_dim, mean, args.rounds)]
            write_csv(rows, args.output)
    return draw(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
