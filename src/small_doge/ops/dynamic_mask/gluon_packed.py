"""`forward` and `backward_queries` of triton_packed.py for two query heads with the same keys, on Hopper, in Gluon.

As many programs as the GPU has multiprocessors take tiles of 64 queries of both heads until none is left. In each, one
warp copies keys and values, and four warps compute for either head, with up to 240 registers a thread where the copying
warp has 24. What this gives: a tile of keys is fetched for 128 queries and not for 64, which is half of what comes
through the L2 cache (of 7 TB/s); the copies of the next tiles run on while one is ended; and products run beside the
softmax. Gluon leaves layouts, barriers and what is waited for to the program: docs/decisions.md, 2026-11-29.

A buffer has two barriers: `ready`, of the copying warp, and `empty`, of those that have read it. The n-th use of one of
n_buffers waits for the phase n // n_buffers, `empty` for the one before. ptxas lets all products wait for each other if
registers run short, or if what a product adds to is set while another one runs; tests/ops/compile_kernels.py looks.

Shapes, masks and base 2: as in triton_packed.py. Descriptors have blocks of (1, 1, 64, 128) and, of s, (1, 64).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)  # queries of a head, or keys, in a tile
WIDTH = gl.constexpr(128)  # a head's size, filled up with zeros
STAGES = gl.constexpr(3)  # tiles of keys on their way: more do not fit beside the rest of `backward_queries`
LN_2 = gl.constexpr(0.6931471805599453)
# Who holds which numbers: of logits, of sums of values, of both as left operands; a number a query; all of a few.
LOGITS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
QUERIES = gl.constexpr(gl.DotOperandLayout(0, LOGITS.value, 2))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 2))
A_ROW = gl.constexpr(gl.SliceLayout(1, LOGITS.value))
A_SUM = gl.constexpr(gl.SliceLayout(1, SUMS.value))
FOUR = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))
FOUR_OF_ONE_WARP = gl.constexpr(gl.BlockedLayout([4], [32], [1], [0]))


@gluon.jit
def _barriers(n: gl.constexpr, count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def _filled(bars, use, n: gl.constexpr):
    mbarrier.wait(bars.index(use % n), use // n & 1)


@gluon.jit
def _free(bars, use, n: gl.constexpr):
    mbarrier.wait(bars.index(use % n), (use // n & 1) ^ 1)


@gluon.jit
def _block(buffer, i):
    return buffer.index(i).reshape([ROWS, WIDTH])


@gluon.jit
def _place(tile, tiles, M, N: gl.constexpr):
    """Row b, the first of two query heads, the first position: the longest rows of keys first."""
    group = tile // tiles
    return group // (M * N // 2), group % (M * N // 2) * 2, (tiles - 1 - tile % tiles) * ROWS


@gluon.jit
def _next(notes, noted, read, turn):
    """The tile that the copying warp has taken as number ``turn``, the first key that it copies, and the first that all
    queries of the tile see."""
    _filled(noted, turn, 2)
    note = notes.index(turn % 2).load(FOUR)
    at = gl.arange(0, 4, layout=FOUR)
    mbarrier.arrive(read.index(turn % 2), count=1)
    tile = gl.sum(gl.where(at == 0, note, 0), 0)
    return tile, gl.sum(gl.where(at == 1, note, 0), 0), gl.sum(gl.where(at == 2, note, 0), 0)


@gluon.jit
def _load(
    q, out, do, k, v, s, starts, counter, places, bars, T, M, tiles, total, N: gl.constexpr, BACKWARD: gl.constexpr
):  # fmt: skip
    """The copying warp. It takes the next tile from a counter that all programs share, as tiles take unequal times."""
    q_buf, out_buf, do_buf, k_buf, v_buf, s_buf, notes = places
    q_ready, q_empty, do_empty, k_ready, k_empty, v_ready, v_empty, noted, read = bars
    at = gl.arange(0, 4, layout=FOUR_OF_ONE_WARP)
    use = 0
    turn = 0
    tile = gl.atomic_add(counter, 1)
    while tile < total:
        b, h0, i0 = _place(tile, tiles, M, N)
        m = h0 // N
        last = gl.minimum(i0 + ROWS, T)
        first = gl.load(starts + b * T + i0) // 4 * 4  # scores are copied from multiples of 16 bytes on
        inner = gl.load(starts + b * T + last - 1)
        _free(read, turn, 2)
        notes.index(turn % 2).store(gl.where(at == 0, tile, gl.where(at == 1, first, inner)))
        mbarrier.arrive(noted.index(turn % 2), count=1)
        for c in gl.static_range(2):
            mbarrier.wait(q_empty.index(c), (turn & 1) ^ 1)
            mbarrier.expect(q_ready.index(c), (3 if BACKWARD else 1) * q.block_type.nbytes)
            tma.async_copy_global_to_shared(q, [b, h0 + c, i0, 0], q_ready.index(c), q_buf.index(c))
            if BACKWARD:
                slot = turn % 2 * 2 + c
                tma.async_copy_global_to_shared(out, [b, h0 + c, i0, 0], q_ready.index(c), out_buf.index(c))
                mbarrier.wait(do_empty.index(slot), (turn // 2 & 1) ^ 1)
                tma.async_copy_global_to_shared(do, [b, h0 + c, i0, 0], q_ready.index(c), do_buf.index(slot))
        tile = gl.atomic_add(counter, 1)
        for j0 in range(first, last, ROWS):
            stage = use % STAGES
            _free(k_empty, use, STAGES)
            mbarrier.expect(k_ready.index(stage), k.block_type.nbytes + s.block_type.nbytes)
            tma.async_copy_global_to_shared(k, [b, m, j0, 0], k_ready.index(stage), k_buf.index(stage))
            tma.async_copy_global_to_shared(s, [b * M + m, j0], k_ready.index(stage), s_buf.index(stage))
            _free(v_empty, use, STAGES)
            mbarrier.expect(v_ready.index(stage), v.block_type.nbytes)
            tma.async_copy_global_to_shared(v, [b, m, j0, 0], v_ready.index(stage), v_buf.index(stage))
            use += 1
        turn += 1
    _free(read, turn, 2)
    notes.index(turn % 2).store(gl.where(at == 0, total, 0))  # no tile is left
    mbarrier.arrive(noted.index(turn % 2), count=1)


@gluon.jit
def _rows(c: gl.constexpr, tile, tiles, total, starts, T, stride, M, N: gl.constexpr):
    """Of each query of a tile its position i, where its document starts, the place of its `lse`, and whether there is
    such a query. Asked for while the tile before is ended, as it takes a while to come."""
    b, h0, i0 = _place(tile, tiles, M, N)
    i = i0 + gl.arange(0, ROWS, layout=A_ROW)
    there = (i < T) & (tile < total)
    return i, gl.load(starts + b * T + i, mask=there, other=0), (b * M * N + h0 + c).to(gl.int64) * stride + i, there


@gluon.jit
def _masked(logits, j0, inner, i0, i, start):
    """Logits of keys from j0 on, −∞ where a query i does not see one: only the first and last keys of a tile's row."""
    if (j0 < inner) | (j0 + ROWS > i0):
        j = gl.expand_dims(j0 + gl.arange(0, ROWS, layout=gl.SliceLayout(0, LOGITS)), 0)
        logits = gl.where((j <= gl.expand_dims(i, 1)) & (j >= gl.expand_dims(start, 1)), logits, float("-inf"))
    return logits


@gluon.jit
def _softmax(logits, top, total):
    new_top = gl.maximum(top, gl.max(logits, 1))
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet
    p = gl.exp2(logits - gl.expand_dims(shift, 1))
    shrink = gl.exp2(top - shift)
    return p, new_top, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _attend(
    c: gl.constexpr, out, starts, lse, places, bars, T, stride, scale, M, tiles, total, N: gl.constexpr
):  # fmt: skip
    """Four warps: head h0 + c of every tile. The logits of one tile of keys are computed beside the sum of values of
    the one before, which runs on during the softmax."""
    q_buf, out_buf, _do_buf, k_buf, v_buf, s_buf, notes = places
    q_ready, q_empty, _do_empty, k_ready, k_empty, v_ready, v_empty, noted, read = bars
    dtype: gl.constexpr = q_buf.dtype
    zeros = gl.zeros([ROWS, ROWS], gl.float32, LOGITS)
    use = 0
    turn = 0
    tile, first, inner = _next(notes, noted, read, turn)
    i, start, at, there = _rows(c, tile, tiles, total, starts, T, stride, M, N)
    while tile < total:
        b, h0, i0 = _place(tile, tiles, M, N)
        last = gl.minimum(i0 + ROWS, T)
        mbarrier.wait(q_ready.index(c), turn & 1)
        q = _block(q_buf, c).load(QUERIES)
        fence_async_shared()
        mbarrier.arrive(q_empty.index(c), count=1)
        top = gl.full([ROWS], float("-inf"), gl.float32, A_ROW)
        sums = gl.zeros([ROWS], gl.float32, A_ROW)
        acc = gl.zeros([ROWS, WIDTH], gl.float32, SUMS)
        stage = use % STAGES
        _filled(k_ready, use, STAGES)
        logits = warpgroup_mma(q, _block(k_buf, stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
        bias = s_buf.index(stage).load(LOGITS)
        logits = warpgroup_mma_wait(0, deps=[logits])
        fence_async_shared()
        mbarrier.arrive(k_empty.index(stage), count=1)
        logits = _masked(logits * scale + bias, first, inner, i0, i, start)
        p, top, sums, shrink = _softmax(logits, top, sums)
        weights = gl.convert_layout(p.to(dtype), WEIGHTS)
        for j0 in range(first + ROWS, last, ROWS):
            stage = use % STAGES
            after = (use + 1) % STAGES
            _filled(k_ready, use + 1, STAGES)
            _filled(v_ready, use, STAGES)
            logits = warpgroup_mma(q, _block(k_buf, after).permute([1, 0]), zeros, use_acc=False, is_async=True)
            acc = warpgroup_mma(weights, _block(v_buf, stage), acc, is_async=True)
            bias = s_buf.index(after).load(LOGITS)
            logits = warpgroup_mma_wait(1, deps=[logits])
            fence_async_shared()
            mbarrier.arrive(k_empty.index(after), count=1)
            logits = _masked(logits * scale + bias, j0, inner, i0, i, start)
            p, top, sums, shrink = _softmax(logits, top, sums)
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
            mbarrier.arrive(v_empty.index(stage), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(shrink, A_SUM), 1)
            weights = gl.convert_layout(p.to(dtype), WEIGHTS)
            use += 1
        stage = use % STAGES
        _filled(v_ready, use, STAGES)
        acc = warpgroup_mma(weights, _block(v_buf, stage), acc, is_async=True)
        turn += 1
        tile, first, inner = _next(notes, noted, read, turn)
        nothing = sums == 0.0
        sums = gl.where(nothing, 1.0, sums)
        gl.store(lse + at, gl.where(nothing, 0.0, top + gl.log2(sums)), mask=there)
        i, start, at, there = _rows(c, tile, tiles, total, starts, T, stride, M, N)
        tma.store_wait(0)  # the tile before has left
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
        mbarrier.arrive(v_empty.index(stage), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(1 / sums, A_SUM), 1)
        _block(out_buf, c).store(acc.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [b, h0 + c, i0, 0], out_buf.index(c))
        use += 1
    tma.store_wait(0)


@gluon.jit
def _differentiate(
    c: gl.constexpr, dq, starts, lse, delta, places, bars, T, stride, scale, M, tiles, total, N: gl.constexpr
):  # fmt: skip
    """Four warps: dq of head h0 + c of every tile. Logits and the gradients of one tile of keys' weights are computed
    beside what the one before adds to dq; of the three products the softmax waits for the first."""
    q_buf, out_buf, do_buf, k_buf, v_buf, s_buf, notes = places
    q_ready, q_empty, do_empty, k_ready, k_empty, v_ready, v_empty, noted, read = bars
    dtype: gl.constexpr = q_buf.dtype
    zeros = gl.zeros([ROWS, ROWS], gl.float32, LOGITS)
    use = 0
    turn = 0
    tile, first, inner = _next(notes, noted, read, turn)
    i, start, at, there = _rows(c, tile, tiles, total, starts, T, stride, M, N)
    lse_i = gl.load(lse + at, mask=there, other=float("inf"))
    while tile < total:
        b, h0, i0 = _place(tile, tiles, M, N)
        last = gl.minimum(i0 + ROWS, T)
        slot = turn % 2 * 2 + c
        do = _block(do_buf, slot)  # stays where it is: in registers it and q leave too few
        mbarrier.wait(q_ready.index(c), turn & 1)
        delta_i = do.load(QUERIES).to(gl.float32) * _block(out_buf, c).load(QUERIES).to(gl.float32)
        delta_i = gl.convert_layout(gl.sum(delta_i, 1), A_ROW)
        gl.store(delta + at, delta_i, mask=there)
        q = _block(q_buf, c).load(QUERIES)
        fence_async_shared()
        mbarrier.arrive(q_empty.index(c), count=1)
        acc = gl.zeros([ROWS, WIDTH], gl.float32, SUMS)
        stage = use % STAGES
        _filled(k_ready, use, STAGES)
        _filled(v_ready, use, STAGES)
        logits = warpgroup_mma(q, _block(k_buf, stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
        dp = warpgroup_mma(do, _block(v_buf, stage).permute([1, 0]), zeros, use_acc=False, is_async=True)
        bias = s_buf.index(stage).load(LOGITS)
        logits = warpgroup_mma_wait(1, deps=[logits])
        logits = logits * scale + (bias - gl.expand_dims(lse_i, 1))
        p = gl.exp2(_masked(logits, first, inner, i0, i, start))
        tma.store_wait(0)  # dq of the tile before has left the place of its do
        mbarrier.arrive(do_empty.index(slot ^ 2), count=1, pred=turn > 0)
        dp = warpgroup_mma_wait(0, deps=[dp])
        mbarrier.arrive(v_empty.index(stage), count=1)
        for j0 in range(first + ROWS, last, ROWS):
            stage = use % STAGES
            after = (use + 1) % STAGES
            ds = gl.convert_layout((p * (dp - gl.expand_dims(delta_i, 1))).to(dtype), WEIGHTS)
            _filled(k_ready, use + 1, STAGES)
            _filled(v_ready, use + 1, STAGES)
            logits = warpgroup_mma(q, _block(k_buf, after).permute([1, 0]), zeros, use_acc=False, is_async=True)
            dp = warpgroup_mma(do, _block(v_buf, after).permute([1, 0]), zeros, use_acc=False, is_async=True)
            acc = warpgroup_mma(ds, _block(k_buf, stage), acc, is_async=True)
            bias = s_buf.index(after).load(LOGITS)
            logits = warpgroup_mma_wait(2, deps=[logits])
            logits = logits * scale + (bias - gl.expand_dims(lse_i, 1))
            p = gl.exp2(_masked(logits, j0, inner, i0, i, start))
            dp, acc, ds = warpgroup_mma_wait(0, deps=[dp, acc, ds])
            fence_async_shared()
            mbarrier.arrive(k_empty.index(stage), count=1)
            mbarrier.arrive(v_empty.index(after), count=1)
            use += 1
        stage = use % STAGES
        ds = gl.convert_layout((p * (dp - gl.expand_dims(delta_i, 1))).to(dtype), WEIGHTS)
        acc = warpgroup_mma(ds, _block(k_buf, stage), acc, is_async=True)
        turn += 1
        tile, first, inner = _next(notes, noted, read, turn)
        i, start, at, there = _rows(c, tile, tiles, total, starts, T, stride, M, N)
        lse_i = gl.load(lse + at, mask=there, other=float("inf"))
        acc, ds = warpgroup_mma_wait(0, deps=[acc, ds])
        fence_async_shared()
        mbarrier.arrive(k_empty.index(stage), count=1)
        do.store((acc * (scale * LN_2)).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dq, [b, h0 + c, i0, 0], do_buf.index(slot))
        use += 1
    tma.store_wait(0)


@gluon.jit
def _buffers(n: gl.constexpr, block):
    shape: gl.constexpr = [n] + block.block_type.shape  # noqa: RUF005 (Gluon has no stars)
    return gl.allocate_shared_memory(block.dtype, shape, block.layout)


@gluon.jit
def _all_barriers():
    """Of q, do, keys (with scores), values and notes, which are free again once the warps of both heads are through."""
    return (
        _barriers(2, 1), _barriers(2, 1), _barriers(4, 1),
        _barriers(STAGES, 1), _barriers(STAGES, 2), _barriers(STAGES, 1), _barriers(STAGES, 2),
        _barriers(2, 1), _barriers(2, 2),
    )  # fmt: skip


@gluon.jit
def forward(q, k, v, s, out, starts, lse, counter, T, stride, scale, M, tiles, total, N: gl.constexpr):
    """out and lse, as of `triton_packed.forward`; ``counter`` is one int32 of 0, ``tiles`` those of a head's positions,
    ``total`` those of all pairs of heads."""
    notes = gl.allocate_shared_memory(gl.int32, [2, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    out_buf = _buffers(2, q)
    places = (_buffers(2, q), out_buf, out_buf, _buffers(STAGES, k), _buffers(STAGES, v), _buffers(STAGES, s), notes)
    bars = _all_barriers()
    gl.warp_specialize(
        [
            (_attend, (0, out, starts, lse, places, bars, T, stride, scale, M, tiles, total, N)),
            (_attend, (1, out, starts, lse, places, bars, T, stride, scale, M, tiles, total, N)),
            (_load, (q, out, out, k, v, s, starts, counter, places, bars, T, M, tiles, total, N, False)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def backward_queries(
    q, k, v, s, out, do, dq, starts, lse, delta, counter, T, stride, scale, M, tiles, total, N: gl.constexpr
):  # fmt: skip
    """dq and delta, as of `triton_packed.backward_queries`; the rest as of `forward`."""
    notes = gl.allocate_shared_memory(gl.int32, [2, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    places = (
        _buffers(2, q), _buffers(2, q), _buffers(4, q), _buffers(STAGES, k), _buffers(STAGES, v), _buffers(STAGES, s),
        notes,
    )  # fmt: skip
    bars = _all_barriers()
    gl.warp_specialize(
        [
            (_differentiate, (0, dq, starts, lse, delta, places, bars, T, stride, scale, M, tiles, total, N)),
            (_differentiate, (1, dq, starts, lse, delta, places, bars, T, stride, scale, M, tiles, total, N)),
            (_load, (q, out, do, k, v, s, starts, counter, places, bars, T, M, tiles, total, N, True)),
        ],
        [4, 1],
        [240, 24],
    )
