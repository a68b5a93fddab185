"""The text of one request: prompt in, text out up to a stop string, told to whoever asked."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .models import PIECE, Choice, Served, Text


@dataclass(frozen=True)
class Piece:
    """Text that came, and how many tokens have come so far."""

    text: str
    completion_tokens: int = 0


@dataclass(frozen=True)
class Done:
    """The end: ``reason`` is stop, or length for a text cut off by its tokens or its time."""

    reason: str
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, which a text that was kept had seen


@dataclass(frozen=True)
class Failed:
    """The end of a text that nobody gets: ``why`` is error, late for one that waited too long, or closing."""

    why: str = "error"


Event = Piece | Done | Failed


class Stops:
    """Text up to the first stop string; nothing that may be the beginning of one is given away.

    Args:
        strings: none of them empty.
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = tuple(strings)
        self._held = ""
        self.reached = False

    def push(self, text: str) -> str:
        """What can be given away now. Of two stop strings that one that is complete first counts."""
        self._held += text
        found = [(at + len(stop), at) for stop in self._strings if (at := self._held.find(stop)) >= 0]
        if found:
            self.reached = True
            given, self._held = self._held[: min(found)[1]], ""
            return given
        keep = max((_overlap(self._held, stop) for stop in self._strings), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given

    def end(self) -> str:
        """What was held back, where no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that begin ``stop`` without being all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class Job:
    """A request on its way. Made by the server's thread; its turns are taken by the scheduler's.

    Args:
        served: the model.
        ids: the prompt, at least one token.
        choice: how tokens are chosen.
        most: new tokens at most.
        stops: stop strings.
        seconds: from now until the text is cut off.
        tell: called in the scheduler's thread with each event; after ``Done`` or ``Failed`` comes none.
    """

    def __init__(
        self, served: Served, ids: list[int], choice: Choice, most: int, stops: Sequence[str], seconds: float,
        tell: Callable[[Event], Any],
    ):  # fmt: skip
        self.served, self.ids, self.choice, self.most, self.tell = served, ids, choice, most, tell
        self.until = time.monotonic() + seconds
        self.cancelled = False
        self._new: list[int] = []
        self._cached = 0  # tokens of the prompt that a kept text had seen
        self._stops = Stops(stops)
        self._text: Text | None = None
        self._stream = served.stream()
        self._coming: Iterator[int] | None = None

    def turn(self, tokens: int) -> bool:
        """Read a piece of the prompt, or make a few tokens; returns whether there is more to do."""
        try:
            return self._turn(tokens)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            self._tell(Failed())
        return self._close(failed=True)

    def expire(self) -> bool:
        """Whether the job ran out of time while it waited; whoever asked is told."""
        if time.monotonic() < self.until:
            return False
        self._tell(Failed("late"))
        return True

    def give_up(self) -> None:
        """End it because the server ends; may be called from any thread."""
        self._tell(Failed("closing"))
        self.cancelled = True

    def _turn(self, tokens: int) -> bool:
        if self.cancelled:
            return self._close()
        if self._text is None:
            self._text = self.served.begin(self.ids)
            self._cached = self._text.seen
        if time.monotonic() >= self.until:
            return self._finish("length")
        if (seen := self._text.seen) < len(self.ids):
            self._text.feed(self.ids[seen : seen + PIECE])
            return True
        if self._coming is None:
            self._coming = self._text.tokens(self.choice, self.most)
        pieces: list[str] = []
        reason = ""
        for _ in range(tokens):
            token = next(self._coming, None)
            if token is None:  # cannot be: the last token is known as such
                reason = "length"
                break
            self._new.append(token)
            if token in self.served.ends:
                reason = "stop"
                break
            pieces.append(self._stops.push(self._stream.push(token)))
            if self._stops.reached:
                reason = "stop"
                break
            if len(self._new) == self.most:
                reason = "length"
                break
        if text := "".join(pieces):
            self._tell(Piece(text, len(self._new)))
        return self._finish(reason) if reason else True

    def _finish(self, reason: str) -> bool:
        if not self._stops.reached:
            rest = self._stops.push(self._stream.end())
            if self._stops.reached:
                reason = "stop"
            if rest := rest + self._stops.end():
                self._tell(Piece(rest, len(self._new)))
        self._tell(Done(reason, len(self._new), self._cached))
        return self._close()

    def _tell(self, event: Event) -> None:
        if not self.cancelled:
            self.tell(event)

    def _close(self, failed: bool = False) -> bool:
        """Let the text go, whose slots are most of what a request holds, or have it kept."""
        if self._text is not None and not failed:
            self.served.keep(self.ids + self._new, self._text)
        self._text = self._coming = None
        return False
