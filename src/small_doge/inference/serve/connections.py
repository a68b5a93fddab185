"""Connections that say nothing: uvicorn waits for the head of a request for ever, this server for some seconds."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol(seconds: float, most: int) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection without the whole head of a request after ``seconds``.

    Args:
        most: connections in all; one more is closed at once. Whoever is asked to answer 503 has to do so before.
    """

    class Bounded(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()
            else:
                self._waiting = self.loop.call_later(seconds, transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            answering = self.cycle is not None and not self.cycle.response_complete
            if answering:
                self._forget()
            elif self._waiting is None and not self.transport.is_closing():  # the beginning of a next request
                self._waiting = self.loop.call_later(seconds, self.transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _forget(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

    return Bounded
