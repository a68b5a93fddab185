"""Folders that stages write: made under a temporary name, moved into place whole, and told apart afterwards.

Every stage leaves a ``stage.json`` in its folder, written last: which stage, with which settings, how long it took.
A folder without one is unfinished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import UserError

STAGE_FILE = "stage.json"


def write_text(path: str | Path, content: str) -> None:
    """Write a text file so that ``path`` holds either the old content or the new one, never a part."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: if it is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); it was cut short or edited") from None


def sha256(*paths: str | Path) -> str:
    """SHA-256 over the bytes of the files, in order, as 64 hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def is_finished(folder: str | Path, stage: str, settings: dict[str, Any]) -> bool:
    """Whether ``folder`` already holds this very stage, finished with these settings.

    Returns False for a folder that is absent or empty, so that the stage can begin.

    Raises:
        UserError: if the folder holds anything else: another stage, other settings (naming the first that differs),
            or files that no stage of ours wrote.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"output folder {folder} is a file")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / STAGE_FILE).exists():
        raise UserError(f"output folder {folder} holds files that are not of this run; choose another --output_dir")
    there = read_json(folder / STAGE_FILE)
    if there.get("stage") != stage:
        raise UserError(f"output folder {folder} holds a {there.get('stage')} run, expected an empty one or {stage}")
    require_same_settings(folder, there.get("settings", {}), settings)
    return True


def require_same_settings(folder: str | Path, there: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise UserError naming the first setting in which a run in ``folder`` differs from ``settings``."""
    settings = json.loads(json.dumps(settings))
    for name in sorted(there.keys() | settings.keys()):
        if there.get(name) != settings.get(name):
            raise UserError(
                f"output folder {folder} holds a different run: `{name}` is {there.get(name)!r} there and "
                f"{settings.get(name)!r} here; choose another --output_dir or remove that folder"
            )


def finish(folder: str | Path, stage: str, settings: dict[str, Any], seconds: float, **facts: Any) -> None:
    """Write the ``stage.json`` that marks ``folder`` as finished."""
    record = {"stage": stage, "settings": settings, "seconds": round(seconds, 3), **facts, "versions": versions()}
    write_json(Path(folder) / STAGE_FILE, record)


@contextlib.contextmanager
def staged(output_dir: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``output_dir`` that takes its place when the block ends without an error.

    On an error, or Ctrl-C, the temporary folder is removed and ``output_dir`` is as it was. A killed process leaves a
    folder whose name ends in ``.partial``, which nothing reads.
    """
    output_dir = Path(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = output_dir.with_name(f".{output_dir.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        if output_dir.exists():
            output_dir.rmdir()  # only an empty one is ever replaced: is_finished() has refused the others
        os.replace(partial, output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_space(folder: str | Path, needed_bytes: int, what: str) -> None:
    """Raise UserError if the disk under ``folder`` has less than ``needed_bytes`` free."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"the disk of {folder} has {free / 2**20:,.0f} MiB free, and {what} needs about "
            f"{needed_bytes / 2**20:,.0f} MiB"
        )


def duration(seconds: float) -> str:
    """A time in the words people use: ``0.3 s``, ``48 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 1:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def versions() -> dict[str, str]:
    """Versions of what computes: Python, ourselves and the libraries that matter for the numbers."""
    found = {"python": platform.python_version()}
    for name in ("small-doge", "torch", "transformers", "tokenizers", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
