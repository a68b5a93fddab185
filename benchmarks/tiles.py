"""Which tiles the Triton kernels of Dynamic Mask Attention should have: every choice timed, kernel by kernel.

For each kernel and each shape, with lists of keys and without, the median of several launches at every choice of tiles
(queries, keys, warps, pipeline stages). The winners belong into ``ops/dynamic_mask/sparse.py``. One GPU, bfloat16.

    python benchmarks/tiles.py                                  # all kernels at the shapes of dynamic_mask.py
    python benchmarks/tiles.py --shapes 1,8,32768,2048 --chunks 1024,2048
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, Row, first_line, provenance, write_csv

from small_doge.ops.dynamic_mask import eviction_times

sparse: Any = importlib.import_module("small_doge.ops.dynamic_mask.sparse")  # the package has a function of that name

D = 128
CHOICES = {
    "forward": [(128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3)],
    "backward_queries": [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2)],
    "backward_keys": [
        (32, 128, 8, 2),
        (32, 128, 8, 3),
        (64, 128, 8, 2),
        (64, 64, 8, 2),
        (64, 64, 4, 2),
        (32, 64, 4, 3),
    ],
}


def milliseconds(launch: Callable[[], object], rounds: int) -> float:
    """Median over ``rounds`` after three launches that compile and warm up."""
    for _ in range(3):
        launch()
    times = []
    for _ in range(rounds):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        launch()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after))
    return median(times)


def launcher(kernel: str, B: int, H: int, T: int, window: int) -> Callable[[], object]:
    """A function that launches one kernel on random inputs, with the tiles and the chunk that are set now."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    s = torch.rand(B, H, T, device="cuda") * 3
    e = eviction_times(s, window) if window < T else None
    out, lse, *lists = sparse._forward(q, k, v, s, e, window)
    keys, ends, scores, sizes, ranges = lists
    dq, delta = torch.empty_like(q), (out.float() * do.float()).sum(-1)
    dtype = torch.float32 if e is not None else k.dtype
    dk, dv, ds = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype), torch.zeros_like(s)
    arguments, grid = sparse._launch(kernel, q, k, e, keys)
    strides = sparse._strides
    tensors = {
        "forward": (q, k, v, s, keys, ends, scores, ranges, out, lse, *strides(q, k, v, out)),
        "backward_queries": (
            *(q, k, v, s, keys, ends, scores, ranges, out, lse, do, delta, dq),
            *strides(q, k, v, out, do),
        ),
        "backward_keys": (q, k, v, s, keys, ends, scores, sizes, lse, do, delta, dk, dv, ds, *strides(q, k, v, do)),
    }[kernel]
    function = getattr(sparse._kernels("triton_attention"), kernel)
    return lambda: function[grid](*tensors, **arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="32,2,2048,2048;8,8,4096,1024;1,8,32768,2048", help="B,H,T,w;…")
    parser.add_argument("--chunks", default="1024,2048", help="queries that share a list of keys")
    parser.add_argument("--kernels", default=",".join(CHOICES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", default=str(RESULTS / "tiles.csv"))
    args = parser.parse_args()
    where, rows = provenance(torch.device("cuda")), []
    for shape in args.shapes.split(";"):
        B, H, T, window = map(int, shape.split(","))
        for chunk in map(int, args.chunks.split(",")) if window < T else [sparse.CHUNK]:
            sparse.CHUNK = chunk
            for kernel in args.kernels.split(","):
                for tiles in CHOICES[kernel]:
                    for table in (sparse.HOPPER, sparse.OTHERS):
                        table[kernel] = tiles
                    row: Row = {"B": B, "H": H, "T": T, "w": window, "chunk": chunk, "kernel": kernel}
                    row |= dict(zip(("queries", "keys", "warps", "stages"), tiles, strict=True))
                    try:
                        row |= {
                            "ms": round(milliseconds(launcher(kernel, B, H, T, window), args.rounds), 4),
                            "note": "",
                        }
                    except Exception as error:  # more shared memory or registers than there are: the others still run
                        row |= {"ms": "", "note": first_line(error)}
                    rows.append(row | where)
                    print(f"{shape:<20} {chunk:>5} {kernel:<17} {tiles!s:<18} {row['ms']} {row['note']}", flush=True)
            write_csv(rows, Path(args.output))


if __name__ == "__main__":
    main()
