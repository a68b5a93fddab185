"""Triton kernels around the window: the last step of eviction times, and the lists of keys that queries look up."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def position_in_block(
    order,  # (R, T) int32: positions by ascending rank
    rank,  # (R, T) int32
    at_least,  # (R, blocks, blocks + 1) int32
    block,  # (R, T) int32
    out,  # (R, T) int32
    T, window, blocks,
    C: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """See ``window._position_in_block``: one program a row and KEYS keys."""
    row = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    real = x < T
    c = tl.arange(0, C)
    r = tl.load(rank + row * T + x, mask=real, other=0)
    b = tl.load(block + row * T + x, mask=real, other=blocks)
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
    tl.store(out + row * T + x, b * C + steps, mask=real)


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
