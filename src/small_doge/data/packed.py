"""Packed tokens: the dataset that reads the shards of `doge prepare` by memory map, and their check by hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import artifacts
from ..errors import UserError
from .encoding import cores
from .shards import KINDS, OFFSETS, shard_file
from .tokenizer import tokenizer_file

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset

    _Base = Dataset[dict[str, torch.Tensor]]
else:
    # A DataLoader asks a map-style dataset for __len__ and __getitem__ only; importing torch to inherit them would
    # make every command that merely reads the recipe's fields two seconds slower.
    _Base = object

FORMAT = 2
IGNORED = -100
"""The label that the loss leaves out."""

CHECKED_AT_ONCE = 2 << 30
"""Bytes of a split up to which opening it checks its hashes, some second and a half."""

_OPEN_SHARDS = 200  # each is two files that stay open


class PackedTokens(_Base):
    """The rows of one split, as a map-style dataset that PyTorch's DataLoader and transformers' Trainer take.

    Row i is a dict of three int64 tensors of shape (row_length,):

    - ``input_ids``: the tokens.
    - ``position_ids``: 0, 1, 2 … from each document's start, or from the row's start for a document that began in an
      earlier row; a position of 0 therefore begins a document. Padding counts as a document of its own.
    - ``labels``: the tokens again (the model shifts them), with -100 at begin tokens, which follow from nothing, and
      at padding.

    The files are mapped, not read; a pickled copy, as worker processes get it, maps them again. Opening checks the size
    of every file, and the hashes of a split of up to `CHECKED_AT_ONCE` bytes; for larger ones there is `verify`.

    Raises:
        UserError: if the folder is not one that `prepare` finished, is of another format, or its files were cut short
            or changed.
    """

    def __init__(self, folder: str | Path, split: str, check: bool = True) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        if split not in self.manifest["splits"]:
            raise UserError(f"{folder} has no split `{split}`, expected {' or '.join(self.manifest['splits'])}")
        self.row_length: int = self.manifest["row_length"]
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self.shards: list[dict[str, Any]] = self.manifest["splits"][split]["shards"]
        self.first_rows = np.cumsum([0, *(shard["rows"] for shard in self.shards)])
        for shard in self.shards:
            self._require_size(shard)
        self.shard = lru_cache(_OPEN_SHARDS)(self._open)
        if check and sum(sum(shard["file_bytes"].values()) for shard in self.shards) <= CHECKED_AT_ONCE:
            self.verify()

    def _require_size(self, shard: dict[str, Any]) -> None:
        counts = {"tokens": shard["rows"] * self.row_length, "documents": shard["documents"] + 1}
        for kind, dtype in (("tokens", self.dtype), ("documents", OFFSETS)):
            path, expected = shard_file(self.folder, shard["name"], kind), counts[kind] * dtype.itemsize
            if not path.is_file():
                raise UserError(f"{path} does not exist, expected {expected:,} bytes")
            size = path.stat().st_size
            if size != expected:
                how = "was cut short" if size < expected else "is too long"
                raise UserError(f"{path} {how}: it has {size:,} bytes, expected {expected:,}")

    def _open(self, number: int) -> tuple[np.memmap[Any, Any], np.memmap[Any, Any]]:
        """The tokens of a shard, (rows · row_length,), and where its documents start, (documents + 1,), mapped."""
        name = self.shards[number]["name"]
        tokens, offsets = (
            np.memmap(shard_file(self.folder, name, kind), dtype, mode="r")
            for kind, dtype in (("tokens", self.dtype), ("documents", OFFSETS))
        )
        return tokens, offsets

    def verify(self) -> None:
        """Check the SHA-256 of every file of the split; several at a time, 1 to 2 GB/s on each core.

        Raises:
            UserError: naming the first file whose bytes are not those that were written.
        """
        files = [(shard, kind) for shard in self.shards for kind in KINDS]
        with ThreadPoolExecutor(min(8, cores())) as threads:
            paths = [shard_file(self.folder, shard["name"], kind) for shard, kind in files]
            for (shard, kind), path, found in zip(files, paths, threads.map(artifacts.sha256, paths), strict=True):
                if found != shard["sha256"][kind]:
                    raise UserError(
                        f"{path} is damaged: its SHA-256 is {found[:12]}…, expected {shard['sha256'][kind][:12]}…; "
                        "prepare the corpus again or restore the file"
                    )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.split, False)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        import torch

        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = index % len(self)
        number = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        tokens, offsets = self.shard(number)
        first = (row - int(self.first_rows[number])) * self.row_length
        input_ids = tokens[first : first + self.row_length].astype(np.int64)
        low, high = np.searchsorted(offsets, (first, first + self.row_length))
        # The last offset, the end of the last document, is where padding starts: it begins a document like any other.
        starts = offsets[low:high] - first
        origin = np.zeros(self.row_length, np.int64)
        origin[starts] = starts
        position_ids = np.arange(self.row_length) - np.maximum.accumulate(origin)
        labels = input_ids.copy()
        labels[starts] = IGNORED
        labels[max(0, int(offsets[-1]) - first) :] = IGNORED
        found = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def documents(self) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
        """The token ids of each document from its begin to its end token, int64, in the order of the corpus."""
        for number in range(len(self.shards)):
            tokens, offsets = self.shard(number)
            for start, end in pairwise(offsets):
                yield tokens[start:end].astype(np.int64)

    def bytes_per_token(self, split: str | None = None) -> float:
        """UTF-8 bytes per predicted token, which is each but the begin tokens, of this split or of ``split``.

        A loss in nats per label is loss / ln 2 / bytes_per_token in bits per byte.
        """
        facts = self.manifest["splits"][split or self.split]
        return float(facts["bytes"] / (facts["tokens"] - facts["documents"]))

    def check_tokenizer(self, folder: str | Path) -> None:
        """Raise UserError unless the tokenizer in ``folder`` is the one the tokens were made with."""
        found, expected = fingerprint(folder), self.manifest["tokenizer_fingerprint"]
        if found != expected:
            raise UserError(
                f"the tokenizer in {folder} (fingerprint {found[:12]}) is not the one that {self.folder} was packed "
                f"with ({expected[:12]})"
            )


def fingerprint(tokenizer_folder: str | Path) -> str:
    """SHA-256 of what tokenizer.json means: a use with padding leaves its settings in a copy saved afterwards."""
    content = artifacts.read_json(tokenizer_file(tokenizer_folder))
    meaning = {name: value for name, value in content.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def require_vocabulary(folder: str | Path, vocab_size: int) -> None:
    """Raise UserError if the tokens in ``folder`` need more entries than a model of ``vocab_size`` has."""
    needed = read_manifest(Path(folder))["vocab_size"]
    if needed > vocab_size:
        raise UserError(f"the tokens in {folder} are of a vocabulary of {needed:,}, and the model has {vocab_size:,}")


def collate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows, dicts of tensors of one shape, into a batch: each name a tensor (len(rows), row_length)."""
    import torch

    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder; UserError if there is none or it is of another format."""
    path = folder / "manifest.json"
    if not path.is_file():
        hint = "; it is unfinished, run the same command again" if (folder / "unfinished").exists() else ""
        raise UserError(f"{folder} holds no manifest.json, expected a folder that `doge prepare` wrote{hint}")
    manifest = artifacts.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(f"{path} is of format {found}, expected {FORMAT}; pack the corpus again with `doge prepare`")
    return manifest
