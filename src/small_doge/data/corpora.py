"""Corpora: where text comes from, one `Document` after another, always in the same order.

A corpus is named by a string, a mapping or a list of these, as it stands in a recipe:

    corpus: stdlib                                                   # the running Python's own standard library
    corpus: texts/                                                   # .txt .md .jsonl .parquet, also .gz .xz .bz2
    corpus: {dataset: org/name, split: train, text_field: text}      # Hugging Face datasets, streamed
    corpus: [{path: a.jsonl, weight: 3}, {name: stdlib, weight: 1}]  # three bytes of the first to one of the second
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from ..errors import UserError
from ..recipe import nearest
from . import stdlib


@dataclass(frozen=True)
class Document:
    """One text of a corpus; ``id`` is the same on every machine, ``source`` names the corpus it came from."""

    id: str
    text: str
    source: str


@dataclass(frozen=True)
class Corpus:
    """An iterable of documents that starts afresh, and in the same order, each time it is iterated."""

    name: str
    read: Callable[[], Iterator[Document]] = field(repr=False)

    def __iter__(self) -> Iterator[Document]:
        return self.read()


_FIELDS = {
    "name": ("name", "parts", "weight", "max_documents"),
    "path": ("path", "text_field", "weight", "max_documents"),
    "dataset": ("dataset", "subset", "split", "text_field", "weight", "max_documents"),
}
_TRAIN_EXTRA = 'install it with `pip install "small-doge[train]"`'


def open_corpus(spec: Any) -> Corpus:
    """Open the corpus that ``spec`` names: a string, a mapping, or a list of them.

    An entry's ``max_documents`` takes only so many of its documents. Entries of a list without ``weight`` follow one
    another. With weights (then all must have one) they are mixed by UTF-8 bytes: the next document always comes
    from the entry that is furthest behind its share, and the mix ends when that entry has no more, so that the
    proportions hold from first to last.

    Raises:
        UserError: here for a spec that is wrong or names nothing that is there; while iterating for content that
            cannot be read as text, naming the file and the line, row or byte.
    """
    if not isinstance(spec, (list, tuple)):
        return _open_entry(_entry(spec))
    if not spec:
        raise UserError("the corpus is an empty list, expected at least one entry")
    entries = [_entry(item) for item in spec]
    parts = [_open_entry(entry) for entry in entries]
    name = " + ".join(part.name for part in parts)
    weights = [entry.get("weight") for entry in entries]
    if all(weight is None for weight in weights):
        return Corpus(name, lambda: itertools.chain.from_iterable(parts))
    for part, weight in zip(parts, weights, strict=True):
        if weight is None:
            raise UserError(f"corpus entry `{part.name}` lacks a `weight`, expected one for every entry or for none")
    return Corpus(name, lambda: _interleave(parts, [float(weight) for weight in weights if weight is not None]))


def _entry(item: Any) -> dict[str, Any]:
    """One entry as a mapping with known fields and checked values."""
    if isinstance(item, (str, Path)):
        item = str(item)
        if item == "stdlib":
            return {"name": "stdlib"}
        if Path(item).expanduser().exists():
            return {"path": item}
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
    for name in (kind, "text_field", "split", "subset"):
        if item.get(name) is not None and not isinstance(item[name], (str, Path)):
            raise UserError(f"corpus entry {dict(item)}: `{name}` is {item[name]!r}, expected text")
    weight, limit = item.get("weight"), item.get("max_documents")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0):
        raise UserError(f"corpus entry {dict(item)}: `weight` is {weight!r}, expected a number above 0")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise UserError(f"corpus entry {dict(item)}: `max_documents` is {limit!r}, expected a whole number above 0")
    return dict(item)


def _open_entry(entry: dict[str, Any]) -> Corpus:
    if "name" in entry:
        corpus = _open_stdlib(entry)
    elif "path" in entry:
        corpus = _open_path(str(entry["path"]), entry.get("text_field") or "text")
    else:
        corpus = _open_dataset(entry)
    return Corpus(corpus.name, lambda: _some(corpus, entry.get("max_documents")))


def _open_stdlib(entry: dict[str, Any]) -> Corpus:
    if entry["name"] != "stdlib":
        raise UserError(f"there is no built-in corpus `{entry['name']}`, expected `stdlib`")
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

    return Corpus("stdlib", read)


def _some(corpus: Corpus, limit: int | None) -> Iterator[Document]:
    empty = True
    for document in itertools.islice(corpus, limit):
        empty = False
        yield document
    if empty:
        raise UserError(f"corpus `{corpus.name}` is empty, expected at least one document")


def _interleave(parts: list[Corpus], weights: list[float]) -> Iterator[Document]:
    streams = [iter(part) for part in parts]
    emitted = [0] * len(parts)  # UTF-8 bytes
    while True:
        behind = min(range(len(parts)), key=lambda i: emitted[i] / weights[i])
        document = next(streams[behind], None)
        if document is None:
            return
        emitted[behind] += len(document.text.encode())
        yield document


# ---- files and folders ---------------------------------------------------------------------------------------------

_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_KINDS = (".txt", ".md", ".jsonl", ".parquet")


def _kind(path: Path) -> str | None:
    """The suffix that says how to read a file, below one of compression; None for a file that is not text."""
    name = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    return name.suffix.lower() if name.suffix.lower() in _KINDS else None


def _open_path(name: str, text_field: str) -> Corpus:
    root = Path(name).expanduser()
    known = " ".join(_KINDS) + " (also with .gz .xz .bz2)"
    if not root.exists():
        raise UserError(f"corpus path {name} does not exist")
    if root.is_file():
        paths = [root]
        if _kind(root) is None:
            raise UserError(f"corpus file {name} is of no known kind, expected {known}")
    else:
        inside = (path.relative_to(root) for path in root.rglob("*") if path.is_file() and _kind(path))
        visible = (path for path in inside if not any(part.startswith(".") for part in path.parts))
        paths = [root / path for path in sorted(visible, key=lambda path: path.as_posix())]
        if not paths:
            raise UserError(f"corpus folder {name} holds no text files, expected {known}")
    base = root if root.is_dir() else root.parent
    return Corpus(
        name,
        lambda: (
            Document(f"{path.relative_to(base).as_posix()}{at}", text, name)
            for path in paths
            for at, text in _read_file(path, text_field)
        ),
    )


def _read_file(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    """The texts of one file, each with what to append to the file's name to tell it apart."""
    kind = _kind(path)
    try:
        with _OPENERS.get(path.suffix.lower(), lambda p: open(p, "rb"))(path) as file:
            if kind == ".jsonl":
                yield from _read_jsonl(path, file, text_field)
            elif kind == ".parquet":
                yield from _read_parquet(path, file, text_field)
            else:
                yield "", _utf8(file.read(), path, 0).removeprefix("\ufeff")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"corpus file {path} cannot be read: {error}") from None


def _utf8(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"corpus file {path} is not UTF-8 text at byte {offset + error.start}") from None


def _read_jsonl(path: Path, file: IO[bytes], text_field: str) -> Iterator[tuple[str, str]]:
    offset = 0
    for number, line in enumerate(file, start=1):
        where = f"corpus file {path}, line {number},"
        text = _utf8(line, path, offset).removeprefix("\ufeff")
        offset += len(line)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is a JSON {type(row).__name__}, expected an object with the field `{text_field}`")
        yield f":{number}", _field(row, text_field, where)


def _read_parquet(path: Path, file: IO[bytes], text_field: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow; {_TRAIN_EXTRA}") from None
    # A parquet file is read from its end; a compressed stream must be unpacked for that.
    source = io.BytesIO(file.read()) if path.suffix.lower() in _OPENERS else file
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(source)
        if text_field not in table.schema_arrow.names:
            _field(dict.fromkeys(table.schema_arrow.names), text_field, f"corpus file {path}")
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for row in batch.to_pylist():
                number += 1
                yield f":{number}", _field(row, text_field, f"corpus file {path}, row {number},")
    except pyarrow.ArrowException as error:
        raise UserError(f"corpus file {path} is not parquet: {error}") from None


def _field(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        fields = ", ".join(f"`{key}`" for key in row) or "none"
        raise UserError(f"{where} lacks the field `{name}`; the fields there are {fields}")
    text = row[name]
    if not isinstance(text, str):
        raise UserError(f"{where} has a {type(text).__name__} in the field `{name}`, expected text")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, and UTF-8 cannot
        raise UserError(f"{where} has a lone surrogate in the field `{name}`, expected Unicode text") from None
    return text


def _open_dataset(entry: dict[str, Any]) -> Corpus:
    name, subset = str(entry["dataset"]), entry.get("subset")
    split, text_field = entry.get("split") or "train", entry.get("text_field") or "text"

    def read() -> Iterator[Document]:
        try:
            import datasets
        except ImportError:
            raise UserError(f"the dataset {name} needs the package datasets; {_TRAIN_EXTRA}") from None
        try:
            for number, row in enumerate(datasets.load_dataset(name, subset, split=split, streaming=True), start=1):
                text = _field(row, text_field, f"dataset {name}, split {split}, row {number},")
                yield Document(f"{name}/{subset or 'default'}/{split}:{number}", text, name)
        except (OSError, ValueError, RuntimeError, LookupError, datasets.exceptions.DatasetsError) as error:
            # Their errors run over many lines; the first says what is wrong.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"dataset {name} (subset {subset}, split {split}) cannot be read: {reason}") from error

    return Corpus(name, read)


# ---- what every reader of a corpus shares --------------------------------------------------------------------------


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
            digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
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
