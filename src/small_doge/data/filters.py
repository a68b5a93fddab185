"""Filters: texts that a recipe leaves out, each by a name under which the manifest counts them.

    filters: {min_characters: 200, max_repeated_lines: 0.3, gopher_repetition: true}

Lengths and repeated lines are ours; the rules of Gopher in full are datatrove's, one document at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UserError
from ..recipe import nearest

NAMES = ("min_characters", "max_characters", "max_repeated_lines", "gopher_repetition", "gopher_quality")
_GOPHER = {"gopher_repetition": "GopherRepetitionFilter", "gopher_quality": "GopherQualityFilter"}


def check_filters(spec: Any) -> dict[str, Any]:
    """The filters of a recipe with checked values, those that are off left out; UserError for anything else."""
    if spec is None:
        return {}
    if not isinstance(spec, Mapping):
        raise UserError(f"filters is a {type(spec).__name__}, expected a mapping of {', '.join(NAMES)}")
    for name, value in spec.items():
        if name not in NAMES:
            raise UserError(f"there is no filter `{name}`{nearest(str(name), NAMES)}, expected {', '.join(NAMES)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is None:
            continue
        if name in _GOPHER and not isinstance(value, bool):
            raise UserError(f"filter `{name}` is {value!r}, expected true or false")
        if name == "max_repeated_lines" and not (number and 0 <= value < 1):
            raise UserError(f"filter `{name}` is {value!r}, expected a share from 0 to below 1")
        if name.endswith("_characters") and not (number and value >= 1 and value == int(value)):
            raise UserError(f"filter `{name}` is {value!r}, expected a whole number above 0")
    checked = {name: spec[name] for name in NAMES if spec.get(name) not in (None, False)}
    if checked.get("min_characters", 0) > checked.get("max_characters", float("inf")):
        low, high = checked["min_characters"], checked["max_characters"]
        raise UserError(f"filters: min_characters is {low:,} and max_characters {high:,}, expected no less")
    for name in set(checked) & set(_GOPHER):
        _gopher(name)
    return checked


def make_filter(checked: Mapping[str, Any]) -> Callable[[str], str | None]:
    """A function that names the first filter a text fails, None if it passes; ``checked`` is from `check_filters`."""
    tests: list[tuple[str, Callable[[str], bool]]] = []
    low, high = checked.get("min_characters"), checked.get("max_characters")
    if low is not None:
        tests.append(("min_characters", lambda text: len(text) < low))
    if high is not None:
        tests.append(("max_characters", lambda text: len(text) > high))
    share = checked.get("max_repeated_lines")
    if share is not None:
        tests.append(("max_repeated_lines", lambda text: repeated_lines(text) > share))
    tests += [(name, _gopher(name)) for name in _GOPHER if name in checked]
    return lambda text: next((name for name, fails in tests if fails(text)), None)


def repeated_lines(text: str) -> float:
    """The share of a text's lines that repeat an earlier one, blank lines left out (Gopher's table allows 0.3)."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def _gopher(name: str) -> Callable[[str], bool]:
    try:
        from datatrove.data import Document
        from datatrove.pipeline import filters

        judge = getattr(filters, _GOPHER[name])()
        judge.filter(Document(text="Words.", id=""))  # it asks for its word tokenizer at the first text
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f'filter `{name}` is datatrove\'s; install it with `pip install "small-doge[filters]"` ({reason})'
        ) from None

    def fails(text: str) -> bool:
        verdict = judge.filter(Document(text=text, id=""))
        return not (verdict[0] if isinstance(verdict, tuple) else verdict)

    return fails
