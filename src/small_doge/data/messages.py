"""What conversations and preferences share: sources of rows, what a message list must be, shares of a mixture.

A source is named as in a recipe, by a string, a mapping or a list of these:

    data: chats.jsonl                                                 # .jsonl .json (also .gz .xz .bz2) .parquet
    data: ../shared/data/sft                                          # a folder: its files named after the split
    data: {dataset: org/name, subset: all, split: train}              # a dataset of the Hugging Face Hub
    data: [{path: a.jsonl, weight: 3, format: alpaca}, {dataset: org/name, weight: 1, max_rows: 10000}]

Rows are kept where Hugging Face `datasets` keeps them, and read again once a source or this code has changed.
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifacts
from ..errors import UserError
from ..recipe import nearest

if TYPE_CHECKING:
    from datasets import Dataset

Message = dict[str, str]
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""Roles as they are spelt in the wild, and ours."""

DROPPED, CUT = "dropped: ", "cut: "
"""How a reason begins: the row is gone, or a part of it is."""


class Unfit(Exception):
    """A row that cannot be trained on; the message says why, in words that are the same for all rows of the kind."""


# ---- what a message list must be ------------------------------------------------------------------------------------


def text_of(value: Any) -> str:
    """``value`` if it is text that UTF-8 can hold; Unfit otherwise."""
    if not isinstance(value, str):
        raise Unfit("a content that is not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise Unfit("a content that is not Unicode text") from None
    return value


def messages_of(value: Any) -> list[Message]:
    """A list of ``{"role", "content"}``, or of ShareGPT's ``{"from", "value"}``, as messages of our roles.

    Raises:
        Unfit: for anything else, an unknown role, and a content that is blank or not text. A blank system message is
            let through: many sets have one in every row.
    """
    if not isinstance(value, list) or not value:
        raise Unfit("no list of messages")
    messages = []
    for item in value:
        if not isinstance(item, Mapping):
            raise Unfit("a message that is not a mapping")
        # Parquet gives every message all the columns, those it does not use as None.
        role, content = item.get("role") or item.get("from"), item.get("content")
        if content is None:
            content = item.get("value")
        if not isinstance(role, str) or role not in ROLES:
            raise Unfit("a role other than system, user and assistant")
        if role == "system" and content is None:
            content = ""
        text = text_of(content)
        if not text.strip() and role != "system":
            raise Unfit("an empty message")
        messages.append({"role": ROLES[role], "content": text})
    return messages


def in_turn(messages: list[Message]) -> list[Message]:
    """The messages, checked to be user and assistant by turns after at most one system message, blank ones left out.

    Raises:
        Unfit: if they are not.
    """
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if any(turn["role"] == "system" for turn in turns):
        raise Unfit("a system message that is not the first")
    if turns and turns[0]["role"] == "assistant":
        raise Unfit("it begins with the assistant")
    for one, other in itertools.pairwise(turns):
        if one["role"] == other["role"]:
            raise Unfit(f"two messages of the {one['role']} in a row")
    return messages


# ---- sources --------------------------------------------------------------------------------------------------------

_FIELDS = {
    "path": ("path", "split", "format", "weight", "max_rows"),
    "dataset": ("dataset", "subset", "split", "format", "weight", "max_rows"),
    "identity": ("identity", "repeat", "weight", "max_rows"),
}
_TRAIN_EXTRA = 'install it with `pip install "small-doge[train]"`'
_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_KINDS = (".jsonl", ".json", ".parquet")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Reader:
    """How rows of one kind of data become ours.

    ``shape_of`` names the shape from the columns there are, None if unknown; ``arrange`` makes of a row of that shape
    a list of messages for each of ``columns``, beside its ``notes`` if there are any, or raises Unfit; ``code`` is the
    file in which they stand.
    """

    what: str
    shapes: tuple[str, ...]
    columns: tuple[str, ...]
    shape_of: Callable[[Sequence[str]], str | None]
    arrange: Callable[[Mapping[str, Any], str], dict[str, Any]]
    code: str

    def features(self) -> Any:
        """The ``datasets.Features`` of our rows: lists of messages, where the row comes from, and notes."""
        from datasets import Features, List, Value

        message = {"role": Value("string"), "content": Value("string")}
        lists = {column: List(message) for column in self.columns}
        return Features({**lists, "source": Value("string"), "notes": List(Value("string"))})


def require_datasets() -> Any:
    """Hugging Face `datasets`; UserError where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"reading data to train an assistant on needs the package datasets; {_TRAIN_EXTRA}") from None
    return datasets


def read_entries(specs: Any, kinds: Sequence[str] = ("path", "dataset")) -> list[dict[str, Any]]:
    """The entries of a recipe's ``data:`` as mappings with known fields and checked values; UserError for others."""
    items = list(specs) if isinstance(specs, (list, tuple)) else [specs]
    if not items:
        raise UserError("the data is an empty list, expected at least one entry")
    entries = [_entry(item, kinds) for item in items]
    if any(entry.get("weight") is None for entry in entries) and any(entry.get("weight") for entry in entries):
        lacking = next(entry for entry in entries if entry.get("weight") is None)
        raise UserError(f"data entry {lacking} lacks a `weight`, expected one for every entry or for none")
    return entries


def _entry(item: Any, kinds: Sequence[str]) -> dict[str, Any]:
    if isinstance(item, (str, Path)):
        if Path(item).expanduser().exists():
            return {"path": str(item)}
        raise UserError(
            f"data `{item}` is no file or folder that exists; a Hugging Face dataset is written {{dataset: org/name}}"
        )
    if not isinstance(item, Mapping):
        raise UserError(f"data entry {item!r} is a {type(item).__name__}, expected text or a mapping")
    entry = dict(item)
    kind = next((kind for kind in kinds if kind in entry), None)
    known = _FIELDS[kind] if kind else sorted({name for kind in kinds for name in _FIELDS[kind]})
    for name in entry:
        if name not in known:
            raise UserError(f"data entry {entry} has an unknown field `{name}`{nearest(str(name), known)}")
    if kind is None:
        raise UserError(f"data entry {entry} names no source, expected {' or '.join(f'`{kind}`' for kind in kinds)}")
    for name in (kind, "split", "subset", "format"):
        if name in entry and not isinstance(entry[name], (str, Path)):
            raise UserError(f"data entry {entry}: `{name}` is {entry[name]!r}, expected text")
    weight = entry.get("weight")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0):
        raise UserError(f"data entry {entry}: `weight` is {weight!r}, expected a number above 0")
    for name in ("max_rows", "repeat"):
        value = entry.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"data entry {entry}: `{name}` is {value!r}, expected a whole number above 0")
    return entry


def read_source(entry: dict[str, Any], split: str, reader: Reader) -> tuple[Dataset, dict[str, int]]:
    """The rows of one source in the reader's form, and why others were dropped or cut.

    Raises:
        UserError: if the source cannot be read, is of no known shape, or has no row that is fit.
    """
    datasets = require_datasets()
    split = str(entry.get("split") or split)
    name = str(entry.get("path") or entry.get("dataset"))
    settings = {"source": name, "max_rows": entry.get("max_rows"), "code": artifacts.sha256(__file__, reader.code)}
    if entry.get("format") is not None and entry["format"] not in reader.shapes:
        raise UserError(
            f"data {name} has the format `{entry['format']}`{nearest(entry['format'], reader.shapes)}, "
            f"expected one of {', '.join(reader.shapes)}"
        )
    try:
        if "path" in entry:
            files = _files(name, split)
            if not files[0].name.lower().endswith(".parquet"):
                shape = _shape(name, list(next(_rows(files), {})), entry, reader)
                stamps = tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
                given = {"files": stamps, "shape": shape, "reader": reader, **settings}
                features = reader.features()
                return settle(datasets.Dataset.from_generator(_arranged, features=features, gen_kwargs=given), name)
            raw = datasets.concatenate_datasets([datasets.Dataset.from_parquet(str(file)) for file in files])
        else:
            raw = datasets.load_dataset(name, entry.get("subset"), split=split)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # datasets wraps what the generator raised
        if isinstance(cause, UserError):
            raise cause from None
        # Their errors run over many lines; the first says what is wrong.
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"data {name} (split {split}) cannot be read: {reason}") from error
    shape = _shape(name, raw.column_names, entry, reader)
    if entry.get("max_rows"):
        raw = raw.select(range(min(entry["max_rows"], len(raw))))
    given = {"shape": shape, "reader": reader, "source": name, "code": settings["code"]}
    arranged = raw.map(
        _arrange,
        fn_kwargs=given,
        remove_columns=raw.column_names,
        features=reader.features(),
        desc=f"Reading {name}",
    )
    return settle(arranged, name)


def _shape(name: str, columns: Sequence[str], entry: Mapping[str, Any], reader: Reader) -> str:
    shape = entry.get("format") or reader.shape_of(columns)
    if shape is None:
        raise UserError(
            f"data {name} has the columns {', '.join(columns) or 'of no row'}, which are no {reader.what} known here; "
            f"name the format: {', '.join(reader.shapes)}"
        )
    return str(shape)


def _arranged(
    files: Any, shape: str, reader: Reader, source: str, max_rows: int | None, code: str
) -> Iterator[dict[str, Any]]:
    # `code`, sizes and times are there to be part of the name that datasets keeps the rows under.
    for number, row in enumerate(_rows([Path(file) for file, _, _ in files])):
        if max_rows is not None and number == max_rows:
            return
        yield _arrange(row, shape, reader, source, code)


def _arrange(row: Mapping[str, Any], shape: str, reader: Reader, source: str, code: str) -> dict[str, Any]:
    try:
        arranged = {"notes": [], **reader.arrange(row, shape)}
    except Unfit as reason:
        arranged = {"notes": [DROPPED + str(reason)], **{column: [] for column in reader.columns}}
    try:
        return {**arranged, "source": text_of(row.get("source"))}  # smoltalk's own column, say
    except Unfit:
        return {**arranged, "source": source}


def settle(dataset: Dataset, name: str) -> tuple[Dataset, dict[str, int]]:
    """``dataset`` without its column ``notes`` and the rows that it says are dropped, and how often each note stands.

    Raises:
        UserError: if no row is left.
    """
    notes = dataset["notes"][:]
    counts = Counter(note for row in notes for note in row)
    kept = [i for i, row in enumerate(notes) if not any(note.startswith(DROPPED) for note in row)]
    if not kept:
        reasons = ", ".join(f"{note.removeprefix(DROPPED)} ({count:,})" for note, count in counts.most_common())
        raise UserError(f"data {name} has no row to train on, of {len(notes):,}: {reasons or 'it is empty'}")
    dataset = dataset.remove_columns("notes")
    return (dataset if len(kept) == len(notes) else dataset.select(kept)), dict(counts)


def _files(name: str, split: str) -> list[Path]:
    """The files of ``split``: a file stands for itself, a folder for its files named after the split."""
    root = Path(name).expanduser()
    known = " ".join(_KINDS) + " (JSON also with .gz .xz .bz2)"
    if not root.exists():
        raise UserError(f"data path {name} does not exist")
    if root.is_file():
        if _kind(root) is None:
            raise UserError(f"data file {name} is of no known kind, expected {known}")
        return [root]
    files = sorted(f for f in root.rglob("*") if f.is_file() and _kind(f) and not f.name.startswith("."))
    if not files:
        raise UserError(f"data folder {name} holds no files to read, expected {known}")

    def named(file: Path, split: str) -> bool:
        return file.name.startswith((f"{split}.", f"{split}-")) or split in file.relative_to(root).parts[:-1]

    found = [file for file in files if named(file, split)]
    if not found and split == "train" and not any(named(file, other) for file in files for other in _SPLITS):
        found = files  # as on the Hub: where no name speaks of splits, all is for training
    if not found:
        there = ", ".join(file.relative_to(root).as_posix() for file in files[:5])
        raise UserError(f"data folder {name} has no files of the split `{split}`, only {there}")
    if len({_kind(file) == ".parquet" for file in found}) > 1:
        raise UserError(f"data folder {name} has JSON and parquet files of the split `{split}`, expected one kind")
    return found


def _kind(path: Path) -> str | None:
    packed = path.suffix.lower() in _OPENERS
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    return suffix if suffix in _KINDS and not (packed and suffix == ".parquet") else None


def _rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The objects of JSON files: one a line, or one list of them."""
    for path in files:
        try:
            with _OPENERS.get(path.suffix.lower(), lambda p: open(p, "rb"))(path) as file:
                for number, line in enumerate(file, start=1):
                    text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                    if number == 1 and text.lstrip().startswith(b"["):
                        text += file.read()
                    elif not text.strip():
                        continue
                    row = json.loads(text)
                    for item in row if isinstance(row, list) else [row]:
                        if not isinstance(item, dict):
                            raise UserError(
                                f"data file {path}, line {number}, holds a {type(item).__name__}, expected an object"
                            )
                        yield item
        except ValueError as error:  # UnicodeDecodeError is one too
            raise UserError(f"data file {path}, line {number}, is not JSON: {error}") from None
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"data file {path} cannot be read: {error}") from None


# ---- mixtures -------------------------------------------------------------------------------------------------------


def mix(
    parts: Sequence[Dataset], weights: Sequence[float | None], counts: Sequence[dict[str, int]], seed: int
) -> tuple[Dataset, dict[str, int]]:
    """The parts as one dataset, and their counts added up.

    Without weights all rows, part after part. With weights as many rows as there can be with each part in its share,
    none twice: a draw from each part, then shuffled, both by ``seed``. `datasets.interleave_datasets` draws the part
    anew for every row instead, so that shares are met on average only.
    """
    datasets = require_datasets()
    total = Counter[str]()
    for count in counts:
        total.update(count)
    if weights[0] is None:
        return datasets.concatenate_datasets(list(parts)), dict(total)
    shares = [float(weight or 0) for weight in weights]
    unit = min(len(part) / share for part, share in zip(parts, shares, strict=True))
    drawn = []
    for part, share in zip(parts, shares, strict=True):
        # At least one row: a source that is named has its say. The least floats can lose does not cost a row.
        size = max(1, int(unit * share + 1e-6))
        drawn.append(part.shuffle(seed=seed).select(range(size)))
        total[DROPPED + "beyond the weight of its source"] += len(part) - size
    return datasets.concatenate_datasets(drawn).shuffle(seed=seed), dict(+total)
