"""Local files of text: which ones a path stands for, and their rows one after another, from any place on.

Known are .txt and .md (a file is one text), .jsonl and .parquet, each also compressed with .gz, .xz or .bz2.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import UserError
from .documents import Columns, Document, field_of

OPENERS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_KINDS = (".txt", ".md", ".jsonl", ".parquet")
TRAIN_EXTRA = 'install it with `pip install "small-doge[train]"`'


def _kind(path: Path) -> str | None:
    """The suffix that says how to read a file, below one of compression; None for a file that is not text."""
    name = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    return name.suffix.lower() if name.suffix.lower() in _KINDS else None


@dataclass(frozen=True)
class Files:
    """The files that a path in a recipe stands for: itself, or all text files of the folder in the order of names."""

    name: str
    base: Path
    paths: tuple[Path, ...]
    sizes: tuple[int, ...]

    def facts(self) -> list[Any]:
        """What tells whether the files are those of an earlier run: their names and sizes."""
        names = (path.relative_to(self.base).as_posix() for path in self.paths)
        return [list(pair) for pair in zip(names, self.sizes, strict=True)]


def find_files(name: str) -> Files:
    """The text files at a path.

    Raises:
        UserError: if it does not exist, is a file of no known kind, or a folder without text files.
    """
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
    return Files(name, base, tuple(paths), tuple(path.stat().st_size for path in paths))


class FileStream:
    """The documents of files, from a place on; `position` is that place as [file, lines or rows read of it]."""

    def __init__(self, files: Files, columns: Columns, position: Any) -> None:
        self.files, self.columns = files, columns
        self.file: int
        self.item: int
        self.file, self.item = position or (0, 0)
        self.raw: IO[bytes] | None = None

    def __iter__(self) -> Iterator[Document]:
        for index in range(self.file, len(self.files.paths)):
            path = self.files.paths[index]
            skip = self.item if index == self.file else 0
            name = path.relative_to(self.files.base).as_posix()
            try:
                with open(path, "rb") as self.raw:
                    for number, where, row in _rows(path, self.raw, self.columns, skip):
                        self.file, self.item = index, number or 1
                        at = f":{number}" if number else ""
                        yield self.columns.document(row, f"{name}{at}", self.files.name, where)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise UserError(f"corpus file {path} cannot be read: {error}") from None
        self.file, self.item, self.raw = len(self.files.paths), 0, None

    def position(self) -> list[int]:
        """Files that lie behind, and rows of the next one that do."""
        return [self.file, self.item]

    def fraction(self) -> float:
        """The share of the files' bytes that lies behind."""
        done = sum(self.files.sizes[: self.file])
        if self.raw is not None and not self.raw.closed:
            done += self.raw.tell()
        return min(1.0, done / max(1, sum(self.files.sizes)))


def _rows(path: Path, raw: IO[bytes], columns: Columns, skip: int) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """(number from 1, words for its place, row) of each row after the first ``skip``; 0 for a file of one text."""
    kind, packed = _kind(path), OPENERS.get(path.suffix.lower())
    file = packed(raw) if packed else raw
    if kind == ".jsonl":
        return _jsonl(path, file, columns, skip)
    if kind == ".parquet":
        # A parquet file is read from its end; a compressed stream must be unpacked for that.
        return _parquet(path, io.BytesIO(file.read()) if packed else file, columns, skip)
    return _whole(path, file, columns, skip)


def _whole(path: Path, file: IO[bytes], columns: Columns, skip: int) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    if not skip:
        yield 0, f"corpus file {path}", {columns.text: _utf8(file.read(), path, 0).removeprefix("\ufeff")}


def _utf8(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"corpus file {path} is not UTF-8 text at byte {offset + error.start}") from None


def _jsonl(path: Path, file: IO[bytes], columns: Columns, skip: int) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    offset = 0
    for number, line in enumerate(file, start=1):
        offset += len(line)
        if number <= skip:
            continue
        where = f"corpus file {path}, line {number},"
        text = _utf8(line, path, offset - len(line)).removeprefix("\ufeff")
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            wanted = columns.names[0]
            raise UserError(f"{where} is a JSON {type(row).__name__}, expected an object with the field `{wanted}`")
        yield number, where, row


def _parquet(path: Path, source: Any, columns: Columns, skip: int) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow; {TRAIN_EXTRA}") from None
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(source)
        for name in columns.names:
            if name not in table.schema_arrow.names:
                field_of(dict.fromkeys(table.schema_arrow.names), name, f"corpus file {path}")
        groups: list[int] = []
        for group in range(table.num_row_groups):  # whole groups before the place are not read
            size = table.metadata.row_group(group).num_rows
            if not groups and number + size <= skip:
                number += size
            else:
                groups.append(group)
        for batch in table.iter_batches(batch_size=1024, row_groups=groups, columns=list(columns.names)):
            for row in batch.to_pylist():
                number += 1
                if number > skip:
                    yield number, f"corpus file {path}, row {number},", row
    except pyarrow.ArrowException as error:
        raise UserError(f"corpus file {path} is not parquet: {error}") from None
