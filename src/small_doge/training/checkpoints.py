"""Checkpoints that are whole or not there: each carries a list of its files and their sizes, written last.

The list stands in ``checkpoint.json``, beside what continuing from it needs to know: where the run was in its schedule
and in its data, with which recipe, optimiser and versions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..artifacts import read_json, versions, write_json
from ..errors import UserError

MARKER = "checkpoint.json"


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder, as the Trainer gives it."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def seal(checkpoint: str | Path, **facts: Any) -> None:
    """Mark a checkpoint as completely written, files in folders (shards) included; ``facts`` go into the mark."""
    folder = Path(checkpoint)
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MARKER)
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in paths}
    write_json(folder / MARKER, {"files": files, **facts, "versions": versions()})


def newest(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. One that a killed run left half-written is passed over.

    Raises:
        UserError: if the newest complete checkpoint has lost bytes since it was written.
    """
    found = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / MARKER).is_file()]
    if not found:
        return None
    checkpoint = max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))
    require_whole(checkpoint, "remove that folder to continue from the one before it")
    return checkpoint


def require_whole(checkpoint: str | Path, remedy: str) -> None:
    """Raise UserError if a checkpoint has lost bytes since it was marked, ending in what to do about it."""
    for name, size in read_json(Path(checkpoint, MARKER))["files"].items():
        file = Path(checkpoint, name)
        there = file.stat().st_size if file.is_file() else 0
        if there != size:
            raise UserError(
                f"checkpoint {checkpoint} is cut short: {name} has {there:,} bytes, expected {size:,}; {remedy}"
            )
