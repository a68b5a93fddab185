"""The harness's tasks on files of this machine: the same prompts and scores, other places to read the rows from.

A task of ours is a YAML file that includes the harness's own and says where the rows are and which split is which.
Rows have the columns of the data sets on the Hub, in ``DATA_DIR/TASK/SPLIT.jsonl`` or ``.parquet`` (MMLU:
``DATA_DIR/mmlu/SUBJECT/SPLIT.jsonl``). ``lm_eval --include_path FOLDER`` reads the same files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import artifacts
from ..errors import UserError
from .suites import SuiteTask


@dataclass(frozen=True)
class LocalTask:
    """The files of a task: ``parts`` holds, for each file of the harness that has data, its splits and their files."""

    task: SuiteTask
    parts: dict[str, dict[str, list[Path]]]
    same_split: bool

    def sha256(self) -> str:
        """SHA-256 over all files, which says whether a score belongs to these rows."""
        return artifacts.sha256(*(f for splits in self.parts.values() for files in splits.values() for f in files))

    def note(self) -> str:
        """What a reader of the score should know about the examples; empty where they are as usual."""
        if not self.same_split:
            return ""
        return f"few-shot examples are other rows of its {self.task.evaluated} split, for want of another split"


def harness_folder() -> Path:
    """Where the installed harness keeps its tasks.

    Raises:
        UserError: if it is not installed.
    """
    import importlib.util

    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        raise UserError("the suites need lm-evaluation-harness; install it with: pip install 'small-doge[eval]'")
    return Path(found.origin).parent / "tasks"


def find_local(data_dir: str | Path, task: SuiteTask) -> LocalTask:
    """The files of ``task`` below ``data_dir``, with every row's columns looked at.

    Raises:
        UserError: for a file that is not there, cannot be read, holds no rows or lacks a column.
    """
    root = Path(data_dir) / task.name
    if not root.is_dir():
        raise UserError(f"data folder {data_dir} has no {task.name}: looked for the folder {root}")
    if task.name == "mmlu":
        names = sorted(p.stem for p in (harness_folder() / task.source).parent.glob("mmlu_*.yaml"))
        folders = {f"mmlu/default/{name}.yaml": root / name.removeprefix("mmlu_") for name in names}
    else:
        folders = {task.source: root}
    parts, same = {}, False
    for source, folder in folders.items():
        splits = {task.evaluated: _files(folder, task.evaluated)}
        if task.examples is not None:
            # Without training rows, examples are drawn from the other rows of the split; MMLU's are in a fixed order.
            found = _files(folder, task.examples, required=task.examples != "train")
            splits |= {task.examples: found} if found else {}
            same = same or not found
        for files in splits.values():
            for file in files:
                _check_rows(file, task)
        parts[source] = splits
    return LocalTask(task, parts, same)


def _files(folder: Path, split: str, required: bool = True) -> list[Path]:
    """The files of a split: one JSON Lines file, or Parquet files as the Hub names them."""
    for pattern in (f"{split}.jsonl", f"{split}.parquet", f"{split}-*.parquet"):
        if found := sorted(folder.glob(pattern)):
            return found
    if required:
        raise UserError(f"there is no {folder / split}.jsonl or .parquet, which holds the {split} rows of the task")
    return []


def _check_rows(file: Path, task: SuiteTask) -> None:
    """Raise UserError if a row of ``file`` lacks what the task's prompt is made of."""
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        try:
            schema, rows = parquet.read_schema(file), parquet.read_metadata(file).num_rows
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
        _require(file, "it", dict.fromkeys(_leaves(schema), True), task)
    else:
        rows = 0
        with open(file, encoding="utf-8") as lines:
            try:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        rows += 1
                        _require(file, f"line {number}", json.loads(line), task)
            except ValueError as error:  # UnicodeDecodeError is one too
                raise UserError(f"{file} is not JSON Lines in UTF-8: after {rows:,} rows, {error}") from None
    if not rows:
        raise UserError(f"{file} holds no rows")


def _leaves(schema: Any) -> list[str]:
    """Names of the columns, and of the fields inside those that are structures, as ``column.field``."""
    names = []
    for column in schema:
        inner = getattr(column.type, "value_type", column.type)
        fields = [inner.field(i).name for i in range(inner.num_fields)] if hasattr(inner, "num_fields") else []
        names += [column.name, *(f"{column.name}.{field}" for field in fields)]
    return names


def _require(file: Path, where: str, row: Any, task: SuiteTask) -> None:
    for column in task.columns:
        value = row
        for name in (column,) if isinstance(row, dict) and column in row else column.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            has = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise UserError(f"{file} lacks the column `{column}` that {task.name} needs: {where} has {has}")


def write_tasks(tasks: Sequence[LocalTask], folder: str | Path) -> None:
    """Write the task files into ``folder``, for a TaskManager or for ``lm_eval --include_path``."""
    folder, harness = Path(folder), harness_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for local in tasks:
        for source, splits in local.parts.items():
            first = next(iter(splits.values()))[0]
            config: dict[str, Any] = {
                "include": str(harness / source),
                "dataset_path": "parquet" if first.suffix == ".parquet" else "json",
                "dataset_name": None,
                "dataset_kwargs": {
                    "data_files": {split: [str(f.absolute()) for f in files] for split, files in splits.items()}
                },
            }
            config |= _splits(local.task, splits)
            _write(folder / Path(source).name, local.task.name, config)
        if local.task.name == "mmlu":  # the groups that its score is averaged over
            for group in sorted((harness / local.task.source).parent.glob("_mmlu*.yaml")):
                _write(folder / group.name, "", {"include": str(group)})


def _splits(task: SuiteTask, splits: dict[str, list[Path]]) -> dict[str, str | None]:
    """Which split the harness takes for what; it would ask for every split that the data set on the Hub has."""
    if task.examples not in (None, "train"):
        return {}
    if task.examples in splits:
        used = {"training_split": "train", f"{task.evaluated}_split": task.evaluated}
        return {f"{name}_split": None for name in ("validation", "test")} | used
    # The harness leaves a question out of its own examples when both come from the split it calls test.
    used = {"test_split": task.evaluated} | ({"fewshot_split": task.evaluated} if task.examples else {})
    return {f"{name}_split": None for name in ("training", "validation")} | used


def _write(path: Path, prefix: str, config: dict[str, Any]) -> None:
    # The harness has two files called default.yaml.
    name = f"{prefix}_{path.name}" if path.name == "default.yaml" else path.name
    artifacts.write_text(path.with_name(name), yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
