"""Several threads at one piece of work after another, without ever needing one of them.

A step is a row of *regions*, each cut into chunks. Every thread runs the whole step and takes whatever chunks are left;
whoever finishes a region's last chunk does what follows it alone, and opens the next region. A thread that the system
has put aside therefore holds up the others only if it was put aside in the middle of a chunk; one that comes late finds
nothing left and runs through. Waiting is a short spin and then sleep, which frees the core: with another job on it,
spinning would hold up the very thread that is waited for.

A region has three numbers, 8 bytes each: *taken* (generation · 2²⁰ + chunks taken), *finished* (chunks), and *open*
(the last generation that is through). Each step is a generation of its own, so nothing is ever set back to zero, and
a thread that is still in an older step sees so and leaves. What a chunk reads is only overwritten in later regions:
whatever a thread worked out before it got a chunk was true.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from .jit import compiled, intrinsic

LINE = 128  # bytes between numbers of different regions, so that no two share a cache line
NOTHING_LEFT, TOO_LATE = -1, -2
_CHUNKS = 1 << 20

_I64 = ir.IntType(64)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I64.as_pointer())


@intrinsic
def load(typing_context, address):
    """The int64 there; sees what other threads wrote before they stored it."""

    def write(context, builder, signature, arguments):
        return builder.load_atomic(_pointer(builder, arguments[0]), ordering="seq_cst", align=8)

    return types.int64(types.int64), write


@intrinsic
def store(typing_context, address, value):
    """Write the int64 there; who loads it also sees what this thread wrote before."""

    def write(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], _pointer(builder, arguments[0]), ordering="seq_cst", align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), write


@intrinsic
def add(typing_context, address, value):
    """Add to the int64 there; returns what it was."""

    def write(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _pointer(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), write


@intrinsic
def swap(typing_context, address, old, new):
    """Write ``new`` if ``old`` is there; returns whether it was."""

    def write(context, builder, signature, arguments):
        address, old, new = arguments
        pair = builder.cmpxchg(_pointer(builder, address), old, new, "seq_cst", "seq_cst")
        return builder.zext(builder.extract_value(pair, 1), _I64)

    return types.int64(types.int64, types.int64, types.int64), write


def _two_numbers(name: str, *before: Any) -> Any:
    """The system's ``name(*before, address)`` as a function that returns the two int64 then found at the address."""

    @intrinsic
    def read(typing_context):
        def write(context, builder, signature, arguments):
            room = cgutils.alloca_once(builder, _I64, size=2)
            kind = ir.FunctionType(ir.IntType(32), [x.type for x in before] + [room.type])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [*before, room])
            numbers = [builder.load(builder.gep(room, [ir.Constant(_I64, i)])) for i in range(2)]
            return context.make_tuple(builder, signature.return_type, numbers)

        return types.UniTuple(types.int64, 2)(), write

    return read


if sys.platform == "win32":
    _sleep_milliseconds: Any = types.ExternalFunction("Sleep", types.void(types.uint32))
    _file_time = _two_numbers("GetSystemTimePreciseAsFileTime")

    @compiled
    def now():
        """Nanoseconds since some day."""
        return 100 * _file_time()[0]

    @compiled
    def doze():
        """Give the core away for a moment."""
        _sleep_milliseconds(0)

else:
    _sleep_microseconds: Any = types.ExternalFunction("usleep", types.int32(types.uint32))
    _clock = _two_numbers("clock_gettime", ir.Constant(ir.IntType(32), time.CLOCK_MONOTONIC))

    @compiled
    def now():
        """Nanoseconds since some day."""
        seconds, rest = _clock()
        return 1_000_000_000 * seconds + rest

    @compiled
    def doze():
        """Give the core away for a moment, some 70 microseconds on Linux."""
        _sleep_microseconds(20)


@compiled
def take(region, generation, chunks):
    """The number of a chunk that is now the caller's, ``NOTHING_LEFT``, or ``TOO_LATE`` if the step is over."""
    while True:
        now = load(region)
        its_generation = now // _CHUNKS
        if its_generation > generation:
            return TOO_LATE
        chunk = now % _CHUNKS if its_generation == generation else 0
        if chunk >= chunks:
            return NOTHING_LEFT
        if swap(region, now, generation * _CHUNKS + chunk + 1):
            return chunk


@compiled
def finish(region, chunks):
    """Say that a chunk is done; True for the last one, whose thread then calls :func:`open_next`."""
    if add(region + 8, 1) + 1 < chunks:
        return False
    store(region + 8, 0)
    return True


@compiled
def open_next(region, generation):
    """Let everyone pass :func:`wait`."""
    store(region + LINE // 2, generation)


@compiled
def wait(region, generation, spin):
    """Until the region is through; looks for ``spin`` nanoseconds before it first sleeps.

    Returns:
        The nanoseconds that it took beyond these.
    """
    if load(region + LINE // 2) >= generation:
        return 0
    tired = now() + spin
    while load(region + LINE // 2) < generation:
        if now() >= tired:
            doze()
    return max(now() - tired, 0)
