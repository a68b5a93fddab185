"""Questions about the standard library, with its docstrings for answers: conversations and preferences for the demo.

    What does `shlex.quote` do?   →   Return a shell-escaped version of the string *s*.

The answer is the first paragraph of the docstring; in a preference the rejected one is that of another definition of
the same module. A definition is held out by a hash of its paragraph, so that definitions with the same words, as
`posixpath.isabs` and `ntpath.isabs` may have, are on one side, and every definition of a file that was held out from
pretraining is held out here. Neither question nor docstring of such a definition is in a training row, nor is its
docstring a rejected one there. What remains is that pretraining read the files most held-out docstrings stand in, as
source code: the rows say of each whether it did (``pretrained_on``).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import artifacts
from ..errors import UserError
from . import stdlib
from .corpora import Document, split_of

PHRASINGS = (
    "What does `{}` do?",
    "What is `{}` for?",
    "Explain `{}`.",
    "Tell me about `{}`.",
    "Describe `{}` from the standard library.",
)
CONVERSATIONS, PREFERENCES = "conversations", "preferences"
_LENGTHS = range(24, 241)  # characters of an answer: a paragraph that says something, and is soon learned


@dataclass(frozen=True)
class Definition:
    """A documented class, function or method: its dotted name, its module, the first paragraph of its docstring."""

    name: str
    module: str
    paragraph: str
    held_out: bool
    pretrained_on: bool  # whether its file is on the training side of the corpus

    @property
    def question(self) -> str:
        """One of ``PHRASINGS``, the same one for a name every time."""
        return PHRASINGS[_number(self.name) % len(PHRASINGS)].format(self.name)


@dataclass
class QuestionsRecipe:
    """Which definitions are held out, and where the questions go."""

    output_dir: str = field(metadata={"help": "folder for conversations/ and preferences/, train.jsonl and test.jsonl"})
    validation_fraction: float = field(default=0.1, metadata={"help": "share of the definitions held out"})
    corpus_validation_fraction: float = field(
        default=0.03, metadata={"help": "that of prepare.yaml: files held out there are held out here"}
    )
    rounds: int = field(
        default=1, metadata={"help": "times that siblings are put together anew for preferences to learn from"}
    )

    def __post_init__(self) -> None:
        for name in ("validation_fraction", "corpus_validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected 0 to less than 1")
        if self.rounds < 1:
            raise ValueError(f"`rounds` is {self.rounds}, expected at least 1")


def write_questions(recipe: QuestionsRecipe) -> Path:
    """Write the questions of the running Python's standard library; returns their folder.

    The same Python version gives the same files. Called again it returns at once.

    Raises:
        UserError: if the folder holds another run, or this Python's standard library has no source files.
    """
    started = time.perf_counter()
    output_dir = Path(recipe.output_dir)
    settings = {name: value for name, value in asdict(recipe).items() if name != "output_dir"}
    if artifacts.is_finished(output_dir, "questions", settings):
        print(f"{output_dir} holds these questions already")
        return output_dir
    found = definitions(recipe.validation_fraction, recipe.corpus_validation_fraction)
    sides = {"train": [d for d in found if not d.held_out], "test": [d for d in found if d.held_out]}
    if not all(sides.values()):
        raise UserError(f"of {len(found)} definitions one side has none: change `validation_fraction`")
    facts: dict[str, Any] = {}
    with artifacts.staged(output_dir) as partial:
        for kind in (CONVERSATIONS, PREFERENCES):
            for side, there in sides.items():
                rounds = recipe.rounds if side == "train" else 1
                rows = conversations(there) if kind == CONVERSATIONS else preferences(there, rounds)
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                path = partial / kind / f"{side}.jsonl"
                path.parent.mkdir(exist_ok=True)
                artifacts.write_text(path, "".join(lines))
                facts[f"{kind}_{side}"] = len(lines)
        facts["held_out_and_pretrained_on"] = sum(d.pretrained_on for d in sides["test"])
        artifacts.finish(partial, "questions", settings, time.perf_counter() - started, **facts)
    print(
        f"{len(sides['train']):,} definitions to learn from and {len(sides['test']):,} held out, of which pretraining "
        f"may have read {facts['held_out_and_pretrained_on']:,} in their files"
    )
    print(f"wrote {output_dir} in {artifacts.duration(time.perf_counter() - started)}")
    return output_dir


def conversations(found: list[Definition]) -> list[dict[str, Any]]:
    """A question and its answer for each definition."""
    rows = []
    for d in found:
        pair = [{"role": "user", "content": d.question}, {"role": "assistant", "content": d.paragraph}]
        rows.append({"messages": pair, "definition": d.name, "pretrained_on": d.pretrained_on})
    return rows


def preferences(found: list[Definition], rounds: int = 1) -> list[dict[str, Any]]:
    """The right paragraph over that of a sibling, for two siblings at a time, in an order by hash.

    Each of the two has the other's paragraph for its rejected answer, and their rows stand one after the other: in one
    step of training what could be learned of the answers alone cancels out, and only what the question says of them is
    left. A definition that is left over has no row. The first rows are a fair part of all, but for the order inside
    every 64 twos, which is by length: a batch of neighbours then holds little padding.

    Args:
        rounds: times that siblings are put together anew; twos that were together already are left out.
    """
    modules: dict[str, list[Definition]] = defaultdict(list)
    for d in found:
        modules[d.module].append(d)
    pairs, together = [], set()
    for i in range(rounds):
        twos = []
        for siblings in modules.values():
            mixed = sorted(siblings, key=lambda d: _number(f"{i} {d.name}"))
            for two in zip(mixed[::2], mixed[1::2], strict=False):
                names = frozenset(d.name for d in two)
                if names not in together:
                    together.add(names)
                    twos.append(two)
        twos.sort(key=lambda two: _number(two[0].name))
        for start in range(0, len(twos), 64):
            for one, other in sorted(twos[start : start + 64], key=lambda two: max(len(d.paragraph) for d in two)):
                for right, wrong in ((one, other), (other, one)):
                    pair = {"prompt": right.question, "chosen": right.paragraph, "rejected": wrong.paragraph}
                    pairs.append({**pair, "definition": right.name, "pretrained_on": right.pretrained_on})
    return pairs


def definitions(validation_fraction: float, corpus_validation_fraction: float) -> list[Definition]:
    """The documented public definitions of the corpus, one for each paragraph, in the order of the corpus."""
    root = stdlib.require_folder()
    found: dict[str, Definition] = {}  # by their paragraph, whatever its case and last stop
    names: set[str] = set()
    held_out: set[str] = set()
    for part in ("source", "docstrings"):
        for path, text in stdlib.read(part, root):
            unread = split_of(Document(path, text, ""), corpus_validation_fraction) == "validation"
            module = _module(path)
            for name, paragraph in _documented(text):
                full = name if module == "builtins" else f"{module}.{name}"
                key = paragraph.casefold().rstrip(".")
                if unread or split_of(Document("", key, ""), validation_fraction) == "validation":
                    held_out.add(key)
                if key in found:
                    if not unread:
                        found[key] = replace(found[key], pretrained_on=True)
                elif full not in names:
                    names.add(full)
                    found[key] = Definition(full, module, paragraph, False, not unread)
    return [replace(d, held_out=key in held_out) for key, d in found.items()]


def _module(path: str) -> str:
    """``stdlib/os/__init__.py`` is ``os``, ``docstrings/math`` is ``math``."""
    parts = path.removesuffix(".py").split("/")[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _documented(text: str) -> Iterator[tuple[str, str]]:
    """(dotted name inside the module, paragraph) of the public definitions that have a docstring of a fit length."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's strings
        try:
            # Modules written in C do not tell all their signatures, and the corpus then has what is no Python.
            tree = ast.parse(text.replace("(...):", "(*args):").replace("=<unrepresentable>", "=None"))
        except (SyntaxError, ValueError):
            return
    yield from _inside(tree, "")


def _inside(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and child.name[:1] != "_":
            name = prefix + child.name
            paragraph = first_paragraph(ast.get_docstring(child, clean=False) or "")
            if len(paragraph) in _LENGTHS:
                yield name, paragraph
            if isinstance(child, ast.ClassDef):
                yield from _inside(child, f"{name}.")


def first_paragraph(docstring: str) -> str:
    """The first paragraph of a docstring as one line; empty for what is a signature or a table and no sentence."""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip(), maxsplit=1)[0]
    line = " ".join(paragraph.split())
    return line if line[:1].isalpha() and " " in line and "->" not in line and ">>>" not in line else ""


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
