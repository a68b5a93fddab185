"""Checkpoints that are whole or not there: each carries a list of its files and their sizes, written last."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..artifacts import read_json, write_json
from ..errors import UserError

MARKER = "checkpoint.json"


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder, as the Trainer gives it."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def seal(checkpoint: str | Path) -> None:
    """Mark a checkpoint as completely written."""
    files = {p.name: p.stat().st_size for p in sorted(Path(checkpoint).iterdir()) if p.is_file() and p.name != MARKER}
    write_json(Path(checkpoint, MARKER), {"files": files})


def newest(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. One that a killed run left half-written is passed over.

    Raises:
        UserError: if the newest complete checkpoint has lost bytes since it was written.
    """
    found = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / MARKER).is_file()]
    if not found:
        return None
    checkpoint = max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))
    for name, size in read_json(checkpoint / MARKER)["files"].items():
        file = checkpoint / name
        there = file.stat().st_size if file.is_file() else 0
        if there != size:
            raise UserError(
                f"checkpoint {checkpoint} is cut short: {name} has {there:,} bytes, expected {size:,}; remove that "
                f"folder to continue from the one before it"
            )
    return checkpoint
