"""Products of weights with one token, which are as fast as memory: two rows at a time, or x in registers.

The two rows of :func:`two_rows` are far from each other, so that the processor follows two streams, each read in order.
Measured on one core (Zen 4), in billions of weights a second: bf16 rows of 512 11.1 → 13.5, int8 rows of 1,024 15 → 23,
of 2,048 21 → 25. Two neighbouring rows, read in turn, are slower than one.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types

from .jit import intrinsic
from .vectors import BFLOAT16, BLOCK, FLOAT32, FLOATS, INT4, INT8, LANES, Writer, integer_pieces


def two_rows(kind: int) -> Any:
    """y[0] = Σ_k row[k] · x[k], and y[below] of the row ``apart`` bytes further on; x and its factor as in ``dots``."""
    integers = kind in (INT8, INT4)

    @intrinsic
    def product(typing_context, row, scales, apart, scales_apart, x, factor, n, y, below):
        def write(context, builder, signature, arguments):
            row, scales, apart, scales_apart, x, factor, n, y, below = arguments
            w = Writer(builder)
            rows = [(row, scales), (builder.add(row, apart), builder.add(scales, scales_apart))]
            totals = [w.zeros(1 if integers else 2) for _ in rows]
            with w.loop(0, n, BLOCK) as (k, _):
                if integers:
                    values = [w.shorts(x, builder.add(k, w.number(i))) for i in (0, 32)]
                else:
                    values = [w.floats(x, builder.add(k, w.number(LANES * i))) for i in range(4)]
                for (start, scale_start), sums in zip(rows, totals, strict=True):
                    if not integers:
                        for i, vector in enumerate(w.block(kind, start, k)):
                            w.add_to(sums[i % 2], vector, values[i])
                        continue
                    place = 0
                    for scale, vectors in integer_pieces(w, kind, start, scale_start, k):
                        pairs = [w.pair_products(v, values[place + i]) for i, v in enumerate(vectors)]
                        whole = pairs[0] if len(pairs) == 1 else builder.add(*pairs, flags=("nsw",))
                        w.add_to(sums[0], builder.sitofp(whole, FLOATS), scale)
                        place += len(vectors)
            for i, sums in enumerate(totals):
                total = builder.load(sums[0])
                for other in sums[1:]:
                    total = builder.fadd(total, builder.load(other))
                total = w.sum(total)
                if integers:
                    total = builder.fmul(total, w.load(factor, ir.FloatType(), 4))
                w.store(total, w.at(y, below, 4) if i else y)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), write

    return product


def short_rows(kind: int) -> Any:
    """y[r] = Σ_k weights[r, k] · x[k] for rows of 256 float32 or bfloat16, x staying in registers."""
    size = {FLOAT32: 1024, BFLOAT16: 512}[kind]

    @intrinsic
    def product(typing_context, weights, rows, x, y):
        def write(context, builder, signature, arguments):
            weights, rows, x, y = arguments
            w = Writer(builder)
            values = [w.floats(x, LANES * i) for i in range(256 // LANES)]
            with w.loop(0, rows, 1) as (r, _):
                row, totals = w.at(weights, r, size), [ir.Constant(FLOATS, [0.0] * LANES)] * 4
                for k in range(0, 256, BLOCK):
                    for i, vector in enumerate(w.block(kind, row, w.number(k))):
                        totals[i] = w.add_product(vector, values[k // LANES + i], totals[i])
                both = builder.fadd(totals[0], totals[1]), builder.fadd(totals[2], totals[3])
                w.store(w.sum(builder.fadd(*both)), w.at(y, r, 4))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), write

    return product
