"""Documents: one text of a corpus, how the columns of a row become it, and what every reader of a corpus shares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..errors import UserError


@dataclass(frozen=True)
class Document:
    """One text of a corpus; ``id`` is the same on every machine, ``source`` names the corpus it came from.

    With a ``prompt`` the text is the reply to it, and both together are encoded as a chat turn. ``unfit`` says why a
    row is not to be used, in words that are the same for all rows of the kind.
    """

    id: str
    text: str
    source: str
    prompt: str | None = None
    unfit: str | None = None


class Stream(Protocol):
    """One pass over documents that can be taken up again where another pass stood."""

    def __iter__(self) -> Iterator[Document]: ...

    def position(self) -> Any:
        """Where the next document begins, as JSON can hold it."""

    def fraction(self) -> float | None:
        """The share that lies behind; None if unknown."""


@dataclass(frozen=True)
class Columns:
    """What the columns of a row are: its text, and maybe a prompt before it or a score that must be high enough.

    ``blob`` is the column with the blob id in whose place `software_heritage` sets the text.
    """

    text: str = "text"
    prompt: str | None = None
    blob: str | None = None
    score: str | None = None
    min_score: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are read, the one with the text first."""
        return tuple(name for name in (self.blob or self.text, self.prompt, self.score) if name)

    def document(self, row: Mapping[str, Any], id: str, source: str, where: str) -> Document:
        """The document of a row; UserError naming ``where`` if a column is missing or holds something else."""
        unfit = None
        if self.score is not None:
            score = _present(row, self.score, where)
            if isinstance(score, bool) or not isinstance(score, (int, float)):
                raise UserError(f"{where} has a {type(score).__name__} in the field `{self.score}`, expected a number")
            unfit = f"{self.score} below {self.min_score:g}" if not score >= self.min_score else None
        prompt = field_of(row, self.prompt, where) if self.prompt else None
        return Document(id, field_of(row, self.blob or self.text, where), source, prompt, unfit)


def _present(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        fields = ", ".join(f"`{key}`" for key in row) or "none"
        raise UserError(f"{where} lacks the field `{name}`; the fields there are {fields}")
    return row[name]


def field_of(row: Mapping[str, Any], name: str, where: str) -> str:
    """The text in a field of a row; UserError naming ``where`` if there is none."""
    text = _present(row, name, where)
    if not isinstance(text, str):
        raise UserError(f"{where} has a {type(text).__name__} in the field `{name}`, expected text")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, and UTF-8 cannot
        raise UserError(f"{where} has a lone surrogate in the field `{name}`, expected Unicode text") from None
    return text


def digest_of(document: Document) -> bytes:
    """16 bytes by which two documents are told to be the same."""
    prompt = b"" if document.prompt is None else document.prompt.encode() + b"\0"
    return hashlib.blake2b(prompt + document.text.encode(), digest_size=16).digest()


class unique:
    """Documents without blank texts and without exact duplicates of an earlier text.

    Keeps a 16-byte digest of every text in memory (some 100 MB a million documents). ``duplicates`` and ``blank``
    count what the present iteration has left out.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        self.documents = documents
        self.duplicates = 0
        self.blank = 0

    def __iter__(self) -> Iterator[Document]:
        seen: set[bytes] = set()
        self.duplicates = self.blank = 0
        for document in self.documents:
            if not document.text.strip():
                self.blank += 1
                continue
            digest = digest_of(document)
            if digest in seen:
                self.duplicates += 1
                continue
            seen.add(digest)
            yield document


def split_of(document: Document, validation_fraction: float) -> Literal["train", "validation"]:
    """The side a document falls on, from a hash of its text alone.

    The same text falls on the same side in every corpus, on every machine; raising the fraction only moves documents
    from train to validation.
    """
    digest = hashlib.blake2b(document.text.encode(), digest_size=8, person=b"doge.split").digest()
    return "validation" if int.from_bytes(digest, "big") < validation_fraction * 2**64 else "train"
