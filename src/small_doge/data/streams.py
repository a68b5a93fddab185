"""Streams of documents that can be taken up where they stood: datasets of the Hub, fetched texts, a count of them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ..errors import UserError
from .documents import Columns, Document, Stream
from .files import TRAIN_EXTRA


class Plain:
    """Documents that a function gives, taken up by counting them; for what is read in a moment."""

    def __init__(self, read: Callable[[], Iterator[Document]], position: int = 0) -> None:
        self.read, self.count = read, position

    def __iter__(self) -> Iterator[Document]:
        for document in itertools.islice(self.read(), self.count, None):
            self.count += 1
            yield document

    def position(self) -> int:
        """Documents that lie behind."""
        return self.count

    def fraction(self) -> None:
        """Unknown: how many come is not said."""
        return None


class Counted:
    """A stream up to a number of documents; UserError at the end if there was none at all."""

    def __init__(self, stream: Stream, name: str, limit: int | None, count: int) -> None:
        self.stream, self.name, self.limit, self.count = stream, name, limit, count

    def __iter__(self) -> Iterator[Document]:
        left = None if self.limit is None else max(0, self.limit - self.count)
        for document in itertools.islice(self.stream, left):
            self.count += 1
            yield document
        if not self.count:
            raise UserError(f"corpus `{self.name}` is empty, expected at least one document")

    def position(self) -> list[Any]:
        """The place of the stream within, and documents that lie behind."""
        return [self.stream.position(), self.count]

    def fraction(self) -> float | None:
        """The share of the limit that lies behind; without one, what the stream within says."""
        return self.count / self.limit if self.limit else self.stream.fraction()


class DatasetStream:
    """A split of a dataset of the Hub, or of a folder of that shape, streamed; `datasets` itself knows the place."""

    def __init__(
        self, dataset: str, subset: str | None, split: str, columns: Columns, name: str, position: Any
    ) -> None:
        self.dataset, self.subset, self.split, self.columns, self.name = dataset, subset, split, columns, name
        self.state: Any
        self.number: int
        self.state, self.number = position or (None, 0)
        self.rows: Any = None

    def __iter__(self) -> Iterator[Document]:
        try:
            import datasets
        except ImportError:
            raise UserError(f"the dataset {self.dataset} needs the package datasets; {TRAIN_EXTRA}") from None
        place = f"{self.dataset}/{self.subset or 'default'}/{self.split}"
        try:
            rows = datasets.load_dataset(self.dataset, self.subset, split=self.split, streaming=True)
            if self.state is not None:
                rows.load_state_dict(self.state)
            self.rows = rows
            for row in rows:
                self.number += 1
                where = f"dataset {self.dataset}, split {self.split}, row {self.number},"
                yield self.columns.document(row, f"{place}:{self.number}", self.name, where)
        except (OSError, ValueError, RuntimeError, LookupError, datasets.exceptions.DatasetsError) as error:
            # Their errors run over many lines; the first says what is wrong.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"dataset {self.dataset} (subset {self.subset}, split {self.split}) cannot be read: {reason}"
            ) from error

    def position(self) -> list[Any]:
        """The state of `datasets`, and rows that lie behind."""
        return [self.state if self.rows is None else self.rows.state_dict(), self.number]

    def fraction(self) -> None:
        """Unknown: a streamed dataset does not say how long it is."""
        return None


class Fetched:
    """Documents whose text is a blob id, with the text that Software Heritage has under it, some fetched ahead.

    A blob that is not there leaves a document that is unfit for that reason. The order is that of the ids.

    Raises:
        UserError: while iterating, if `_HOPELESS` blobs in a row are not there.
    """

    _AHEAD, _HOPELESS = 128, 100

    def __init__(self, stream: Stream, fetch: Callable[[str], str | None] | None = None) -> None:
        self.stream, self.fetch = stream, fetch
        self.place = stream.position()
        self.missing = 0  # in a row

    def __iter__(self) -> Iterator[Document]:
        from . import software_heritage

        fetch = self.fetch or software_heritage.fetcher()
        waiting: deque[tuple[Document, Any, Future[str | None] | None]] = deque()
        threads = ThreadPoolExecutor(software_heritage.CONNECTIONS, thread_name_prefix="software-heritage")
        try:
            for document in self.stream:
                # The place right behind a row is asked for while the stream stands there.
                job = threads.submit(fetch, document.text) if document.unfit is None else None
                waiting.append((document, self.stream.position(), job))
                if len(waiting) >= self._AHEAD:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            threads.shutdown(cancel_futures=True)

    def _next(self, waiting: deque[tuple[Document, Any, Future[str | None] | None]]) -> Document:
        document, place, job = waiting.popleft()
        text = job.result() if job else None
        self.place = place
        if job is None:
            return replace(document, text="")
        self.missing = self.missing + 1 if text is None else 0
        if self.missing >= self._HOPELESS:
            raise UserError(
                f"{self.missing} blobs of {document.source} in a row are not in Software Heritage's bucket "
                f"(the last is {document.text!r}), expected git's blob ids, and a bucket that may be read"
            )
        return replace(document, text=text or "", unfit="blob missing" if text is None else None)

    def position(self) -> Any:
        """The place of the stream within, right behind the last document that was given, not the last one fetched."""
        return self.place

    def fraction(self) -> float | None:
        """What the stream within says, which is some documents ahead."""
        return self.stream.fraction()
