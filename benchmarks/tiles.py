"""Which tiles the Triton kernels of Dynamic Mask Attention should have: every choice timed, kernel by kernel.

For each kernel and shape the median of several launches at every choice of tiles (queries, keys, warps, pipeline
stages): the kernels of `sparse` where w < T, else of `packed` on documents of some 1,000 tokens. The winners belong
into ``ops/dynamic_mask/{sparse,packed}.py``. One GPU, bfloat16.

    python benchmarks/tiles.py                                  # all kernels at the shapes of dynamic_mask.py
    python benchmarks/tiles.py --shapes 1,8,8,32768,2048 --chunks 1024,2048

With ``--compilers N`` that many processes first fill Triton's cache, as compiling takes far longer than timing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from common import RESULTS, Row, first_line, milliseconds, provenance, write_csv

from small_doge.ops.dynamic_mask import eviction_times
from small_doge.ops.gpu import kernels

# The package has functions of these names.
sparse, packed = (importlib.import_module(f"small_doge.ops.dynamic_mask.{name}") for name in ("sparse", "packed"))

D = 128


class Shape(NamedTuple):
    """B rows of T tokens, H query heads on G heads of keys, a window of keys."""

    B: int
    H: int
    G: int
    T: int
    window: int


CHOICES = {
    "forward": [
        *((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (64, 128, 4, 2)),
        *((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 3), (128, 32, 8, 4)),
    ],
    "backward_queries": [
        *((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 2), (64, 32, 4, 3), (64, 128, 4, 2)),
        (128, 64, 8, 3),
    ],
    "backward_keys": [
        *((64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 1), (64, 128, 8, 1), (32, 64, 4, 2), (128, 64, 8, 2)),
        *((128, 128, 8, 2), (32, 128, 4, 2), (64, 64, 8, 2), (32, 128, 8, 3)),
    ],
}


def launcher(kernel: str, B: int, H: int, G: int, T: int, window: int) -> Callable[[], object]:
    """A function that launches one kernel on random inputs, with the tiles and the chunk that are set now."""
    torch.manual_seed(0)
    q, do, k, v = (torch.randn(B, T, n, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in (H, H, G, G))
    s = torch.rand(B, G, T, device="cuda") * 3
    dq = torch.empty_like(q)
    if window < T:
        out, lse, *lists = sparse._forward(q, k, v, s, eviction_times(s, window), window)
        keys, ends, scores, sizes, ranges = lists
        dk, dv, ds = (torch.zeros(x.shape, dtype=torch.float32, device="cuda") for x in (k, v, s))
        delta = (out.float() * do.float()).sum(-1)
        arguments, grid = sparse._launch(kernel, q, k, keys)
        strides = sparse._strides
        tensors = {
            "forward": (q, k, v, keys, ends, scores, ranges, out, lse, *strides(q, k, v, out)),
            "backward_queries": (
                *(q, k, v, keys, ends, scores, ranges, out, lse, do, delta, dq),
                *strides(q, k, v, out, do),
            ),
            "backward_keys": (q, k, v, keys, ends, scores, sizes, lse, do, delta, dk, dv, ds, *strides(q, k, v, do)),
        }[kernel]
        function = getattr(kernels("dynamic_mask.triton_attention"), kernel)
        return lambda: function[grid](*tensors, **arguments)
    documents = (torch.rand(B, T, device="cuda") < 1e-3).cumsum(-1)
    starts, ends = (torch.searchsorted(documents, documents, out_int32=True, right=x) for x in (False, True))
    out, lse = packed._forward(q, k, v, s, starts, ends)
    delta = (out.float() * do.float()).sum(-1)
    dk, dv, ds = torch.empty_like(k), torch.empty_like(v), torch.empty_like(s)
    arguments, grid = packed._launch(kernel, q, k, s)
    M, N = arguments["BLOCK_M"], arguments["BLOCK_N"]
    (q_, do_), (k_, v_) = [packed._descriptor(x, M) for x in (q, do)], [packed._descriptor(x, N) for x in (k, v)]
    s_, lse_, delta_ = (packed._rows(x, T, rows) for x, rows in ((s, N), (lse, M), (delta, M)))
    tensors = {
        "forward": (q_, k_, v_, s_, starts, out, lse),
        "backward_queries": (q_, k_, v_, s_, starts, out, lse, do_, delta, dq),
        "backward_keys": (q_, k_, v_, s_, ends, lse_, do_, delta_, dk, dv, ds),
    }[kernel]
    function = getattr(kernels("dynamic_mask.triton_packed"), kernel)
    return lambda: function[grid](*tensors, **arguments)


def use(chunk: int, kernel: str, tiles: tuple[int, int, int, int]) -> None:
    """From here on launch with these tiles, whatever the GPU."""
    sparse.CHUNK = chunk
    packed.HOPPER[kernel] = tiles
    for table in (sparse.HOPPER, sparse.OTHERS):
        table[kernel] = tiles
        for other in {"forward", "backward_queries"} - {kernel}:  # those two share their queries
            if kernel != "backward_keys" and table[other][0] != tiles[0]:
                table[other] = (tiles[0], 64, 4, 2)


def compile_one(shape: Shape, chunk: int, kernel: str, tiles: tuple[int, int, int, int]) -> None:
    """Leave one choice in Triton's cache; what cannot be compiled is told about when its time is to be measured."""
    use(chunk, kernel, tiles)
    with contextlib.suppress(Exception):
        launcher(kernel, *shape)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default="32,2,2,2048,2048;16,8,4,2048,2048;8,8,8,4096,1024;1,8,8,32768,2048", help="B,H,G,T,w;…"
    )
    parser.add_argument("--chunks", default="1024,2048", help="queries that share a list of keys")
    parser.add_argument("--kernels", default=",".join(CHOICES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compilers", type=int, default=0, help="processes that compile all choices first")
    parser.add_argument("--output", default=str(RESULTS / "tiles.csv"))
    args = parser.parse_args()
    where, rows = provenance(torch.device("cuda")), []
    shapes = [Shape(*map(int, shape.split(","))) for shape in args.shapes.split(";")]
    choices = [
        (shape, chunk, kernel, tiles)
        for shape in shapes
        for chunk in (map(int, args.chunks.split(",")) if shape.window < shape.T else [sparse.CHUNK])
        for kernel in args.kernels.split(",")
        for tiles in CHOICES[kernel]
    ]
    if args.compilers:
        # Which kernels, and the chunk, are compiled; the rest of a shape is not.
        different = {
            (shape.window < shape.T, shape.H // shape.G, *choice): (shape, *choice) for shape, *choice in choices
        }
        with ProcessPoolExecutor(args.compilers, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_one, *zip(*different.values(), strict=True)))
    for shape, chunk, kernel, tiles in choices:
        use(chunk, kernel, tiles)
        row: Row = shape._asdict() | {"chunk": chunk, "kernel": kernel}
        row |= dict(zip(("queries", "keys", "warps", "stages"), tiles, strict=True))
        try:
            row |= {
                "ms": round(milliseconds(launcher(kernel, *shape), args.rounds, torch.device("cuda")), 4),
                "note": "",
            }
        except Exception as error:  # more shared memory or registers than there are: the others still run
            row |= {"ms": "", "note": first_line(error)}
        rows.append(row | where)
        print(
            f"{','.join(map(str, shape)):<20} {chunk:>5} {kernel:<17} {tiles!s:<18} {row['ms']} {row['note']}",
            flush=True,
        )
    write_csv(rows, Path(args.output))


if __name__ == "__main__":
    main()
