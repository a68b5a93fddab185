"""Corpora: where text comes from, one `Document` after another, always in the same order.

A corpus is named by a string, a mapping or a list of these, as it stands in a recipe:

    corpus: stdlib                                                   # the running Python's own standard library
    corpus: texts/                                                   # .txt .md .jsonl .parquet, also .gz .xz .bz2
    corpus: {dataset: org/name, split: train, text_field: text}      # Hugging Face datasets, streamed
    corpus: {name: python-edu}                                       # a part of a published corpus, from the Hub
    corpus: {name: python-edu, path: rows/}                          # the same columns from files
    corpus: [{path: a.jsonl, weight: 3}, {name: stdlib, weight: 1}]  # three of the first to one of the second

What a row's columns are: ``text_field``; with ``prompt_field`` that text is the reply to a prompt, and both become a
chat turn; with ``blob_field`` the text lies in Software Heritage's bucket under that id; with ``min_score`` rows whose
``score_field`` is lower are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipe import nearest
from . import stdlib
from .documents import Columns, Document, Stream, split_of, unique
from .files import FileStream, find_files
from .streams import Counted, DatasetStream, Fetched, Plain

__all__ = ["Corpus", "Document", "open_corpus", "split_of", "unique"]


@dataclass(frozen=True)
class Corpus:
    """An iterable of documents that starts afresh, and in the same order, each time it is iterated.

    A mix or a chain has ``parts``, in a mix each with its ``weight``; a part has ``open``, which begins at a position
    that an earlier stream of it gave (None: at the start), and ``facts``, what is known of its files beforehand.
    """

    name: str
    open: Callable[[Any], Stream] = field(repr=False)
    parts: tuple[Corpus, ...] = ()
    weight: float | None = None
    facts: Any = None

    def __iter__(self) -> Iterator[Document]:
        """The documents, a mix by UTF-8 bytes; rows that are unfit are left out."""
        return (document for document in self.open(None) if document.unfit is None)


_ROW = ("text_field", "prompt_field", "blob_field", "score_field", "min_score")
_COMMON = ("weight", "max_documents")
_FIELDS = {
    "name": ("name", "parts", "path", "dataset", "subset", "split", *_ROW, *_COMMON),
    "path": ("path", *_ROW, *_COMMON),
    "dataset": ("dataset", "subset", "split", *_ROW, *_COMMON),
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "fineweb-edu-dedup": {"dataset": "HuggingFaceTB/smollm-corpus", "subset": "fineweb-edu-dedup"},
    "cosmopedia-v2": {
        "dataset": "HuggingFaceTB/smollm-corpus",
        "subset": "cosmopedia-v2",
        "prompt_field": "prompt",
    },
    "python-edu": {"dataset": "HuggingFaceTB/smollm-corpus", "subset": "python-edu", "blob_field": "blob_id"},
    "open-web-math": {"dataset": "open-web-math/open-web-math"},
    "finemath-4plus": {"dataset": "HuggingFaceTB/finemath", "subset": "finemath-4plus"},
}
"""Parts of published corpora by name: where they lie on the Hub, and what their columns are."""


def open_corpus(spec: Any) -> Corpus:
    """Open the corpus that ``spec`` names: a string, a mapping, or a list of them.

    An entry's ``max_documents`` takes only so many of its documents. Entries of a list without ``weight`` follow one
    another. With weights (then all must have one) they are mixed, here by UTF-8 bytes and in `doge prepare` by tokens:
    the next document always comes from the entry that is furthest behind its share, and the mix ends when that entry
    has no more, so that the proportions hold from first to last.

    Raises:
        UserError: here for a spec that is wrong or names nothing that is there; while iterating for content that
            cannot be read as text, naming the file and the line, row or byte.
    """
    if not isinstance(spec, (list, tuple)):
        return _open_entry(_entry(spec))
    if not spec:
        raise UserError("the corpus is an empty list, expected at least one entry")
    parts = tuple(_open_entry(_entry(item)) for item in spec)
    name = " + ".join(part.name for part in parts)
    if all(part.weight is None for part in parts):
        return Corpus(name, lambda _: Plain(lambda: itertools.chain.from_iterable(parts)), parts)
    for part in parts:
        if part.weight is None:
            raise UserError(f"corpus entry `{part.name}` lacks a `weight`, expected one for every entry or for none")
    return Corpus(name, lambda _: Plain(lambda: _interleave(parts)), parts)


def _entry(item: Any) -> dict[str, Any]:
    """One entry as a mapping with known fields and checked values."""
    if isinstance(item, (str, Path)):
        item = str(item)
        if item == "stdlib":
            return {"name": "stdlib"}
        if Path(item).expanduser().exists():
            return {"path": item}
        if item in PUBLISHED:
            return _entry({"name": item})
        raise UserError(
            f"corpus `{item}` is neither `stdlib` nor a file or folder that exists; "
            "a Hugging Face dataset is written {dataset: org/name}"
        )
    if not isinstance(item, Mapping):
        raise UserError(f"corpus entry {item!r} is a {type(item).__name__}, expected text or a mapping")
    kind = next((kind for kind in _FIELDS if kind in item), None)
    known = _FIELDS[kind] if kind else sorted({name for names in _FIELDS.values() for name in names})
    for name in item:
        if name not in known:
            raise UserError(f"corpus entry {dict(item)} has an unknown field `{name}`{nearest(str(name), known)}")
    if kind is None:
        raise UserError(f"corpus entry {dict(item)} names no source, expected `name`, `path` or `dataset`")
    _check_values(item, kind)
    if item.get("name") in PUBLISHED:
        # Local files, or a copy on the Hub under another name, take the place of the published one.
        elsewhere = ("dataset", "subset") if "path" in item or "dataset" in item else ()
        published = {k: v for k, v in PUBLISHED[item["name"]].items() if k not in elsewhere}
        return {**published, **item}
    if kind == "name" and item["name"] != "stdlib":
        names = ("stdlib", *PUBLISHED)
        raise UserError(
            f"there is no built-in corpus `{item['name']}`{nearest(str(item['name']), names)}, "
            f"expected {', '.join(names)}"
        )
    return dict(item)


def _check_values(item: Mapping[str, Any], kind: str) -> None:
    for name in (kind, "path", "dataset", "split", "subset", *_ROW[:-1]):
        if item.get(name) is not None and not isinstance(item[name], (str, Path)):
            raise UserError(f"corpus entry {dict(item)}: `{name}` is {item[name]!r}, expected text")
    weight, limit, score = item.get("weight"), item.get("max_documents"), item.get("min_score")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0):
        raise UserError(f"corpus entry {dict(item)}: `weight` is {weight!r}, expected a number above 0")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise UserError(f"corpus entry {dict(item)}: `max_documents` is {limit!r}, expected a whole number above 0")
    if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float))):
        raise UserError(f"corpus entry {dict(item)}: `min_score` is {score!r}, expected a number")
    if item.get("score_field") and score is None:
        raise UserError(f"corpus entry {dict(item)} has a `score_field` and no `min_score`, expected both")


def _open_entry(entry: dict[str, Any]) -> Corpus:
    limit = entry.get("max_documents")
    weight = None if entry.get("weight") is None else float(entry["weight"])
    columns = Columns(
        text=entry.get("text_field") or "text",
        prompt=entry.get("prompt_field"),
        blob=entry.get("blob_field"),
        score=None if entry.get("min_score") is None else entry.get("score_field") or "score",
        min_score=float(entry.get("min_score") or 0),
    )
    facts: Any = None
    if "path" in entry:
        name = str(entry.get("name") or entry["path"])
        files = replace(find_files(str(entry["path"])), name=name)
        facts = files.facts()

        def rows(position: Any) -> Stream:
            return FileStream(files, columns, position)

    elif "dataset" in entry:
        dataset, subset, split = str(entry["dataset"]), entry.get("subset"), entry.get("split") or "train"
        name = entry.get("name") or dataset

        def rows(position: Any) -> Stream:
            return DatasetStream(dataset, subset, split, columns, name, position)

    else:
        name, read = "stdlib", _stdlib(entry)

        def rows(position: Any) -> Stream:
            return Plain(read, position or 0)

    def open_at(position: Any) -> Stream:
        inner, count = position or (None, 0)
        stream = Fetched(rows(inner)) if columns.blob else rows(inner)
        return Counted(stream, name, limit, count)

    return Corpus(name, open_at, weight=weight, facts=facts)


def _stdlib(entry: dict[str, Any]) -> Callable[[], Iterator[Document]]:
    parts = entry.get("parts") or list(stdlib.PARTS)
    for part in parts if isinstance(parts, list) else [parts]:
        if part not in stdlib.PARTS:
            known = ", ".join(stdlib.PARTS)
            raise UserError(
                f"the stdlib corpus has no part `{part}`{nearest(str(part), stdlib.PARTS)}, expected {known}"
            )
    root = stdlib.require_folder()

    def read() -> Iterator[Document]:
        for part in stdlib.PARTS:
            if part in parts:
                for name, text in stdlib.read(part, root):
                    yield Document(name, text, f"stdlib/{part}")

    return read


def _interleave(parts: Sequence[Corpus]) -> Iterator[Document]:
    streams = [iter(part) for part in parts]
    weights = [part.weight or 1.0 for part in parts]
    emitted = [0] * len(parts)  # UTF-8 bytes
    while True:
        behind = min(range(len(parts)), key=lambda i: emitted[i] / weights[i])
        document = next(streams[behind], None)
        if document is None:
            return
        emitted[behind] += len(document.text.encode())
        yield document
