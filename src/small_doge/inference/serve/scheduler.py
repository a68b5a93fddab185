"""Whose turn it is: one thread computes, a few requests take turns, some more wait, and the rest are refused."""

from __future__ import annotations

import threading
from collections import deque

from .jobs import Job


class Full(Exception):
    """As many requests wait as may."""


class Scheduler:
    """Gives every active job a turn after the other, in a thread of its own.

    Args:
        active: jobs that take turns.
        waiting: jobs that may wait to become active.
        tokens: of a job in one turn.
    """

    def __init__(self, active: int, waiting: int, tokens: int):
        self._most_active, self._most_waiting, self._tokens = active, waiting, tokens
        self._changed = threading.Condition()
        self._active: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="doge-serve", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a job on.

        Raises:
            Full: if there is no room for it.
        """
        with self._changed:
            if self._closed or sum(self._counts()) >= self._most_active + self._most_waiting:
                raise Full
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Forget a job that nobody waits for: at once, or after the turn it is in. It may be done already."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify()

    def counts(self) -> tuple[int, int]:
        """Jobs that take turns, and jobs that wait."""
        with self._changed:
            return self._counts()

    def close(self) -> None:
        """Give up all jobs and let the thread end after the turn it is in."""
        with self._changed:
            self._closed = True
            jobs = [*self._active, *self._waiting, *([self._running] if self._running else [])]
            self._active.clear()
            self._waiting.clear()
            self._changed.notify()
        for job in jobs:
            job.give_up()
        self._thread.join(timeout=10)

    def _counts(self) -> tuple[int, int]:
        active = len(self._active) + (self._running is not None)
        ready = min(self._most_active - active, len(self._waiting))  # become active with the next turn
        return active + ready, len(self._waiting) - ready

    def _run(self) -> None:
        while (job := self._next()) is not None:
            more = job.turn(self._tokens)
            with self._changed:
                self._running = None
                if more and not self._closed:
                    self._active.append(job)
            del job, more  # while this thread sleeps it holds no text

    def _next(self) -> Job | None:
        with self._changed:
            while True:
                # One that has waited too long is told so even while others are at work.
                self._waiting = deque(job for job in self._waiting if not job.expire())
                while self._waiting and len(self._active) < self._most_active:
                    self._active.append(self._waiting.popleft())
                if self._closed:
                    return None
                if self._active:
                    self._running = self._active.popleft()
                    return self._running
                self._changed.wait()
