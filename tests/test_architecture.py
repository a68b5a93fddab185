"""The house's shape, read from the sources: imports run one way, every module says what it is, no machine's paths."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

PACKAGE = "small_doge"
SOURCES = Path(__file__).resolve().parents[1] / "src" / PACKAGE

# A unit is a folder or a module right under small_doge; `__init__` stands for the package itself, whose import brings
# everything in. What each unit may import besides itself:
LOWER = {"ops", "models", "data", "errors", "recipe", "artifacts"}
STAGES = {"training", "evaluation", "inference"}
EVERYTHING = LOWER | STAGES | {"report", "demo", "cli", "__init__", "__main__"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "recipe": {"errors"},
    "artifacts": {"errors"},
    "ops": set(),
    "models": {"ops", "errors", "artifacts"},
    "data": {"ops", "errors", "recipe", "artifacts"},
    "training": LOWER,
    "evaluation": LOWER,
    "inference": LOWER,
    "report": LOWER | STAGES | {"__init__"},
    "demo": LOWER | STAGES | {"report", "__init__"},
    "cli": EVERYTHING,
    "__init__": EVERYTHING,
    "__main__": EVERYTHING,
}

# A path of one machine: a slash that begins a path (no word, dot or colon before it), then a folder that some machines
# have and others lack.
MACHINE_PATH = re.compile(r"(?<![\w.:/}])/(?:home|tmp|root|Users|mnt|media|opt|scratch)\b|\b[A-Za-z]:\\{1,2}Users\b")


def unit_of(path: PurePosixPath) -> str:
    """The unit a file belongs to; ``path`` is relative to the package's folder."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def imported_units(path: PurePosixPath, source: str) -> Iterator[tuple[int, str]]:
    """Line and unit of every import of ours in ``source``, wherever it stands: in functions and conditions too."""
    package = (PACKAGE, *path.parent.parts)
    for node in ast.walk(ast.parse(source, filename=str(path))):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(package), f"{path}:{node.lineno} imports from above {PACKAGE}"
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            # In `from small_doge import x`, x is a unit, or a name of the package itself.
            targets = [(*module, alias.name) for alias in node.names]
        else:
            continue
        for top, *rest in targets:
            if top == PACKAGE:
                known = rest and (rest[0] in MAY_IMPORT or len(rest) > 1)
                yield node.lineno, rest[0] if known else "__init__"


def wrong_imports(path: PurePosixPath, source: str) -> list[str]:
    """One sentence for each import of ``source`` that runs against the one way."""
    unit = unit_of(path)
    if unit not in MAY_IMPORT:
        return [f"{path}: the unit {unit} has no place in MAY_IMPORT"]
    return [
        f"{path}:{line}: {unit} may not import {other}"
        for line, other in imported_units(path, source)
        if other != unit and other not in MAY_IMPORT[unit]
    ]


def modules() -> list[tuple[PurePosixPath, str]]:
    """Every module of the package, as a path relative to its folder and its source."""
    return [
        (PurePosixPath(file.relative_to(SOURCES).as_posix()), file.read_text(encoding="utf-8"))
        for file in sorted(SOURCES.rglob("*.py"))
    ]


def test_imports_run_one_way() -> None:
    found = modules()
    folders = {path.parts[0] for path, _ in found if len(path.parts) > 1}
    assert folders >= {"ops", "models", "data", "report"} | STAGES, "the sources were not found"
    wrong = [sentence for path, source in found for sentence in wrong_imports(path, source)]
    assert not wrong, "\n".join(wrong)


def test_the_table_itself_has_no_cycle() -> None:
    below = {unit: others for unit, others in MAY_IMPORT.items() if unit not in {"cli", "__init__", "__main__"}}
    done: set[str] = {"__init__"}
    while ready := {unit for unit, others in below.items() if unit not in done and others <= done}:
        done |= ready
    assert below.keys() - done == set()


@pytest.mark.parametrize(
    ("path", "source", "other"),
    [
        ("ops/dynamic_mask/folded.py", "from ...models import sizes", "models"),
        ("ops/dynamic_mask/folded.py", "from ...errors import UserError", "errors"),
        ("ops/__init__.py", "from ..models.cache import DynamicMaskCache", "models"),
        ("models/modeling_doge.py", "from small_doge.training.schedule import wsd", "training"),
        ("models/modeling_doge.py", "from small_doge import data", "data"),
        ("models/cache.py", "def f():\n    if True:\n        from .. import training", "training"),
        ("models/cache.py", "from small_doge import DogeConfig", "__init__"),
        ("models/cache.py", "from .. import *", "__init__"),
        ("data/packing.py", "import torch, small_doge.models.sizes as sizes", "models"),
        ("data/packing.py", "import small_doge", "__init__"),
        ("training/sft.py", "from ..evaluation import bits_per_byte", "evaluation"),
        ("evaluation/speed.py", "from ..inference.generate import generate", "inference"),
        ("inference/serve.py", "async def f():\n    from ..cli import main", "cli"),
        ("inference/serve.py", "try:\n    from ..report.page import write\nexcept ImportError:\n    pass", "report"),
        ("report/page.py", "from ..cli import main", "cli"),
        ("demo.py", "from .cli import main", "cli"),
        ("errors.py", "from .recipe import load", "recipe"),
        ("recipe.py", "from .artifacts import read_json", "artifacts"),
        ("data/packing.py", "from ..nowhere.at_all import x", "nowhere"),
    ],
)
def test_a_forbidden_import_is_caught(path: str, source: str, other: str) -> None:
    (sentence,) = wrong_imports(PurePosixPath(path), source)
    assert sentence.endswith(f"{unit_of(PurePosixPath(path))} may not import {other}")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/dynamic_mask/folded.py", "import torch\nfrom .reference import f\nfrom ..product_key import g"),
        ("models/modeling_doge.py", "from ..errors import UserError\nfrom ..ops.dynamic_mask import f"),
        ("data/packing.py", "from ..artifacts import staged\nfrom small_doge.recipe import load"),
        ("training/sft.py", "from . import schedule\nfrom .. import data, models\nimport small_doge.models.cache"),
        ("evaluation/harness.py", "from evaluation import training\nfrom data.training import x"),
        ("inference/serve.py", "from transformers.training import x\nimport small_doge_extras.cli"),
        ("report/page.py", "def f():\n    from ..evaluation import speed"),
        ("cli.py", "from . import demo, __version__\nfrom .report.page import write"),
        ("__init__.py", "from .models import DogeConfig\nfrom . import ops"),
    ],
)
def test_a_permitted_import_is_let_through(path: str, source: str) -> None:
    assert wrong_imports(PurePosixPath(path), source) == []


def test_a_unit_without_a_place_is_caught() -> None:
    assert wrong_imports(PurePosixPath("utils.py"), "import os") != []
    assert wrong_imports(PurePosixPath("helpers/text.py"), "") != []


def test_every_module_has_a_docstring() -> None:
    bare = [str(path) for path, source in modules() if not ast.get_docstring(ast.parse(source))]
    assert not bare, "no docstring in " + ", ".join(bare)


def test_sources_hold_no_paths_of_a_machine() -> None:
    found = []
    for file in sorted(SOURCES.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            where = file.relative_to(SOURCES).as_posix()
            found += [f"{where}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line", ['open("/home/ann/x")', "DATA = '/tmp/doge'", "# see /mnt/data", r'Path("C:\\Users\\ann")', "f'/root'"]
)
def test_a_path_of_a_machine_is_caught(line: str) -> None:
    assert MACHINE_PATH.search(line)


@pytest.mark.parametrize(
    "line",
    ['"https://host/home/x"', "runs/tmp/x", "a/mnt", '"/v1/chat"', '"training:\\Usage"', "../tmp/x", "f'{root}/tmp'"],
)
def test_other_slashes_are_let_through(line: str) -> None:
    assert not MACHINE_PATH.search(line)
