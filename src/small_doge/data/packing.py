"""Packed tokens: a corpus as rows of one length on disk, and the dataset that reads them back by memory map.

All documents of a split stand one behind the other, each as begin token, text, end token, and the stream is cut into
rows of ``row_length`` tokens wherever the cut falls; nothing is lost but the padding at the end of the last row.

    manifest.json              what is here, with counts and checksums
    {split}.tokens.bin         (rows · row_length,) little-endian uint16, or uint32 above 65,536 entries
    {split}.documents.bin      (documents + 1,) little-endian int64: where each document starts, and the end of the last
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import artifacts
from ..errors import UserError
from ..recipe import plain
from .corpora import Corpus, Document, open_corpus, split_of, unique
from .tokenizer import encode_text, load_tokenizer, tokenizer_file

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerFast

    _Base = Dataset[dict[str, torch.Tensor]]
else:
    # A DataLoader asks a map-style dataset for __len__ and __getitem__ only; importing torch to inherit them would
    # make every command that merely reads the recipe's fields two seconds slower.
    _Base = object

FORMAT = 1
SPLITS = ("train", "validation")
IGNORED = -100
"""The label that the loss leaves out."""

_STAGE = "prepare"
_BATCH_BYTES = 16 << 20
_OFFSETS = np.dtype("<i8")


@dataclass
class PrepareRecipe:
    """Settings of `doge prepare`."""

    tokenizer: str = field(metadata={"help": "folder of the tokenizer"})
    output_dir: str = field(metadata={"help": "folder to write the packed tokens to"})
    corpus: Any = field(default="stdlib", metadata={"help": "`stdlib`, a path, a mapping or a list of these"})
    row_length: int = field(default=2048, metadata={"help": "tokens in a row, at least 8"})
    validation_fraction: float = field(
        default=0.01, metadata={"help": "share of documents kept for validation, picked by a hash of their text"}
    )
    batch_documents: int = field(default=512, metadata={"help": "documents that are encoded at a time"})


def prepare(recipe: PrepareRecipe) -> Path:
    """Encode and pack a corpus into ``recipe.output_dir``; returns that folder.

    A folder that already holds this run is left as it is. Memory is bounded by a batch of documents, and the digest
    by which each duplicate is found (16 bytes, some 100 in a Python set).

    Raises:
        UserError: for settings out of range, a corpus or tokenizer that cannot be read, a split that gets no document,
            and an output folder that holds something else.
    """
    _check(recipe)
    folder = Path(recipe.output_dir)
    # Where the tokenizer lies and how many documents are encoded at a time do not change what comes out.
    settings = {k: v for k, v in plain(recipe).items() if k not in ("output_dir", "tokenizer", "batch_documents")}
    settings["tokenizer_sha256"] = artifacts.sha256(tokenizer_file(recipe.tokenizer))
    if artifacts.is_finished(folder, _STAGE, settings):
        print(f"packed tokens {folder} are already there")
        return folder
    tokenizer = load_tokenizer(recipe.tokenizer)
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"the tokenizer in {recipe.tokenizer} has no {name}, expected one to mark documents with")
    corpus = open_corpus(recipe.corpus)
    print(f"packing {corpus.name} into {folder}")
    start = time.perf_counter()
    with artifacts.staged(folder) as partial:
        manifest = {
            "format": FORMAT,
            "row_length": recipe.row_length,
            "dtype": "uint16" if len(tokenizer) <= 1 << 16 else "uint32",
            "vocab_size": len(tokenizer),
            "tokenizer_sha256": settings["tokenizer_sha256"],
            "tokenizer_fingerprint": _fingerprint(recipe.tokenizer),
            "corpus": settings["corpus"],
            "validation_fraction": recipe.validation_fraction,
            **_pack(corpus, tokenizer, recipe, partial),
        }
        artifacts.write_json(partial / "manifest.json", manifest)
        seconds = time.perf_counter() - start
        artifacts.finish(partial, _STAGE, settings, seconds, splits=manifest["splits"])
    counts = ", ".join(f"{s['tokens']:,} {name} tokens ({s['rows']:,} rows)" for name, s in manifest["splits"].items())
    print(f"wrote packed tokens {folder} in {seconds:.1f} s: {counts}")
    return folder


def _check(recipe: PrepareRecipe) -> None:
    if recipe.row_length < 8:
        raise UserError(f"row_length is {recipe.row_length}, expected at least 8")
    if not 0 < recipe.validation_fraction < 1:
        raise UserError(f"validation_fraction is {recipe.validation_fraction}, expected a number between 0 and 1")
    if recipe.batch_documents < 1:
        raise UserError(f"batch_documents is {recipe.batch_documents}, expected a whole number above 0")


def _pack(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, recipe: PrepareRecipe, folder: Path) -> dict[str, Any]:
    """Write the .bin files of both splits into ``folder``; returns their part of the manifest."""
    documents = unique(corpus)
    sources: dict[str, dict[str, int]] = {}
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    writers = {split: _Writer(folder, split, dtype) for split in SPLITS}
    progress = _Progress()
    try:
        for batch in _batches(documents, recipe.batch_documents):
            for document, ids in zip(batch, encode_text(tokenizer, [d.text for d in batch]), strict=True):
                size = len(document.text.encode())
                writers[split_of(document, recipe.validation_fraction)].add([bos, *ids, eos], size)
                source = sources.setdefault(document.source, {"documents": 0, "bytes": 0})
                source["documents"] += 1
                source["bytes"] += size
            progress.show(writers.values())
        total = sum(writer.documents for writer in writers.values())
        for split, writer in writers.items():
            if not writer.documents:
                raise UserError(
                    f"the corpus has {total:,} documents, of which none falls into {split} with validation_fraction "
                    f"{recipe.validation_fraction}; choose another fraction or a corpus of more documents"
                )
            writer.end(recipe.row_length, pad)
    finally:
        for writer in writers.values():
            writer.close()
    return {
        "splits": {split: writer.facts(recipe.row_length) for split, writer in writers.items()},
        "duplicates_dropped": documents.duplicates,
        "blank_dropped": documents.blank,
        "sources": sources,
    }


def _batches(documents: unique, limit: int) -> Iterator[list[Document]]:
    """Lists of up to ``limit`` documents, fewer where they are long, so that a shelf of books fits into memory."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == limit or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """The two files of one split, and their counts."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any]) -> None:
        self.paths = {kind: folder / f"{split}.{kind}.bin" for kind in ("tokens", "documents")}
        self.files = {kind: open(path, "wb") for kind, path in self.paths.items()}  # noqa: SIM115
        self.dtype = dtype
        self.documents = self.tokens = self.bytes = 0

    def add(self, ids: list[int], size: int) -> None:
        self.files["documents"].write(np.array(self.tokens, _OFFSETS).tobytes())
        self.files["tokens"].write(np.array(ids, self.dtype).tobytes())
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += size

    def end(self, row_length: int, pad: int) -> None:
        self.files["documents"].write(np.array(self.tokens, _OFFSETS).tobytes())
        self.files["tokens"].write(np.full(-self.tokens % row_length, pad, self.dtype).tobytes())
        self.close()

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def facts(self, row_length: int) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "tokens": self.tokens,  # begin and end tokens counted, padding not
            "bytes": self.bytes,
            "rows": -(-self.tokens // row_length),
            "sha256": {kind: artifacts.sha256(path) for kind, path in self.paths.items()},
        }


class _Progress:
    """A line to stderr every few seconds."""

    def __init__(self, every: float = 5.0) -> None:
        self.every = every
        self.start = self.last = time.perf_counter()

    def show(self, writers: Any) -> None:
        now = time.perf_counter()
        if now - self.last < self.every:
            return
        self.last = now
        documents, size, tokens = (sum(getattr(w, name) for w in writers) for name in ("documents", "bytes", "tokens"))
        speed = tokens / (now - self.start)
        print(f"{documents:,} documents, {size / 1e6:,.1f} MB, {speed:,.0f} tokens/s", file=sys.stderr, flush=True)


def _fingerprint(tokenizer_folder: str | Path) -> str:
    """SHA-256 of what tokenizer.json means: a use with padding leaves its settings in a copy saved afterwards."""
    content = artifacts.read_json(tokenizer_file(tokenizer_folder))
    meaning = {name: value for name, value in content.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


class PackedTokens(_Base):
    """The rows of one split, as a map-style dataset that PyTorch's DataLoader and transformers' Trainer take.

    Row i is a dict of three int64 tensors of shape (row_length,):

    - ``input_ids``: the tokens.
    - ``position_ids``: 0, 1, 2 … from each document's start, or from the row's start for a document that began in an
      earlier row; a position of 0 therefore begins a document. Padding counts as a document of its own.
    - ``labels``: the tokens again (the model shifts them), with -100 at begin tokens, which follow from nothing, and
      at padding.

    The files are mapped, not read; a pickled copy, as worker processes get it, maps them again.

    Raises:
        UserError: if the folder is not one that `prepare` finished, is of another format, or its files were cut short.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = _read_manifest(self.folder)
        if split not in self.manifest["splits"]:
            raise UserError(f"{folder} has no split `{split}`, expected {' or '.join(self.manifest['splits'])}")
        self.row_length: int = self.manifest["row_length"]
        facts = self.manifest["splits"][split]
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self.tokens = self._map("tokens", dtype, facts["rows"] * self.row_length)
        self.offsets = self._map("documents", _OFFSETS, facts["documents"] + 1)

    def _map(self, kind: str, dtype: np.dtype[Any], count: int) -> np.memmap[Any, Any]:
        path = self.folder / f"{self.split}.{kind}.bin"
        if not path.is_file():
            raise UserError(f"{path} does not exist, expected {count * dtype.itemsize:,} bytes")
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            how = "was cut short" if size < count * dtype.itemsize else "is too long"
            raise UserError(f"{path} {how}: it has {size:,} bytes, expected {count * dtype.itemsize:,}")
        return np.memmap(path, dtype, mode="r", shape=(count,))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.split)

    def __len__(self) -> int:
        return int(self.manifest["splits"][self.split]["rows"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        import torch

        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first = index % len(self) * self.row_length
        input_ids = self.tokens[first : first + self.row_length].astype(np.int64)
        low, high = np.searchsorted(self.offsets, (first, first + self.row_length))
        # The last offset, the end of the last document, is where padding starts: it begins a document like any other.
        starts = self.offsets[low:high] - first
        origin = np.zeros(self.row_length, np.int64)
        origin[starts] = starts
        position_ids = np.arange(self.row_length) - np.maximum.accumulate(origin)
        labels = input_ids.copy()
        labels[starts] = IGNORED
        labels[max(0, int(self.offsets[-1]) - first) :] = IGNORED
        row = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in row.items()}

    def documents(self) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
        """The token ids of each document from its begin to its end token, int64, in the order of the corpus."""
        for start, end in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            yield self.tokens[start:end].astype(np.int64)

    def bytes_per_token(self, split: str | None = None) -> float:
        """UTF-8 bytes per predicted token, which is each but the begin tokens, of this split or of ``split``.

        A loss in nats per label is loss / ln 2 / bytes_per_token in bits per byte.
        """
        facts = self.manifest["splits"][split or self.split]
        return float(facts["bytes"] / (facts["tokens"] - facts["documents"]))

    def check_tokenizer(self, folder: str | Path) -> None:
        """Raise UserError unless the tokenizer in ``folder`` is the one the tokens were made with."""
        found, expected = _fingerprint(folder), self.manifest["tokenizer_fingerprint"]
        if found != expected:
            raise UserError(
                f"the tokenizer in {folder} (fingerprint {found[:12]}) is not the one that {self.folder} was packed "
                f"with ({expected[:12]}); pack the corpus again with `doge prepare`"
            )


def require_vocabulary(folder: str | Path, vocab_size: int) -> None:
    """Raise UserError if the tokens in ``folder`` need more entries than a model of ``vocab_size`` has."""
    needed = _read_manifest(Path(folder))["vocab_size"]
    if needed > vocab_size:
        raise UserError(f"the tokens in {folder} are of a vocabulary of {needed:,}, and the model has {vocab_size:,}")


def collate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows, dicts of tensors of one shape, into a batch: each name a tensor (len(rows), row_length)."""
    import torch

    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no manifest.json, expected a folder that `doge prepare` wrote")
    manifest = artifacts.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(f"{path} is of format {found}, expected {FORMAT}; pack the corpus again with `doge prepare`")
    return manifest
