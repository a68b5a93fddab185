"""The threads of an engine: one that leads every step, and others that help while they are awake."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from typing import Any

import numpy as np
from numba import types

from .crew import doze, load, now, store
from .jit import compiled
from .step import start, step

# What the leader tells the helpers, an int64 each, and what it keeps for itself.
GENERATION, NEXT, TOKENS, PAST, OUTPUTS, TEXT, CLOSED, COUNT, ALONE, PATIENCE = range(0, 160, 16)
SPIN = 200_000  # nanoseconds that a thread looks before it first sleeps: longer than another's chunk takes
NAPS = 40  # sleeps of a helper without work before it goes to wait for a call
# A helper that was put aside within a chunk, because another program has its core, costs more than it helps. After a
# step of which the leader lost a quarter to waiting for such a one, the next ones are done without helpers: so many,
# and twice as many each time. Each step with them that goes well takes one off: between two times that its core is
# taken away a helper is there for a few.
TOO_LONG, FEWEST_ALONE, MOST_ALONE = 4, 8, 1024


@compiled
def set_angles(frequencies, scaling, past, T, angles):
    """cos and sin of position · frequency as float32 numbers, (T, 2, D/2)."""
    for t in range(T):
        for d in range(len(frequencies)):
            angle = np.float64(np.float32(past + t) * frequencies[d])
            angles[t, 0, d] = np.float32(math.cos(angle) * scaling)
            angles[t, 1, d] = np.float32(math.sin(angle) * scaling)


@compiled
def lead(shape, table, floats, frequencies, scaling, slots, work, control, ids, past, outputs, text, threads, spin):
    """One step, its helpers told. ``ids`` (T,) int64."""
    # np.int64: a literal number would have the whole step compiled once more
    T, told, leader, one = len(ids), control.ctypes.data, np.int64(0), np.int64(1)
    generation = control[COUNT] + 1
    control[COUNT] = generation
    set_angles(frequencies, scaling, past, T, work.angles)
    start(shape, table, floats, work, ids, T)
    if control[ALONE] > 0:
        control[ALONE] -= 1
        step(shape, table, floats, slots, work, T, past, outputs, generation, one, leader, spin)
        return
    store(told + 8 * NEXT, generation)  # from here on what is told is being written
    store(told + 8 * TOKENS, T)
    store(told + 8 * PAST, past)
    store(told + 8 * OUTPUTS, outputs)
    store(told + 8 * TEXT, text)
    store(told + 8 * GENERATION, generation)
    began = now()
    asleep = step(shape, table, floats, slots, work, T, past, outputs, generation, threads, leader, spin)
    judge(control, asleep, now() - began)


@compiled
def judge(control, asleep, took):
    """Whether the next steps are done without helpers: one took ``took`` nanoseconds, ``asleep`` of them waiting."""
    if TOO_LONG * asleep < took:
        control[PATIENCE] = max(control[PATIENCE] - 1, FEWEST_ALONE)
    else:
        control[ALONE] = control[PATIENCE]
        control[PATIENCE] = min(2 * control[PATIENCE], MOST_ALONE)


@compiled
def help_along(shape, table, floats, slots, work, control, text, threads, thread, spin, naps):
    """Take part in the steps of a text, until none comes for a while or it is another text's turn."""
    told, napped = control.ctypes.data, 0
    last = max(load(told + 8 * GENERATION) - 1, 0)
    tired = now() + spin
    while load(told + 8 * CLOSED) == 0:
        generation = load(told + 8 * GENERATION)
        if generation > last:
            T, past, outputs = load(told + 8 * TOKENS), load(told + 8 * PAST), load(told + 8 * OUTPUTS)
            if load(told + 8 * TEXT) != text:
                return
            if load(told + 8 * NEXT) == generation:  # else what was told is of two steps
                step(shape, table, floats, slots, work, T, past, outputs, generation, threads, thread, spin)
                last, napped = generation, 0
                tired = now() + spin
        elif now() >= tired:
            if napped == naps:
                return
            napped += 1
            doze()


if sys.platform == "linux":
    _core: Any = types.ExternalFunction("sched_getcpu", types.int32())

    @compiled
    def current_core():
        """The core that this thread is on, -1 where that is not known."""
        return np.int64(_core())

else:

    @compiled
    def current_core():
        """The core that this thread is on, -1 where that is not known."""
        return np.int64(-1)


def shares(cores: set[int], leaders: int, helpers: int) -> list[set[int]]:
    """The cores that each helper is to run on: never the leader's, and none two helpers' as long as there are enough.

    Linux wakes a thread beside the one that calls it, even if another core is idle, where it does not know of caches
    that cores share (most small virtual machines). Two threads that then take turns on one core, each asleep while it
    waits for the other, look like one to it: they stayed there for hundreds of steps.
    """
    others = sorted(cores - {leaders})
    if not others:
        return []
    return [set(others[i::helpers]) or {others[i % len(others)]} for i in range(helpers)]


def available_cores() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Windows and macOS
        return os.cpu_count() or 1


class Crew:
    """Helpers as Python threads, which spend their time in jitted code without the interpreter's lock."""

    def __init__(self, threads: int, model: tuple[Any, ...], work: Any):
        self.threads, self.model, self.work = threads, model, work
        self.control = np.zeros(160, np.int64)
        self.control[PATIENCE] = FEWEST_ALONE
        self.slots: Any = None
        self.text = 0
        self._calls = [threading.Event() for _ in range(threads - 1)]
        self._waiting = [True] * (threads - 1)
        self._leaders_core = -1
        self._helpers = [
            threading.Thread(target=_help, args=(self, i), name=f"doge-engine-{i + 1}", daemon=True)
            for i in range(threads - 1)
        ]
        for helper in self._helpers:
            helper.start()

    def run(
        self, ids: np.ndarray, past: int, outputs: int, slots: Any, text: int, frequencies: np.ndarray, scaling: float
    ) -> None:
        """One step of the text whose number is ``text``, with ``ids`` (T,) int64; the logits are then in ``work``."""
        self.slots, self.text = slots, text
        if self._helpers and not self.control[ALONE]:
            self._make_room(current_core())
        for i, waiting in enumerate(self._waiting):
            if waiting and not self.control[ALONE]:
                self._calls[i].set()
        lead(
            *self.model, frequencies, scaling, slots, self.work, self.control, ids, past, outputs, text,
            self.threads, SPIN,
        )  # fmt: skip

    def _make_room(self, core: int) -> None:
        """Keep the helpers off the leader's core, which is now this one."""
        if core == self._leaders_core or self.control[CLOSED]:
            return
        self._leaders_core = core
        # Refused in some sandboxes; the step needs no helper.
        with contextlib.suppress(OSError):
            for helper, cores in zip(
                self._helpers, shares(os.sched_getaffinity(0), core, len(self._helpers)), strict=False
            ):
                assert helper.native_id  # a thread that has started has one; 0 would be the leader
                os.sched_setaffinity(helper.native_id, cores)

    def close(self) -> None:
        """Let the helpers go."""
        self.control[CLOSED] = 1
        for call in self._calls:
            call.set()


def _help(crew: Crew, i: int) -> None:
    while True:
        crew._waiting[i] = True
        crew._calls[i].wait()
        crew._waiting[i] = False
        crew._calls[i].clear()
        if crew.control[CLOSED]:
            return
        text, slots = crew.text, crew.slots  # text first: a newer text's slots would be told apart by its number
        help_along(
            *crew.model, slots, crew.work, crew.control, text, crew.threads, i + 1, SPIN, NAPS,
        )  # fmt: skip
