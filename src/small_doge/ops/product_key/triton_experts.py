"""Triton kernels of the experts of CDMoE and of their retrieval.

Shapes: N tokens of C numbers; E experts, each a row of down and one of up; K keys an axis; SLOTS experts a token, in
tiles of the next power of two, WIDE. What a token and slot has is N × SLOTS; nothing is N × SLOTS × C. Products and
sums are float32 whatever the tensors hold.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _coefficients(
    dot, at, there, weights, h, a, dh, dweights,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """What the rows of second are multiplied by, from v·first of some slots; stores what they leave behind."""
    weight = tl.load(weights + at, mask=there, other=0.0)
    if BACKWARD:
        z = tl.load(h + at, mask=there, other=0.0)
        gate = tl.sigmoid(z)
        coefficient = dot * weight * gate * (1 + z * (1 - gate))
        tl.store(a + at, weight * z * gate, mask=there)
        tl.store(dh + at, coefficient, mask=there)
        tl.store(dweights + at, dot * z * gate, mask=there)
    else:
        coefficient = weight * dot * tl.sigmoid(dot)
        tl.store(h + at, dot, mask=there)
    return coefficient


@triton.jit
def tokens(
    v,  # (N, C): x forward, the gradient of out backward
    first, second,  # (E, C): down, up forward; up, down backward
    indices,  # (N, SLOTS) int64
    weights,  # (N, SLOTS) float32, and so are the next four
    h,  # x·down: written forward, read backward
    a, dh, dweights,  # written backward
    out,  # (N, C): out forward, dx backward
    C: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """One program a token: v·first, from it a coefficient a slot, and the rows of second times those."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, WIDE)
    there = slot < SLOTS
    at = n * SLOTS + slot
    row = tl.load(indices + at, mask=there, other=0) * C
    columns = tl.arange(0, BLOCK_C)
    products = tl.zeros([WIDE, BLOCK_C], tl.float32)
    for begin in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = begin + columns
        tile = tl.load(first + row[:, None] + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)
        vector = tl.load(v + n * C + c, mask=c < C, other=0.0)
        products += tile.to(tl.float32) * vector.to(tl.float32)[None, :]
    dot = tl.sum(products, 1)
    coefficient = _coefficients(dot, at, there, weights, h, a, dh, dweights, BACKWARD)
    for begin in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = begin + columns
        tile = tl.load(second + row[:, None] + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)
        total = tl.sum(coefficient[:, None] * tile.to(tl.float32), 0)
        tl.store(out + n * C + c, total.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def tokens_of_many(
    v, first, second, indices, weights, h, a, dh, dweights, out,  # as above
    C: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, WIDE_C: tl.constexpr, STAGES: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """The same for more slots than registers hold: ROWS slots at a time, whole rows of WIDE_C ≥ C columns."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDE_C)
    vector = tl.load(v + n * C + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros([WIDE_C], tl.float32)
    for begin in tl.range(0, SLOTS, ROWS, num_stages=STAGES):
        slot = begin + tl.arange(0, ROWS)
        there = slot < SLOTS
        at = n * SLOTS + slot
        where = (tl.load(indices + at, mask=there, other=0) * C)[:, None] + c[None, :]
        here = there[:, None] & (c < C)[None, :]
        dot = tl.sum(tl.load(first + where, mask=here, other=0.0).to(tl.float32) * vector[None, :], 1)
        coefficient = _coefficients(dot, at, there, weights, h, a, dh, dweights, BACKWARD)
        tile = tl.load(second + where, mask=here, other=0.0).to(tl.float32)
        total += tl.sum(coefficient[:, None] * tile, 0)
    tl.store(out + n * C + c, total.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def starts(
    keys,  # (P,) experts, sorted
    out,  # (E + 1,) int32: how many of the keys are smaller
    P, E, STEPS, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program BLOCK experts, each by halving; 2 ** STEPS > P."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + P
    for _ in range(STEPS):
        middle = (low + high) // 2
        searching = low < high
        smaller = tl.load(keys + middle, mask=searching, other=0).to(tl.int32) < e
        low = tl.where(searching & smaller, middle + 1, low)
        high = tl.where(searching & (smaller == 0), middle, high)
    tl.store(out + e, low, mask=e <= E)


@triton.jit
def _add_pairs(
    down_sum, up_sum, begin, end, order, x, do, a, dh, c,
    C: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds dh·x and a·do of the pairs begin … end − 1 of the order to two sums of (ROWS, BLOCK_C)."""
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        i = first + tl.arange(0, ROWS)
        pair = tl.load(order + i, mask=i < end, other=0)
        at = (pair // SLOTS * C)[:, None] + c[None, :]
        here = (i < end)[:, None] & (c < C)[None, :]
        x_tile = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        do_tile = tl.load(do + at, mask=here, other=0.0).to(tl.float32)
        down_sum += tl.load(dh + pair, mask=i < end, other=0.0)[:, None] * x_tile
        up_sum += tl.load(a + pair, mask=i < end, other=0.0)[:, None] * do_tile
    return down_sum, up_sum


@triton.jit
def crowded(
    x, do,  # (N, C)
    a, dh,  # (N, SLOTS) float32
    keys,  # (P,) experts, sorted
    order,  # (P,) int64: the pairs of token and slot, n · SLOTS + slot, by expert, then by token
    parts,  # out (P // LENGTH, 2, C) float32
    C: tl.constexpr, SLOTS: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program LENGTH pairs and BLOCK_C columns: their share of the gradients, if they are all of one expert.

    So that an expert whom everybody picks does not keep one program busy while the others are long done.
    """
    i = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(0) * LENGTH
    if tl.load(keys + begin) != tl.load(keys + begin + LENGTH - 1):
        return
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    down_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    up_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    down_sum, up_sum = _add_pairs(
        down_sum, up_sum, begin, begin + LENGTH, order, x, do, a, dh, c, C, SLOTS, ROWS, STAGES
    )
    tl.store(parts + i * 2 * C + c, tl.sum(down_sum, 0), mask=c < C)
    tl.store(parts + i * 2 * C + C + c, tl.sum(up_sum, 0), mask=c < C)


@triton.jit
def experts(
    x, do, a, dh, order, parts,  # as above
    starts,  # (E + 1,) int32
    ddown, dup,  # out (E, C)
    C: tl.constexpr, SLOTS: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program an expert and BLOCK_C columns: its rows of both gradients, from its pairs in their order."""
    e = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.load(starts + e).to(tl.int64)
    end = tl.load(starts + e + 1).to(tl.int64)
    down_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    up_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    # Whole stretches of LENGTH pairs among them are summed already.
    head = (begin + LENGTH - 1) // LENGTH
    tail = end // LENGTH
    split = head < tail
    down_sum, up_sum = _add_pairs(
        down_sum, up_sum, begin, tl.where(split, head * LENGTH, end), order, x, do, a, dh, c, C, SLOTS, ROWS, STAGES
    )
    down_more = tl.zeros([BLOCK_C], tl.float32)
    up_more = tl.zeros([BLOCK_C], tl.float32)
    for i in range(head, tail):
        at = parts + i * 2 * C + c
        down_more += tl.load(at, mask=c < C, other=0.0)
        up_more += tl.load(at + C, mask=c < C, other=0.0)
    down_sum, up_sum = _add_pairs(
        down_sum, up_sum, tl.where(split, tail * LENGTH, end), end, order, x, do, a, dh, c, C, SLOTS, ROWS, STAGES
    )
    down_sum = tl.sum(down_sum, 0) + down_more
    up_sum = tl.sum(up_sum, 0) + up_more
    tl.store(ddown + e * C + c, down_sum.to(ddown.dtype.element_ty), mask=c < C)
    tl.store(dup + e * C + c, up_sum.to(dup.dtype.element_ty), mask=c < C)


@triton.jit
def _ordered(bits, SIGN: tl.constexpr, REST: tl.constexpr):
    """The bits of a float, as signed integers that rank as the floats do; and back."""
    return bits ^ ((bits >> SIGN) & REST)


@triton.jit
def _best_keys(logits, a, there, K, BEST: tl.constexpr):
    """The BEST largest logits of each row (TOKENS, LANES) in their order, as keys: the logit above, K − a below."""
    logits = tl.where(logits == 0, 0.0, logits).to(logits.dtype)  # −0 ties with 0
    if logits.dtype.primitive_bitwidth == 16:
        ranks = _ordered(logits.to(tl.int16, bitcast=True), 15, 0x7FFF).to(tl.int32)
        keys = tl.where(there, (ranks << 16) | (K - a), -0x80000000).to(tl.int32)
    else:
        ranks = _ordered(logits.to(tl.int32, bitcast=True), 31, 0x7FFFFFFF).to(tl.int64)
        keys = tl.where(there, (ranks << 32) | (K - a), -0x8000000000000000).to(tl.int64)
    return tl.topk(keys, BEST)


@triton.jit
def _open_keys(keys, K, like: tl.constexpr):
    """Logits in float32 and positions a from the keys of `_best_keys`."""
    if like.primitive_bitwidth == 16:
        logits = _ordered((keys >> 16).to(tl.int16), 15, 0x7FFF).to(like, bitcast=True).to(tl.float32)
        return logits, K - (keys & 0xFFFF)
    else:
        logits = _ordered((keys >> 32).to(tl.int32), 31, 0x7FFFFFFF).to(tl.float32, bitcast=True)
        return logits, (K - (keys & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def retrieve(
    logits,  # (N, 2K), 16 or 32 bits
    pairs,  # (LANES,) int32: i · 65536 + j of the pairs that can be among the SLOTS best, −1 past their end
    scores,  # out (N, SLOTS) float32
    indices,  # out (N, SLOTS) int64
    N, K,
    SLOTS: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr, BEST: tl.constexpr, LANES: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """One program TOKENS tokens. The best BEST of each half, sorted; the sums of the pairs; the best WIDE of those.

    A number and what breaks its ties are one integer, larger where the number is, and, of equal numbers, where the
    position is smaller: sorting integers is all that is left. KEYS, BEST, LANES and WIDE are powers of two.
    """
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    n = n.to(tl.int64)
    key = tl.arange(0, KEYS)
    like: tl.constexpr = logits.dtype.element_ty
    real = (n < N)[:, None] & (key < K)[None, :]
    at = logits + (n * 2 * K)[:, None] + key[None, :]
    in_row = (key < K)[None, :] & (n >= 0)[:, None]
    x = _best_keys(tl.load(at, mask=real, other=0.0), key[None, :], in_row, K, BEST)
    y = _best_keys(tl.load(at + K, mask=real, other=0.0), key[None, :], in_row, K, BEST)
    lane = tl.arange(0, LANES)
    pair = tl.load(pairs + lane)
    i = tl.broadcast_to((tl.maximum(pair, 0) >> 16)[None, :], [TOKENS, LANES])
    j = tl.broadcast_to((tl.maximum(pair, 0) & 0xFFFF)[None, :], [TOKENS, LANES])
    x_logit, x_key = _open_keys(tl.gather(x, i, 1), K, like)
    y_logit, y_key = _open_keys(tl.gather(y, j, 1), K, like)
    ranks = _ordered((x_logit + y_logit).to(tl.int32, bitcast=True), 31, 0x7FFFFFFF).to(tl.int64)
    expert = (x_key * K + y_key).to(tl.int64)
    sums = tl.where((pair >= 0)[None, :], (ranks << 32) | (0x7FFFFFFF - expert), -0x8000000000000000)
    best = tl.topk(sums.to(tl.int64), WIDE)
    slot = tl.arange(0, WIDE)
    at_slot = (n * SLOTS)[:, None] + slot[None, :]
    kept = (n < N)[:, None] & (slot < SLOTS)[None, :]
    score = _ordered((best >> 32).to(tl.int32), 31, 0x7FFFFFFF).to(tl.float32, bitcast=True)
    tl.store(scores + at_slot, score, mask=kept)
    tl.store(indices + at_slot, 0x7FFFFFFF - (best & 0xFFFFFFFF), mask=kept)


@triton.jit
def retrieve_backward(
    dscores,  # (N, SLOTS) float32
    indices,  # (N, SLOTS) int64
    dlogits,  # out (N, 2K)
    K,
    SLOTS: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program a token, WIDE slots at a time: a logit gets what the scores get that it is a part of."""
    n = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, KEYS)
    dx, dy = tl.zeros([KEYS], tl.float32), tl.zeros([KEYS], tl.float32)
    for first in range(0, SLOTS, WIDE):
        slot = first + tl.arange(0, WIDE)
        expert = tl.load(indices + n * SLOTS + slot, mask=slot < SLOTS, other=0).to(tl.int32)
        d = tl.load(dscores + n * SLOTS + slot, mask=slot < SLOTS, other=0.0)
        dx += tl.sum(tl.where((expert // K)[:, None] == key[None, :], d[:, None], 0.0), 0)
        dy += tl.sum(tl.where((expert % K)[:, None] == key[None, :], d[:, None], 0.0), 0)
    at = dlogits + n * 2 * K + key
    tl.store(at, dx.to(dlogits.dtype.element_ty), mask=key < K)
    tl.store(at + K, dy.to(dlogits.dtype.element_ty), mask=key < K)
