"""Shards on disk: parts of a corpus, written one after another, each whole or absent.

A part is a shard of each split: ``{split}-00000.tokens.bin`` and ``{split}-00000.documents.bin``. It exists once its
record lies in ``unfinished/``; the record also says where reading goes on. Of a killed run the next one removes what
has no record and continues behind the last part. When all is written the folder ``unfinished`` goes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import artifacts
from ..errors import UserError

SPLITS = ("train", "validation")
OFFSETS = np.dtype("<i8")
UNFINISHED = "unfinished"
KINDS = ("tokens", "documents")


def shard_file(folder: Path, shard: str, kind: str) -> Path:
    """The file of a shard, of which ``shard`` is the name, such as train-00000."""
    return folder / f"{shard}.{kind}.bin"


class Run:
    """The parts of one run in a folder; ``files`` is a digest of what is known of the corpus's files.

    Raises:
        UserError: if the folder holds something else, another run's parts, or parts cut short.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], files: str = "") -> None:
        self.folder, self.aside, self.settings, self.files = folder, folder / UNFINISHED, settings, files
        self.records: list[dict[str, Any]] = []
        self.made: list[Path] = []
        there = self.aside / "run.json"
        if there.exists():
            begun = artifacts.read_json(there)
            artifacts.require_same_settings(folder, begun["settings"], settings)
            if begun["files"] != files:
                raise UserError(
                    f"the corpus has other files, or files of other sizes, than when the run in {folder} began, "
                    "expected the same to continue it; remove that folder or choose another --output_dir"
                )
            while (path := self._record(len(self.records))).exists():
                self.records.append(artifacts.read_json(path))
            for number, record in enumerate(self.records):
                self._require_whole(number, record)
        elif folder.is_file():
            raise UserError(f"output folder {folder} is a file")
        elif folder.exists() and any(path.name != UNFINISHED for path in folder.iterdir()):
            raise UserError(f"output folder {folder} holds files that are not of this run; choose another --output_dir")

    def begin(self) -> None:
        """Claim the folder, and remove what a killed run left of a part it did not finish."""
        self.made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.aside.mkdir(parents=True, exist_ok=True)
        if not (self.aside / "run.json").exists():
            artifacts.write_json(self.aside / "run.json", {"settings": self.settings, "files": self.files})
        known = {
            f"{shard['name']}.{kind}.bin" for record in self.records for shard in record["shards"] for kind in KINDS
        }
        for path in [*self.folder.glob("*.bin"), *self.folder.glob("*.partial")]:
            if path.name not in known:
                path.unlink()

    def _record(self, number: int) -> Path:
        return self.aside / f"part-{number:05}.json"

    def _digests(self, number: int) -> Path:
        return self.aside / f"part-{number:05}.digests"

    def _require_whole(self, number: int, record: dict[str, Any]) -> None:
        wanted = {
            shard_file(self.folder, s["name"], kind): s["file_bytes"][kind] for s in record["shards"] for kind in KINDS
        }
        wanted[self._digests(number)] = 16 * sum(shard["documents"] for shard in record["shards"])
        for path, size in wanted.items():
            found = path.stat().st_size if path.exists() else None
            if found != size:
                raise UserError(
                    f"{path} has {'gone' if found is None else f'{found:,} bytes'}, expected {size:,} bytes; "
                    f"remove {self.folder} and prepare again"
                )

    def digests(self) -> set[bytes]:
        """Of every document that finished parts hold."""
        seen: set[bytes] = set()
        for number in range(len(self.records)):
            content = self._digests(number).read_bytes()
            seen.update(content[i : i + 16] for i in range(0, len(content), 16))
        return seen

    def part(self, dtype: np.dtype[Any], row_length: int, pad: int) -> Part:
        """A part to write, the next one."""
        return Part(self, len(self.records), dtype, row_length, pad)

    def finish(self, part: Part, record: dict[str, Any]) -> None:
        """Give the files of a part their names, then write its record: from here on it exists."""
        shards = part.end()
        with open(self._digests(part.number), "wb") as file:
            file.write(b"".join(part.digests))
            _to_disk(file)
        for partial, path in part.paths():
            os.replace(partial, path)
        self.records.append({"shards": shards, **record})
        artifacts.write_json(self._record(part.number), self.records[-1])

    def abandon(self) -> None:
        """After a mistake: nothing is left of a run without a finished part, and of others their parts."""
        for path in self.folder.glob("*.partial"):
            path.unlink()
        if not self.records:
            shutil.rmtree(self.aside, ignore_errors=True)
            for folder in self.made:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def close(self) -> None:
        """Remove what only continuing needed."""
        shutil.rmtree(self.aside, ignore_errors=True)

    def full(self, error: OSError) -> UserError | None:
        """What to say if ``error`` is that of a full disk."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return None
        return UserError(
            f"the disk of {self.folder} is full, expected room for the next shard; {len(self.records)} finished "
            "parts are kept, and the same command continues behind them"
        )


class Part:
    """The files of one part while they are written: documents one behind the other, padded at the end to whole rows."""

    def __init__(self, run: Run, number: int, dtype: np.dtype[Any], row_length: int, pad: int) -> None:
        self.run, self.number, self.dtype, self.row_length, self.pad = run, number, dtype, row_length, pad
        self.shards: dict[str, _Shard] = {}
        self.digests: list[bytes] = []
        self.tokens = 0

    def add(self, split: str, ids: np.ndarray[Any, Any], size: int, digest: bytes) -> None:
        """Append a document of ``size`` bytes of text."""
        if split not in self.shards:
            self.shards[split] = _Shard(self.run.folder, f"{split}-{self.number:05}")
        self.shards[split].add(ids, size)
        self.digests.append(digest)
        self.tokens += len(ids)

    def end(self) -> list[dict[str, Any]]:
        """Close the files; returns the facts of each shard, train first."""
        return [
            {"split": split, **self.shards[split].end(self.dtype, self.row_length, self.pad)}
            for split in SPLITS
            if split in self.shards
        ]

    def paths(self) -> list[tuple[Path, Path]]:
        """Every file's name while it is written, and afterwards."""
        names = [shard_file(self.run.folder, shard.name, kind) for shard in self.shards.values() for kind in KINDS]
        return [(path.with_name(f"{path.name}.partial"), path) for path in names]

    def close(self) -> None:
        """Close the files as they are, ended or not."""
        for shard in self.shards.values():
            shard.close()


class _Shard:
    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.files: dict[str, IO[bytes]] = {}
        for kind in KINDS:
            path = shard_file(folder, name, kind)
            self.files[kind] = open(path.with_name(f"{path.name}.partial"), "wb")  # noqa: SIM115
        self.hashes = {kind: hashlib.sha256() for kind in KINDS}
        self.sizes = dict.fromkeys(KINDS, 0)
        self.documents = self.tokens = self.bytes = 0

    def _write(self, kind: str, content: bytes) -> None:
        self.files[kind].write(content)
        self.hashes[kind].update(content)
        self.sizes[kind] += len(content)

    def add(self, ids: np.ndarray[Any, Any], size: int) -> None:
        self._write("documents", np.array(self.tokens, OFFSETS).tobytes())
        self._write("tokens", ids.tobytes())
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += size

    def end(self, dtype: np.dtype[Any], row_length: int, pad: int) -> dict[str, Any]:
        self._write("documents", np.array(self.tokens, OFFSETS).tobytes())
        self._write("tokens", np.full(-self.tokens % row_length, pad, dtype).tobytes())
        for file in self.files.values():
            _to_disk(file)
        self.close()
        return {
            "name": self.name,
            "documents": self.documents,
            "tokens": self.tokens,  # begin and end tokens counted, padding not
            "bytes": self.bytes,
            "rows": -(-self.tokens // row_length),
            "file_bytes": self.sizes,
            "sha256": {kind: digest.hexdigest() for kind, digest in self.hashes.items()},
        }

    def close(self) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):  # of a full disk, which has been reported
                file.close()


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
