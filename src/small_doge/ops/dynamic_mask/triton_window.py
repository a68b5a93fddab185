"""Triton kernels around the window: eviction times, and the lists of keys that queries look up."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sort_keys(
    s,  # (R, T) float32
    key_mask,  # (B, T) bool, or None
    documents,  # (B, T) integers, or None
    out,  # (R·T,) int32 or int64: rows, documents, scores on the grid of `window.grid`, in this order of weight
    T, M,
    SHIFT: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """One program a row and 1,024 keys: the number that each is ranked by."""
    row = tl.program_id(1)
    x = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    real = x < T
    b = (row // M).to(tl.int64) * T
    at = row.to(tl.int64) * T + x
    bits = (tl.load(s + at, mask=real, other=0.0) + 0.0).to(tl.int32, bitcast=True)  # −0 and 0 are the same number
    ordered = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    key = ((ordered.to(tl.int64) + 1024) >> 11) + (1 << 20) + 1
    if key_mask is not None:
        key = tl.where(tl.load(key_mask + b + x, mask=real, other=0) != 0, key, 0)
    if documents is not None:
        key += tl.load(documents + b + x, mask=real, other=0).to(tl.int64) << SHIFT
    key += row.to(tl.int64) << (SHIFT if NARROW else 48)
    tl.store(out + at, key.to(out.dtype.element_ty), mask=real)


@triton.jit
def invert(by_rank, order, rank, T):
    """Places in R·T sorted numbers (int64) → positions of each row by ascending rank, and ranks, (R, T) int32 both."""
    row = tl.program_id(1).to(tl.int64) * T
    x = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    real = x < T
    j = (tl.load(by_rank + row + x, mask=real, other=0) - row).to(tl.int32)
    tl.store(order + row + x, j, mask=real)
    tl.store(rank + row + j, x, mask=real)


@triton.jit
def count_at_least(
    rank,  # (R, T) int32
    at_least,  # out (R, blocks, blocks + 1) int32: keys of the blocks up to b that rank in bucket u or above
    T, blocks,
    C: tl.constexpr, NB: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """One program a row and U buckets; it walks along the positions, NB blocks at a time."""
    row = tl.program_id(1).to(tl.int64)
    u = tl.program_id(0) * U + tl.arange(0, U)
    lanes = tl.arange(0, NB)
    inside = lanes[:, None] * C + tl.arange(0, C)[None, :]
    before = tl.zeros([U], tl.int32)
    for first in range(0, blocks, NB):
        x = first * C + inside
        r = tl.load(rank + row * T + x, mask=x < T, other=-1)
        counts = tl.sum((r[None, :, :] >= (u * C)[:, None, None]).to(tl.int32), 2)
        b = first + lanes
        at = (row * blocks + b)[None, :] * (blocks + 1) + u[:, None]
        here = (b < blocks)[None, :] & (u <= blocks)[:, None]
        tl.store(at_least + at, before[:, None] + tl.cumsum(counts, 1), mask=here)
        before += tl.sum(counts, 1)


@triton.jit
def thresholds(
    order,  # (R, T) int32: positions by ascending rank
    at_least,  # as above
    threshold,  # out (R, blocks) int32: the rank of the w-th best key up to the end of a block, −1 if there is none
    T, window, blocks,
    C: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program a row and block: the bucket of that rank from ``at_least``, then its place in the bucket."""
    row, b = tl.program_id(1).to(tl.int64), tl.program_id(0)
    table = at_least + (row * blocks + b) * (blocks + 1)
    u = tl.arange(0, BLOCKS)
    bucket = tl.sum((tl.load(table + u, mask=u < blocks, other=0) >= window).to(tl.int32), 0) - 1
    found = -1
    if bucket >= 0:
        missing = window - tl.load(table + bucket + 1)  # how many the buckets above leave to find here
        slot = bucket * C + tl.arange(0, C)
        seen = tl.load(order + row * T + slot, mask=slot < T, other=T) < tl.minimum((b + 1) * C, T)
        enough = tl.cumsum(seen.to(tl.int32), 0, reverse=True) >= missing
        found = bucket * C + tl.sum(enough.to(tl.int32), 0) - 1
    tl.store(threshold + row * blocks + b, found)


@triton.jit
def position(
    order, rank, at_least, threshold,  # as above
    out,  # (R, T) int32: eviction times
    T, window, blocks,
    C: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program a row and KEYS keys: the block in which each leaves, then where w keys rank above it there."""
    row = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    real = x < T
    c = tl.arange(0, C)
    r = tl.load(rank + row * T + x, mask=real, other=0)
    u = tl.arange(0, BLOCKS)
    limits = tl.load(threshold + row * blocks + u, mask=u < blocks, other=2147483647)
    # Thresholds never fall: the first one above the rank, but not before the key's own block.
    b = tl.maximum(tl.sum((limits[None, :] <= r[:, None]).to(tl.int32), 1), x // C)
    leaves = real & (b < blocks)
    counted = leaves & (b > 0)
    higher = tl.load(at_least + (row * blocks + b - 1) * (blocks + 1) + r // C + 1, mask=counted, other=0)
    slot = (r // C * C)[:, None] + c[None, :]
    place = tl.load(order + row * T + slot, mask=leaves[:, None] & (slot < T), other=T)
    same = tl.sum(((place < (b * C)[:, None]) & (slot > r[:, None])).to(tl.int32), 1)
    at = (b * C)[:, None] + c[None, :]
    newer = tl.load(rank + row * T + at, mask=leaves[:, None] & (at < T), other=-1)
    above = tl.cumsum((newer > r[:, None]).to(tl.int32), 1)
    steps = tl.sum((above < (window - higher - same)[:, None]).to(tl.int32), 1)
    tl.store(out + row * T + x, tl.where(leaves, tl.maximum(b * C + steps, x), T), mask=real)


@triton.jit
def list_keys(
    order,  # (R, T) int32: positions by falling eviction time
    e,  # (R, T) int32
    s,  # (R, T) float32
    keys,  # out (R, chunks, OLD + CHUNK) int32
    ends,  # out, same shape, int32: eviction times
    scores,  # out, same shape, float32: s·log₂ e
    sizes,  # out (R, chunks, 2) int32: old and new keys listed
    ranges,  # out (R, tiles, 3) int32: old keys seen by the whole tile, by any of it; new keys up to its last query
    T, OLD,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row and chunk of queries: the keys that the chunk sees, in two parts.

    First the *old* keys, from before the chunk, by falling eviction time: those that outlive a tile of queries come
    first and need no mask. Then, from slot OLD on, the *new* ones, inside the chunk, by position. The slots up to the
    next multiple of 128 after each part hold key 0 with eviction time 0 and score −∞, which nobody sees.
    """
    row, chunk, chunks = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.num_programs(0)
    TILES: tl.constexpr = CHUNK // BLOCK_M
    first = chunk * CHUNK
    stop = tl.minimum(first + CHUNK, T)
    order += row * T
    e += row * T
    s += row * T
    base = (row * chunks + chunk) * (OLD + CHUNK)
    keys += base
    ends += base
    scores += base
    lanes = tl.arange(0, BLOCK)
    tile_first = (first + tl.arange(0, TILES) * BLOCK_M)[:, None]
    tile_last = tl.minimum(tile_first + BLOCK_M, T) - 1
    seen_by_all = tl.zeros([TILES], tl.int32)
    seen_by_any = tl.zeros([TILES], tl.int32)
    seen_new = tl.zeros([TILES], tl.int32)

    old = 0
    start = 0
    last = stop
    while (start < T) & (last > first):
        x = start + lanes
        j = tl.load(order + x, mask=x < T, other=0)
        end = tl.load(e + j, mask=x < T, other=0)
        listed = (end > first) & (j < first)
        slot = old + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(keys + slot, j, mask=listed)
        tl.store(ends + slot, end, mask=listed)
        tl.store(scores + slot, tl.load(s + j, mask=listed, other=0.0) * 1.4426950408889634, mask=listed)
        old += tl.sum(listed.to(tl.int32), 0)
        seen_by_all += tl.sum((listed[None, :] & (end[None, :] > tile_last)).to(tl.int32), 1)
        seen_by_any += tl.sum((listed[None, :] & (end[None, :] > tile_first)).to(tl.int32), 1)
        last = tl.min(tl.where(x < T, end, 0), 0)  # eviction times fall: past this point nothing outlives `first`
        start += BLOCK

    new = 0
    for begin in range(first, stop, BLOCK):
        j = begin + lanes
        end = tl.load(e + j, mask=j < stop, other=0)
        listed = end > j
        slot = OLD + new + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(keys + slot, j, mask=listed)
        tl.store(ends + slot, end, mask=listed)
        tl.store(scores + slot, tl.load(s + j, mask=listed, other=0.0) * 1.4426950408889634, mask=listed)
        new += tl.sum(listed.to(tl.int32), 0)
        seen_new += tl.sum((listed[None, :] & (j[None, :] <= tile_last)).to(tl.int32), 1)

    spare = tl.arange(0, 128)
    for part in tl.static_range(2):
        count = old if part == 0 else new
        slot = count + spare
        empty = slot < (count + 127) // 128 * 128
        at = slot + part * OLD
        tl.store(keys + at, tl.zeros([128], tl.int32), mask=empty)
        tl.store(ends + at, tl.zeros([128], tl.int32), mask=empty)
        tl.store(scores + at, tl.full([128], float("-inf"), tl.float32), mask=empty)
    tl.store(sizes + (row * chunks + chunk) * 2, old)
    tl.store(sizes + (row * chunks + chunk) * 2 + 1, new)
    tile = chunk * TILES + tl.arange(0, TILES)
    real = tile * BLOCK_M < T
    ranges += (row * tl.cdiv(T, BLOCK_M) + tile) * 3
    tl.store(ranges, seen_by_all, mask=real)
    tl.store(ranges + 1, seen_by_any, mask=real)
    tl.store(ranges + 2, seen_new, mask=real)
