"""Vector code that loops in Python cannot express: dot products with packed weights, and the two products of attention.

Each function here is written as LLVM instructions on vectors of 16 floats, which LLVM lays out for whatever processor
it finds (AVX-512, AVX2, NEON), and takes addresses, as integers: the caller answers for what is there. A row of weights
is read from its beginning to its end: memory that is read in order arrives two to four times as fast as neighbouring
rows at once.

What a row of n weights (n a multiple of ``BLOCK``) looks like, by its kind:

- ``FLOAT32``: n floats
- ``BFLOAT16``: n upper halves of floats, of each 32 the first 16 and the others in turn (0, 16, 1, 17 …): an integer of
  32 bits holds one of each, and a shift and a mask make floats of them
- ``INT8``: n signed bytes, and a float scale for each 64
- ``INT4``: n / 2 bytes, of each block of 64 the first 32 in the low halves and the others in the high halves of its 32
  bytes, plus 8; and a bfloat16 scale for each 32

Products with ``INT8`` and ``INT4`` are products of integers: x comes as integers of 16 bits and one factor a token,
which is as good as exact beside weights of 8 bits, and takes half the instructions of turning weights into floats.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from .jit import intrinsic

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
BLOCK = 64  # weights that are read at a time: rows are padded with zeros to a multiple
LANES = 16
TOKENS = 4  # tokens that `dots` multiplies a row with at a time

_F, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, _INTS = ir.VectorType(_F, LANES), ir.VectorType(_I32, LANES)
_ANY_ORDER = ("reassoc", "nsz", "arcp", "contract")


class Writer:
    """Emits instructions; addresses and places are integers of 64 bits."""

    def __init__(self, builder: Any):
        self.b = builder

    def number(self, n: int) -> Any:
        """n as a constant."""
        return ir.Constant(_I64, n)

    def at(self, address: Any, place: Any, size: int) -> Any:
        """The address of element ``place`` of elements of ``size`` bytes."""
        place = self.number(place) if isinstance(place, int) else place
        return self.b.add(address, self.b.mul(place, self.number(size)))

    def load(self, address: Any, kind: Any, align: int) -> Any:
        """What is there of an LLVM type ``kind``, at a multiple of ``align`` bytes."""
        loaded = self.b.load(self.b.inttoptr(address, kind.as_pointer()))
        loaded.align = align
        return loaded

    def store(self, value: Any, address: Any) -> None:
        """Write a number or a vector there, at a multiple of 4 bytes."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = 4

    def floats(self, address: Any, place: Any) -> Any:
        """16 floats."""
        return self.load(self.at(address, place, 4), FLOATS, 4)

    def halves(self, address: Any, place: Any) -> list[Any]:
        """32 bfloat16, of which two stand in an integer, as twice 16 floats."""
        bits = self.load(self.at(address, place, 2), _INTS, 2)
        low = self.b.shl(bits, ir.Constant(_INTS, [16] * LANES))
        high = self.b.and_(bits, ir.Constant(_INTS, [-65536] * LANES))
        return [self.b.bitcast(low, FLOATS), self.b.bitcast(high, FLOATS)]

    def block(self, kind: int, address: Any, place: Any) -> list[Any]:
        """64 float32 or bfloat16, as four times 16 floats."""
        if kind == FLOAT32:
            return [self.floats(address, self.b.add(place, self.number(LANES * i))) for i in range(4)]
        return [x for i in (0, 32) for x in self.halves(address, self.b.add(place, self.number(i)))]

    def shorts(self, address: Any, place: Any) -> Any:
        """32 integers of 16 bits."""
        return self.load(self.at(address, place, 2), ir.VectorType(_I16, 2 * LANES), 2)

    def bytes(self, address: Any, lanes: int = LANES) -> Any:
        """So many bytes, as one vector."""
        return self.load(address, ir.VectorType(_I8, lanes), 1)

    def pair_products(self, weights: Any, x: Any) -> Any:
        """32 bytes times 32 integers of 16 bits, neighbours added: 16 integers. Written as LLVM knows it (pmaddwd)."""
        wide = ir.VectorType(_I32, 2 * LANES)
        products = self.b.mul(self.b.sext(weights, wide), self.b.sext(x, wide), flags=("nsw",))
        halves = [
            self.b.shuffle_vector(
                products, ir.Constant(wide, ir.Undefined), ir.Constant(_INTS, [2 * i + odd for i in range(LANES)])
            )
            for odd in range(2)
        ]
        return self.b.add(*halves, flags=("nsw",))

    def from_bytes(self, values: Any) -> Any:
        """16 signed bytes, as floats."""
        return self.b.sitofp(self.b.sext(values, _INTS), FLOATS)

    def scale(self, address: Any, place: Any) -> Any:
        """One bfloat16, 16 times."""
        bits = self.load(self.at(address, place, 2), _I16, 2)
        return self.splat(self.b.bitcast(self.b.shl(self.b.zext(bits, _I32), ir.Constant(_I32, 16)), _F))

    def splat(self, value: Any) -> Any:
        """One number, 16 times."""
        empty = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
        one = self.b.insert_element(empty, value, ir.Constant(_I32, 0))
        return self.b.shuffle_vector(one, empty, ir.Constant(_INTS, [0] * LANES))

    def add_product(self, a: Any, b: Any, c: Any) -> Any:
        """a · b + c. `fmuladd`, not `fma`: a processor without it multiplies and adds instead of calling a function."""
        kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, "llvm.fmuladd.v16f32"), [a, b, c])

    def sum(self, values: Any) -> Any:
        """The sum of 16 floats, added in any order."""
        kind = ir.FunctionType(_F, [_F, FLOATS])
        reduce = cgutils.get_or_insert_function(self.b.module, kind, "llvm.vector.reduce.fadd.v16f32")
        return self.b.call(reduce, [ir.Constant(_F, 0.0), values], fastmath=_ANY_ORDER)

    def zeros(self, n: int) -> list[Any]:
        """n sums that start at zero."""
        return [cgutils.alloca_once_value(self.b, ir.Constant(FLOATS, [0.0] * LANES)) for _ in range(n)]

    def add_to(self, total: Any, a: Any, b: Any) -> None:
        """total += a · b, for one of :meth:`zeros`."""
        self.b.store(self.add_product(a, b, self.b.load(total)), total)

    def loop(self, start: int, stop: Any, step: int) -> Any:
        """A ``with`` block of instructions for start, start + step … below ``stop``; gives (that number, the round)."""
        return cgutils.for_range_slice(self.b, self.number(start), stop, self.number(step))


def _pieces(w: Writer, kind: int, row: Any, scales: Any, k: Any) -> list[tuple[Any, list[Any]]]:
    """The block of 64 weights at k: for each scale (None for 1) the vectors of 16 that it belongs to."""
    b = w.b
    if kind in (FLOAT32, BFLOAT16):
        return [(None, w.block(kind, row, k))]
    if kind == INT8:
        scale = w.splat(w.load(w.at(scales, b.udiv(k, w.number(BLOCK)), 4), _F, 4))
        return [(scale, [w.from_bytes(w.bytes(b.add(row, b.add(k, w.number(LANES * i))))) for i in range(4)])]
    four, fifteen, eight = (ir.Constant(ir.VectorType(_I8, LANES), [n] * LANES) for n in (4, 15, 8))
    first = b.udiv(k, w.number(2))
    both = [w.bytes(b.add(row, b.add(first, w.number(LANES * i)))) for i in range(2)]
    low = [w.from_bytes(b.sub(b.and_(x, fifteen), eight)) for x in both]
    high = [w.from_bytes(b.sub(b.lshr(x, four), eight)) for x in both]
    group = b.udiv(k, w.number(BLOCK // 2))
    return [(w.scale(scales, group), low), (w.scale(scales, b.add(group, w.number(1))), high)]


def integer_pieces(w: Writer, kind: int, row: Any, scales: Any, k: Any) -> list[tuple[Any, list[Any]]]:
    """The block of 64 weights at k: for each scale the vectors of 32 bytes that it belongs to."""
    b = w.b
    if kind == INT8:
        scale = w.splat(w.load(w.at(scales, b.udiv(k, w.number(BLOCK)), 4), _F, 4))
        return [(scale, [w.bytes(b.add(row, b.add(k, w.number(i))), 32) for i in (0, 32)])]
    four, fifteen, eight = (ir.Constant(ir.VectorType(_I8, 32), [n] * 32) for n in (4, 15, 8))
    both = w.bytes(b.add(row, b.udiv(k, w.number(2))), 32)
    group = b.udiv(k, w.number(BLOCK // 2))
    low, high = b.sub(b.and_(both, fifteen), eight), b.sub(b.lshr(both, four), eight)
    return [(w.scale(scales, group), [low]), (w.scale(scales, b.add(group, w.number(1))), [high])]


def dots(kind: int, tokens: int) -> Any:
    """y[t] = Σ_k row[k] · x[t, k] for some tokens, x rows ``stride`` numbers apart, y floats ``step`` apart.

    x is float32; for weights of 8 and 4 bits it is integers of 16 bits, with a factor for each token.
    """
    integers = kind in (INT8, INT4)

    @intrinsic
    def product(typing_context, row, scales, x, factors, stride, n, y, step):
        def write(context, builder, signature, arguments):
            row, scales, x, factors, stride, n, y, step = arguments
            w = Writer(builder)
            rows_of_x = [w.at(x, builder.mul(stride, w.number(t)), 2 if integers else 4) for t in range(tokens)]
            many = 4 if tokens == 1 and not integers else 1  # sums that do not wait for each other
            totals = [w.zeros(many) for _ in range(tokens)]
            with w.loop(0, n, BLOCK) as (k, _):
                if integers:
                    place = 0
                    for scale, vectors in integer_pieces(w, kind, row, scales, k):
                        for t in range(tokens):
                            pairs = [
                                w.pair_products(
                                    vector, w.shorts(rows_of_x[t], builder.add(k, w.number(place + 32 * i)))
                                )
                                for i, vector in enumerate(vectors)
                            ]
                            whole = pairs[0] if len(pairs) == 1 else builder.add(*pairs, flags=("nsw",))
                            w.add_to(totals[t][0], builder.sitofp(whole, FLOATS), scale)
                        place += 32 * len(vectors)
                else:
                    for i, vector in enumerate(w.block(kind, row, k)):
                        for t in range(tokens):
                            values = w.floats(rows_of_x[t], builder.add(k, w.number(LANES * i)))
                            w.add_to(totals[t][i % many], vector, values)
            for t in range(tokens):
                total = builder.load(totals[t][0])
                for other in totals[t][1:]:
                    total = builder.fadd(total, builder.load(other))
                total = w.sum(total)
                if integers:
                    total = builder.fmul(total, w.load(w.at(factors, t, 4), _F, 4))
                w.store(total, w.at(y, builder.mul(step, w.number(t)), 4))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), write

    return product


def add_row(kind: int) -> Any:
    """y[k] += a · row[k] for n weights."""

    @intrinsic
    def add(typing_context, row, scales, a, n, y):
        def write(context, builder, signature, arguments):
            row, scales, a, n, y = arguments
            w = Writer(builder)
            factor = w.splat(a)
            with w.loop(0, n, BLOCK) as (k, _):
                place = 0
                for scale, vectors in _pieces(w, kind, row, scales, k):
                    by = factor if scale is None else builder.fmul(factor, scale)
                    for vector in vectors:
                        address = w.at(y, builder.add(k, w.number(place)), 4)
                        w.store(w.add_product(vector, by, w.floats(address, 0)), address)
                        place += LANES
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32, types.int64, types.int64), write

    return add


def keys_product(kind: int, heads: int) -> Any:
    """Logits of 64 keys, which stand as (D, 64): y[h, j] = Σ_d q[h, d] · k[d, j].

    q and y rows ``stride`` and ``step`` floats apart.
    """

    @intrinsic
    def product(typing_context, q, stride, k, D, y, step):
        def write(context, builder, signature, arguments):
            q, stride, k, D, y, step = arguments
            w = Writer(builder)
            rows = [w.at(q, builder.mul(stride, w.number(h)), 4) for h in range(heads)]
            totals = [w.zeros(4) for _ in range(heads)]
            with w.loop(0, D, 1) as (d, _):
                first = builder.mul(d, w.number(BLOCK))
                keys = w.block(kind, k, first)
                for h in range(heads):
                    factor = w.splat(w.load(w.at(rows[h], d, 4), _F, 4))
                    for i in range(4):
                        w.add_to(totals[h][i], keys[i], factor)
            for h in range(heads):
                for i in range(4):
                    w.store(
                        builder.load(totals[h][i]),
                        w.at(w.at(y, builder.mul(step, w.number(h)), 4), LANES * i, 4),
                    )
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), write

    return product


def values_sum(kind: int, heads: int) -> Any:
    """y[h, d] += Σ_j p[h, j] · v[j, d] for n values, 64 channels at a time; rows of v are ``width`` channels."""

    @intrinsic
    def weighted(typing_context, p, stride, v, n, width, y, step):
        def write(context, builder, signature, arguments):
            p, stride, v, n, width, y, step = arguments
            w = Writer(builder)
            size = 4 if kind == FLOAT32 else 2
            with w.loop(0, width, BLOCK) as (first, _):
                columns = w.at(v, first, size)
                places = [
                    [
                        w.at(w.at(y, builder.mul(step, w.number(h)), 4), builder.add(first, w.number(LANES * i)), 4)
                        for i in range(4)
                    ]
                    for h in range(heads)
                ]
                totals = [w.zeros(4) for _ in range(heads)]
                for h in range(heads):
                    for i in range(4):
                        builder.store(w.floats(places[h][i], 0), totals[h][i])
                with w.loop(0, n, 1) as (j, _):
                    row = builder.mul(j, width)
                    values = w.block(kind, columns, row)
                    for h in range(heads):
                        weight = w.at(w.at(p, builder.mul(stride, w.number(h)), 4), j, 4)
                        factor = w.splat(w.load(weight, _F, 4))
                        for i in range(4):
                            w.add_to(totals[h][i], values[i], factor)
                for h in range(heads):
                    for i in range(4):
                        w.store(builder.load(totals[h][i]), places[h][i])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), write

    return weighted


@intrinsic
def as_float(typing_context, bits):
    """The float32 that these 32 bits are."""

    def write(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _F)

    return types.float32(types.int32), write


@intrinsic
def as_bits(typing_context, value):
    """The 32 bits of a float32."""

    def write(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), write


def put_bits(bits: int) -> Any:
    """Write a float32 (32 bits) or an uint16 at an address."""
    kind = types.float32 if bits == 32 else types.uint16

    @intrinsic
    def put(typing_context, address, value):
        def write(context, builder, signature, arguments):
            address, value = arguments
            builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = bits // 8
            return context.get_dummy_value()

        return types.void(types.int64, kind), write

    return put
