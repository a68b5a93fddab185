"""Recipes: commented YAML files whose fields are those of a stage's dataclass, overridden from the command line.

A stage declares a dataclass; each field carries its help text in ``metadata={"help": …}``. This module turns
``--config x.yaml --field value …`` into an instance of it, and every mistake into one sentence. It imports neither
torch nor transformers, so that ``doge --help`` is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import UserError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``8e-3`` as text (it wants ``8.0e-3``); this loader reads it as the number it is."""


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    text = loader.construct_scalar(node)
    try:
        return float(text.replace("_", ""))
    except ValueError:
        return text


_Loader.add_constructor("tag:small-doge/float", _number)
_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:small-doge/float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def described(text: str, default: Any = None) -> Any:
    """A dataclass field with its help text; of a list every instance gets its own copy."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


class Word(str):
    """A value as typed on the command line: what it means depends on the type of its field."""

    def read(self, options: tuple[Any, ...]) -> Any:
        """The value for a field of one of the types ``options``.

        Text stays as typed, so that a prompt of ``no`` or ``1e3`` is that prompt; anything else is read as YAML.
        """
        bases = [typing.get_origin(option) or option for option in options]
        try:
            value = yaml.load(str(self), _Loader)  # noqa: S506 - _Loader is a SafeLoader
        except yaml.YAMLError:
            return str(self)
        if str not in bases or (value is None and type(None) in bases):
            return value
        return value if isinstance(value, (list, dict)) and type(value) in bases else str(self)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a recipe file.

    Raises:
        UserError: if the file is missing, is not YAML, or is not a mapping of fields to values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read as text: {error}") from None
    try:
        content = yaml.load(text, _Loader)  # noqa: S506
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"recipe {path} is not YAML{where}: {getattr(error, 'problem', error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} holds a {type(content).__name__}, expected lines of `field: value`")
    return content


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A hint at the known name closest to ``name``: ``" (did you mean …?)"``, or an empty string."""
    known = list(known)
    abbreviated = [k for k in known if name == "".join(part[:1] for part in k.split("_"))]  # lr: learning_rate
    close = abbreviated or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f" (did you mean `{close[0]}`?)" if close else ""


def build(cls: type[T], values: dict[str, Any], source: str = "the recipe") -> T:
    """Make a recipe of dataclass ``cls`` from plain values, with types checked.

    Raises:
        UserError: for an unknown field (naming the nearest known one), a missing field or a value of a wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{source} has an unknown field `{name}`{nearest(name, fields)}")
        checked[name] = _coerce(value, hints[name], f"{source}: field `{name}`")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in checked:
            raise UserError(f"{source} lacks the field `{name}`: {f.metadata.get('help', 'it has no default')}")
    try:
        return cls(**checked)
    except ValueError as error:
        # TrainingArguments and our own dataclasses check combinations of fields when they are made.
        raise UserError(f"{source}: {error}") from error


def load(cls: type[T], config: str | Path | None, overrides: dict[str, Any] | None = None) -> T:
    """Read ``config`` (a YAML file, or None) and lay ``overrides`` over it."""
    values = read_yaml(config) if config else {}
    return build(cls, {**values, **(overrides or {})}, source=f"recipe {config}" if config else "the command line")


def plain(recipe: Any) -> dict[str, Any]:
    """The fields of a recipe as plain values, for writing beside what it made."""
    return {f.name: _plain(getattr(recipe, f.name)) for f in dataclasses.fields(recipe) if f.init}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Check ``value`` against a type hint; whole floats become ints, ints become floats, numbers become strings."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, Word):
        value = value.read(options)
    if value is None and type(None) in options:
        return None
    for option in options:
        base = typing.get_origin(option) or option
        if base is Any or (base in (list, dict, str, bool) and isinstance(value, base)):
            return value
        if base is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif base is int and isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
            return int(value)
        elif base is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        elif isinstance(base, type) and base not in (int, float, bool, str, list, dict) and isinstance(value, base):
            return value
    if str in options and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    simple = (int, float, bool, str, list, dict, type(None))
    if isinstance(value, str) and any(isinstance(o, type) and o not in simple for o in options):
        return value  # enums and paths of TrainingArguments, which it converts itself
    raise UserError(f"{where} is {value!r}, expected {_name(hint)}")


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
    names |= {dict: "a mapping", type(None): "null"}
    return " or ".join(
        _name(o) if typing.get_origin(o) is typing.Literal else names.get(typing.get_origin(o) or o, str(o))
        for o in options
    )
