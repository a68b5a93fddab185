"""Products with packed weights, and those of attention: the vector code that a kind of numbers asks for."""

from __future__ import annotations

import numpy as np

from . import vectors
from .jit import compiled
from .one_token import short_rows, two_rows
from .vectors import (
    BFLOAT16,
    BLOCK,
    FLOAT32,
    INT8,
    TOKENS,
    as_bits,
    dots,
    keys_product,
    put_bits,
    values_sum,
)

_dot_f32, _dot_bf16, _dot_int8, _dot_int4 = (dots(kind, 1) for kind in range(4))
_dots_f32, _dots_bf16, _dots_int8, _dots_int4 = (dots(kind, TOKENS) for kind in range(4))
_add_f32, _add_bf16, _add_int8, _add_int4 = (vectors.add_row(kind) for kind in range(4))
_keys_f32, _keys_bf16 = (keys_product(kind, 1) for kind in (FLOAT32, BFLOAT16))
_pair_f32, _pair_bf16 = (keys_product(kind, 2) for kind in (FLOAT32, BFLOAT16))
_sum_f32, _sum_bf16 = (values_sum(kind, 1) for kind in (FLOAT32, BFLOAT16))
_sums_f32, _sums_bf16 = (values_sum(kind, 2) for kind in (FLOAT32, BFLOAT16))
_short_f32, _short_bf16 = (short_rows(kind) for kind in (FLOAT32, BFLOAT16))
_two_f32, _two_bf16, _two_int8, _two_int4 = (two_rows(kind) for kind in range(4))
_put_float, _put_half = put_bits(32), put_bits(16)


@compiled
def row_bytes(kind, n):
    """Bytes of a row of n weights, and of its scales."""
    if kind == FLOAT32:
        return 4 * n, 0
    if kind == BFLOAT16:
        return 2 * n, 0
    return (n if kind == INT8 else n // 2), n // 16


@compiled
def multiply_pairs(kind, weights, scales, rows, n, x, x16, factors, y):
    """:func:`multiply_rows` for one token and all rows, or all but an odd last one; returns how many."""
    size, scale_size = row_bytes(kind, n)
    if n == 256 and kind == FLOAT32:
        _short_f32(weights, rows, x, y)
        return rows
    if n == 256 and kind == BFLOAT16:
        _short_bf16(weights, rows, x, y)
        return rows
    half = rows // 2
    apart, scales_apart = half * size, half * scale_size
    for r in range(half):
        row, s, to = weights + r * size, scales + r * scale_size, y + 4 * r
        if kind == FLOAT32:
            _two_f32(row, s, apart, scales_apart, x, factors, n, to, half)
        elif kind == BFLOAT16:
            _two_bf16(row, s, apart, scales_apart, x, factors, n, to, half)
        elif kind == INT8:
            _two_int8(row, s, apart, scales_apart, x16, factors, n, to, half)
        else:
            _two_int4(row, s, apart, scales_apart, x16, factors, n, to, half)
    return 2 * half


@compiled
def multiply_rows(kind, weights, scales, first, last, n, x, x16, factors, T, y, step):
    """y[t, r − first] = Σ_k weights[r, k] · x[t, k] for the rows first ≤ r < last and T tokens.

    x is (T, n) float32; weights of 8 and 4 bits read x16 (T, n) int16 instead, and the factors (T,) that it goes with.
    Rows of y are ``step`` floats apart.
    """
    size, scale_size = row_bytes(kind, n)
    done = first
    if T == 1:
        done += multiply_pairs(kind, weights + first * size, scales + first * scale_size, last - first, n, x, x16,
                                factors, y)  # fmt: skip
    whole = T - T % TOKENS
    for r in range(done, last):
        row, s, out = weights + r * size, scales + r * scale_size, y + 4 * (r - first)
        for t in range(0, whole, TOKENS):
            to = out + 4 * t * step
            if kind == FLOAT32:
                _dots_f32(row, s, x + 4 * t * n, factors, n, n, to, step)
            elif kind == BFLOAT16:
                _dots_bf16(row, s, x + 4 * t * n, factors, n, n, to, step)
            elif kind == INT8:
                _dots_int8(row, s, x16 + 2 * t * n, factors + 4 * t, n, n, to, step)
            else:
                _dots_int4(row, s, x16 + 2 * t * n, factors + 4 * t, n, n, to, step)
        for t in range(whole, T):
            to = out + 4 * t * step
            if kind == FLOAT32:
                _dot_f32(row, s, x + 4 * t * n, factors, n, n, to, step)
            elif kind == BFLOAT16:
                _dot_bf16(row, s, x + 4 * t * n, factors, n, n, to, step)
            elif kind == INT8:
                _dot_int8(row, s, x16 + 2 * t * n, factors + 4 * t, n, n, to, step)
            else:
                _dot_int4(row, s, x16 + 2 * t * n, factors + 4 * t, n, n, to, step)


@compiled
def add_row(kind, weights, scales, row, n, factor, y):
    """y[k] += factor · weights[row, k] for n weights; y (n,) float32, by its address."""
    size, scale_size = row_bytes(kind, n)
    weights, scales = weights + row * size, scales + row * scale_size
    if kind == FLOAT32:
        _add_f32(weights, scales, factor, n, y)
    elif kind == BFLOAT16:
        _add_bf16(weights, scales, factor, n, y)
    elif kind == INT8:
        _add_int8(weights, scales, factor, n, y)
    else:
        _add_int4(weights, scales, factor, n, y)


@compiled
def key_products(kind, heads, q, stride, k, D, blocks, y, step):
    """y[h, j] = q[h] · k[j] for the keys of some blocks of 64, each of which stands as (D, 64)."""
    size = 4 if kind == FLOAT32 else 2
    for block in range(blocks):
        keys = k + block * D * BLOCK * size
        for h in range(0, heads - 1, 2):
            to, of = y + 4 * (h * step + block * BLOCK), q + 4 * h * stride
            if kind == FLOAT32:
                _pair_f32(of, stride, keys, D, to, step)
            else:
                _pair_bf16(of, stride, keys, D, to, step)
        if heads % 2:
            to, of = y + 4 * ((heads - 1) * step + block * BLOCK), q + 4 * (heads - 1) * stride
            if kind == FLOAT32:
                _keys_f32(of, stride, keys, D, to, step)
            else:
                _keys_bf16(of, stride, keys, D, to, step)


@compiled
def value_sums(kind, heads, p, stride, v, n, width, y, step):
    """y[h] += Σ_j p[h, j] · v[j] for n values of ``width`` channels, a multiple of 64.

    Addresses of p (heads, n) and y (heads, width), float32, rows ``stride`` and ``step`` floats apart; v (n, width).
    """
    size = 4 if kind == FLOAT32 else 2
    for start in range(0, n, BLOCK):  # so many stay in the nearest cache for all heads and channels
        some, values = min(BLOCK, n - start), v + start * width * size
        for h in range(0, heads - 1, 2):
            of, to = p + 4 * (h * stride + start), y + 4 * h * step
            if kind == FLOAT32:
                _sums_f32(of, stride, values, some, width, to, step)
            else:
                _sums_bf16(of, stride, values, some, width, to, step)
        if heads % 2:
            of, to = p + 4 * ((heads - 1) * stride + start), y + 4 * (heads - 1) * step
            if kind == FLOAT32:
                _sum_f32(of, stride, values, some, width, to, step)
            else:
                _sum_bf16(of, stride, values, some, width, to, step)


@compiled
def put(kind, address, place, value):
    """Write a float32 as element ``place`` of floats or of bfloat16, rounded to the nearest, ties to even.

    bfloat16 stand in the order of ``vectors``.
    """
    if kind == FLOAT32:
        _put_float(address + 4 * place, value)
    else:
        bits = np.int64(as_bits(value))
        place += place % 16 - place % 32 // 16 * 15
        _put_half(address + 2 * place, np.uint16(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF))
