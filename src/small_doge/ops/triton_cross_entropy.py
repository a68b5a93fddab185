"""Triton kernel of the language-model head: logits become their gradient where they lie, and a loss."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def logits_to_gradient(
    logits, labels, losses, denominator,  # (R, V) 16 or 32 bit floats; (R,) int64; (R,) float32; one float32
    stride, V, IGNORED: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """One program a row: losses ← −log softmax(logits)[label], logits ← (softmax − one-hot) / denominator.

    Both are 0 for a row whose label is IGNORED. A row is read twice, the second time from the chip's cache: blocks that
    are small enough for several programs a multiprocessor hide more of memory's delay than holding a row would save,
    and what is read for the last time or written makes way for what is not.
    """
    row = tl.program_id(0)
    label = tl.load(labels + row)
    labelled = label != IGNORED
    column = tl.arange(0, BLOCK)
    logits += row.to(tl.int64) * stride
    at_label = tl.load(logits + tl.where(labelled, label, 0)).to(tl.float32)
    scale = tl.where(labelled, 1.0 / tl.load(denominator), 0.0)
    largest = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        x = tl.load(
            logits + start + column, mask=start + column < V, other=float("-inf"), eviction_policy="evict_last"
        ).to(tl.float32)
        higher = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(x - higher), 0)
        largest = higher
    if GRADIENT:
        factor = scale / total
        for start in range(0, V, BLOCK):
            here = start + column
            x = tl.load(logits + here, mask=here < V, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            error = tl.exp(x - largest) * factor - tl.where(here == label, scale, 0.0)
            error = error.to(logits.dtype.element_ty)
            tl.store(logits + here, error, mask=here < V, eviction_policy="evict_first")
    tl.store(losses + row, tl.where(labelled, largest + tl.log(total) - at_label, 0.0))
