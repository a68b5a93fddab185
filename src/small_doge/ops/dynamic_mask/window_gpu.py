"""Eviction times on a GPU: what ``window`` counts, in a sort and five kernels instead of sixty operations.

Here is what calls the kernels of ``triton_window``, as one operator that torch.compile takes as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from ..gpu import kernels

GRID_BITS = 22  # integers to rank by, padding's 0 included, are below 2²²
TILE = 2048  # positions that a program counts at a time


def block_length(T: int) -> int:
    """Positions, and ranks, in a block: C ≈ √T, a power of two, such that there are at most 256 blocks."""
    C = 64
    while C * 256 < T:
        C *= 2
    return C


@torch.library.custom_op("small_doge::evictions", mutates_args=())
def evictions(
    s: torch.Tensor, window: int, key_mask: torch.Tensor | None, documents: torch.Tensor | None
) -> torch.Tensor:
    """Scores (B, M, T) → (B, M, T) int32: when ``window`` keys rank above each, for window < T; see there.

    Padding ranks below every key, and a document below the next one; that a key leaves with its document is not in it.
    """
    B, M, T = s.shape
    R, C = B * M, block_length(T)
    blocks = -(-T // C)
    run: Any = kernels("dynamic_mask.triton_window")
    # A radix sort takes as many passes as a number has bytes: four where rows and scores fit into 32 bits.
    narrow = documents is None and R << GRID_BITS < 1 << 31
    keys = torch.empty(R * T, dtype=torch.int32 if narrow else torch.int64, device=s.device)
    masks = [None if x is None else x.contiguous() for x in (key_mask, documents)]
    run.sort_keys[(-(-T // 1024), R)](s.float().contiguous(), *masks, keys, T, M, SHIFT=GRID_BITS, NARROW=narrow)
    by_rank = keys.sort(stable=True).indices

    order, rank, e = (torch.empty(R, T, dtype=torch.int32, device=s.device) for _ in range(3))
    at_least = torch.empty(R, blocks, blocks + 1, dtype=torch.int32, device=s.device)
    threshold = torch.empty(R, blocks, dtype=torch.int32, device=s.device)
    run.invert[(-(-T // 1024), R)](by_rank, order, rank, T)
    run.count_at_least[(-(-(blocks + 1) // 4), R)](
        rank, at_least, T, blocks, C=C, NB=max(1, TILE // C), U=4, num_warps=8
    )
    run.thresholds[(blocks, R)](order, at_least, threshold, T, window, blocks, C=C, BLOCKS=256)
    count = max(1, 4096 // C)  # keys a program
    run.position[(-(-T // count), R)](
        order, rank, at_least, threshold, e, T, window, blocks, C=C, KEYS=count, BLOCKS=256
    )
    return e.view(B, M, T)


@evictions.register_fake
def _(s, window, key_mask, documents):
    return torch.empty(s.shape, dtype=torch.int32, device=s.device)
