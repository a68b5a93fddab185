"""The standard library of the running Python as text: some 12 MB of code and prose that every machine already has."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import os
import re
import sys
import sysconfig
import tokenize
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError

PARTS = ("source", "docstrings", "topics")

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Tests, and what differs from machine to machine: paths of the build, hooks of the distributor.
_LEFT_OUT_NAME = re.compile(r"test_.*|.*_test\.py|_sysconfigdata.*|config-.*|(site|user)customize\.py")
_GENERATED = re.compile(r"\b(auto-?|automatically )generated|file is generated|do not edit|codec .*generated", re.I)
_TABLE_LINE = re.compile(r"^[ \t]*(?:['\"\[({)\]}]|-?\d)", re.M)


def require_folder() -> Path:
    """The folder of the standard library.

    Raises:
        UserError: if it holds no source files, as in an embedded Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    if not _paths(root):
        raise UserError(
            f"the standard library of this Python ({root}) has no source files; use a full Python or another corpus"
        )
    return root


def read(part: str, root: Path) -> Iterator[tuple[str, str]]:
    """(id, text) of each document of a part, in an order that does not depend on the machine.

    ``source``: the .py files, without tests and generated tables. ``docstrings``: the documented definitions of
    modules written in C, one stub a module; those of .py files already stand in ``source``. ``topics``: the chapters
    of the language reference that ``help()`` shows.
    """
    if part == "source":
        return _source(root)
    return _docstrings() if part == "docstrings" else _topics()


def _paths(root: Path) -> list[str]:
    """The .py files under ``root``, relative and with forward slashes, sorted, without tests."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not _LEFT_OUT_NAME.fullmatch(name)]
        for name in files:
            if name.endswith(".py") and not _LEFT_OUT_NAME.fullmatch(name):
                found.append((Path(folder) / name).relative_to(root).as_posix())
    return sorted(found)


def _source(root: Path) -> Iterator[tuple[str, str]]:
    for path in _paths(root):
        content = (root / path).read_bytes()
        try:
            if tokenize.detect_encoding(io.BytesIO(content).readline)[0] != "utf-8":
                continue
            text = content.decode("utf-8")
        except (SyntaxError, UnicodeDecodeError):
            continue
        # Windows installers may write \r\n; the corpus should be the same text everywhere.
        text = text.replace("\r\n", "\n")
        if not _GENERATED.search(text[:600]) and not _is_table(text):
            yield f"stdlib/{path}", text


def _is_table(text: str) -> bool:
    """Whether most lines of a file of some size begin with a literal: codec tables, HTML entities, aliases."""
    return len(text) > 4000 and len(_TABLE_LINE.findall(text)) > 0.55 * text.count("\n")


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python lacks pydoc_data.topics; use a full Python or leave out the part topics") from None
    for name in sorted(topics):
        yield f"topics/{name}", topics[name]


def _docstrings() -> Iterator[tuple[str, str]]:
    seen: set[str] = set()  # posix.error is OSError: a docstring stands once, and builtins come first
    for name in sorted(sys.stdlib_module_names, key=lambda name: (name != "builtins", name)):
        with warnings.catch_warnings(), contextlib.suppress(ImportError, ValueError):
            warnings.simplefilter("ignore")  # some are deprecated, and importing them says so
            spec = importlib.util.find_spec(name)
            compiled = tuple(importlib.machinery.EXTENSION_SUFFIXES)
            # Importing a .py module could do anything (`this` prints, `antigravity` opens a browser).
            if spec and spec.origin and (spec.origin == "built-in" or spec.origin.endswith(compiled)):
                text = _stub(importlib.import_module(name), seen)
                if text:
                    yield f"docstrings/{name}", text


def _stub(module: types.ModuleType, seen: set[str]) -> str:
    blocks = [_quoted(module, "", seen)]
    for name, thing in sorted(vars(module).items()):
        if inspect.isclass(thing) and not any(map(inspect.isfunction, vars(thing).values())):
            doc = _quoted(thing, "    ", seen)
            members = [_definition(member, value, "    ", seen) for member, value in sorted(vars(thing).items())]
            bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
            head = f"class {name}({bases}):" if bases else f"class {name}:"
            body = "\n\n".join(filter(None, [doc, *members]))
            blocks.append(f"{head}\n{body}" if body else "")
        elif inspect.isbuiltin(thing):
            blocks.append(_definition(name, thing, "", seen))
    blocks = [block for block in blocks if block]
    return "\n\n".join([f"# module {module.__name__}", *blocks]) + "\n" if blocks else ""


def _definition(name: str, thing: Any, indent: str, seen: set[str]) -> str:
    """``def name(signature):`` with its docstring, or nothing for what is undocumented or a generic slot."""
    attribute = inspect.isgetsetdescriptor(thing) or inspect.ismemberdescriptor(thing)
    if isinstance(thing, types.WrapperDescriptorType) or not (attribute or callable(thing)):
        return ""
    doc = _quoted(thing, indent + "    ", seen)
    if not doc:
        return ""
    if attribute:
        return f"{indent}@property\n{indent}def {name}(self):\n{doc}"
    # The signature as its author wrote it. inspect.signature() would evaluate the defaults, and what comes out then
    # depends on addresses and on which modules happen to be imported.
    signature = getattr(thing, "__text_signature__", None) or "(...)"
    signature = re.sub(r"\$module(, /)?(, )?", "", signature).replace("$", "")
    return f"{indent}def {name}{signature}:\n{doc}"


def _quoted(thing: Any, indent: str, seen: set[str]) -> str:
    doc = getattr(thing, "__doc__", None)
    if not isinstance(doc, str) or not doc.strip() or doc in seen:
        return ""
    seen.add(doc)
    lines = f'"""{inspect.cleandoc(doc)}"""'.split("\n")
    return "\n".join(indent + line if line else "" for line in lines)
