"""Mixing: which document comes next out of several sources, decided by what came so far and by nothing else.

Every source reads and encodes ahead; the next document is drawn from the source that is furthest behind its share of
tokens. The order is therefore that of a single process, whatever the number of processes that encode.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from .corpora import Corpus
from .documents import Document
from .encoding import Encoded, Pool, broken

_BATCH_BYTES = 4 << 20


class Source:
    """One corpus, read and encoded ahead. `position` is where its next document begins, whatever is under way."""

    def __init__(self, corpus: Corpus, pool: Pool, batch_documents: int, position: Any) -> None:
        inner, index = position or (None, 0)
        self.pool, self.batch_documents = pool, batch_documents
        self.stream = corpus.open(inner)
        self.documents = itertools.islice(self.stream, index, None)
        self.place = (inner, index)  # of the next batch to be read
        self.waiting: deque[tuple[tuple[Any, int], float | None, Future[Encoded]]] = deque()
        self.batch: Encoded | None = None
        self.start, self.index = self.place, 0  # of the batch being drawn from, and the next document in it
        self.ended = False
        self.before = self.behind = self.stream.fraction()  # shares read before the batch being drawn from, and with it

    def next(self) -> tuple[Encoded, int] | None:
        """The batch that holds the next document, and its number there; None at the end."""
        while self.batch is None or self.index == len(self.batch.ends):
            self._read_ahead()
            if not self.waiting:
                return None
            start, share, future = self.waiting.popleft()
            self.before, self.behind = self.behind, share
            try:
                self.batch = future.result()
            except BrokenProcessPool:
                raise broken() from None
            self.start, self.index = start, 0
            self._read_ahead()
        self.index += 1
        return self.batch, self.index - 1

    def position(self) -> list[Any]:
        """The place of the batch in its stream, and documents of it that were drawn."""
        inner, index = self.start
        return [inner, index + self.index]

    def fraction(self) -> float | None:
        """The share of the documents drawn, by the bytes they were read from; None if unknown."""
        if self.before is None or self.behind is None or self.batch is None:
            return self.before
        return self.before + (self.behind - self.before) * self.index / max(1, len(self.batch.ends))

    def _read_ahead(self) -> None:
        while not self.ended and len(self.waiting) < self.pool.depth:
            batch: list[Document] = []
            size = 0
            for document in self.documents:
                batch.append(document)
                size += len(document.text)
                if len(batch) == self.batch_documents or size >= _BATCH_BYTES:
                    break
            else:
                self.ended = True
            if batch:
                self.waiting.append((self.place, self.stream.fraction(), self.pool.submit(batch)))
                self.place = (self.stream.position(), 0) if not self.ended else self.place


class Mix:
    """The documents of several corpora in one order: (number of the part, the batch it is in, its number there).

    ``given`` is what each part has had so far; the caller adds tokens, or bytes, for every document it takes. Without
    weights part follows part. With weights the next document is that of the part furthest behind, and the mix ends
    where that part does.
    """

    def __init__(
        self, corpus: Corpus, pool: Pool, batch_documents: int, positions: Sequence[Any] | None, given: Sequence[int]
    ) -> None:
        self.parts = corpus.parts or (corpus,)
        self.ended: str | None = None  # the part that ended a mix
        places = positions or [None] * len(self.parts)
        self.sources = [Source(part, pool, batch_documents, at) for part, at in zip(self.parts, places, strict=True)]
        self.given = list(given) or [0] * len(self.parts)
        weights = [part.weight for part in self.parts]
        self.weights = None if len(weights) == 1 or None in weights else [float(weight or 1) for weight in weights]

    def __iter__(self) -> Iterator[tuple[int, Encoded, int]]:
        if self.weights is None:
            for k, source in enumerate(self.sources):
                while (found := source.next()) is not None:
                    yield k, *found
            return
        shares = list(enumerate(self.weights))
        while True:
            k = min(shares, key=lambda pair: self.given[pair[0]] / pair[1])[0]
            found = self.sources[k].next()
            if found is None:
                self.ended = self.parts[k].name
                return
            yield k, *found

    def positions(self) -> list[Any]:
        """The place of each part, to begin there again."""
        return [source.position() for source in self.sources]

    def fraction(self) -> float | None:
        """The share of the reading that lies behind; None if a source does not know."""
        shares = [source.fraction() for source in self.sources]
        known = [share for share in shares if share is not None]
        if self.weights is not None:  # the first source that ends is the end
            return max(known, default=None)
        if len(known) < len(shares):
            return None
        sizes = [max(1, sum(size for _, size in part.facts or ())) for part in self.parts]
        return sum(share * size for share, size in zip(known, sizes, strict=True)) / sum(sizes)
