"""Pages of the reference, made while the site is built: recipe fields of every stage, and modules of the package.

mkdocs calls the functions named ``on_…``. The fields come from the dataclasses that the command itself reads, so the
pages say what ``doge STAGE --help`` says; the modules' pages are instructions for mkdocstrings, which reads docstrings
from the sources.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import itertools
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src"
COMMANDS, PYTHON = "reference/commands", "reference/python"
FIGURES = "studies/figures"
OUTSIDE = re.compile(r"(?<=\]\()\.\./\.\./((?:experiments|benchmarks/results)/[\w.]+\.(?:png|csv))(?=\))")
# Page: the package whose modules it shows. Kernels (triton_…) are reached through the functions beside them.
PARTS = {
    "ops_dynamic_mask": ("ops.dynamic_mask", "attention: the dispatcher, its paths, eviction times"),
    "ops_product_key": ("ops.product_key", "experts: retrieval, computation, balance"),
    "ops": ("ops", "loss and SwiGLU"),
    "models": ("models", "configuration, model, cache, sizes, growing"),
    "data": ("data", "corpora, tokenizer, packing, conversations, preferences"),
    "training": ("training", "recipes, optimiser, schedule, pretraining, SFT, DPO, GRPO"),
    "evaluation": ("evaluation", "bits per byte, suites of tasks, recall, use of experts"),
    "inference": ("inference", "generation, chat, quantising, speed"),
    "inference_engine": ("inference.engine", "the engine for CPUs"),
    "inference_serve": ("inference.serve", "the server"),
    "report": ("report", "pictures and the page about a run"),
    "rest": ("", "recipes, folders, errors, the command"),
}
COMMANDS_TEXT = """# Recipe fields

A recipe is a YAML file of `field: value`, given as `--config`. Any field is an option too, and an option overrides the
recipe: `--field value`, `--field=value`, or `--field` alone for true. Lists and mappings are written as in YAML:
`--lengths "[128, 256]"`. An unknown field or a wrong type is an error that names it. `doge STAGE --help` lists the same
fields.

| stage | what it does |
|---|---|
"""
PYTHON_TEXT = """# Python

`import small_doge` registers the model with transformers, so that

```python
import small_doge
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("runs/demo/pretrain")
```

opens a Doge model. Docstrings give shapes in the letters of the formulas: B rows, T tokens, H query heads, G key/value
heads, M score heads, D head size, C hidden size.

| part of `small_doge` | what is in it |
|---|---|
"""


def stages() -> dict[str, tuple[str, str, str, str, tuple[str, ...]]]:
    """The stages of ``doge``: module, recipe, function, what it does, and fields that need no name."""
    if str(SOURCES) not in sys.path:
        sys.path.insert(0, str(SOURCES))
    return importlib.import_module("small_doge.cli")._STAGES


def on_config(config: Any) -> Any:
    """Put the pages that are about to be made into the navigation."""
    pages = {
        COMMANDS: [COMMANDS + "/index.md", *({f"doge {name}": f"{COMMANDS}/{name}.md"} for name in stages())],
        PYTHON: [PYTHON + "/index.md", *({title(part): f"{PYTHON}/{page}.md"} for page, (part, _) in PARTS.items())],
    }
    for item in config.nav:
        for name, target in item.items():
            if isinstance(target, str):
                item[name] = pages.get(target, target)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Make the pages."""
    from mkdocs.structure.files import File

    made = {f"{COMMANDS}/index.md": commands_index(), f"{PYTHON}/index.md": python_index()}
    made |= {f"{COMMANDS}/{name}.md": command_page(name) for name in stages()}
    made |= {f"{PYTHON}/{page}.md": python_page(part, what) for page, (part, what) in PARTS.items()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    for path in figures():
        files.append(File.generated(config, f"{FIGURES}/{path.name}", abs_src_path=str(path)))
    return files


def figures() -> list[Path]:
    """The pictures and tables of studies, which lie beside the scripts that made them."""
    pages = (page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "studies").glob("*.md")))
    named = dict.fromkeys(name for page in pages for name in OUTSIDE.findall(page))
    return [ROOT / name for name in named]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page of a study names its pictures where they are in the repository; the site has them in a folder."""
    return OUTSIDE.sub(lambda found: f"figures/{Path(found[1]).name}", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """What Markdown cannot say.

    Roles such as ``:func:`` before a name, and the double colon before an indented block, are for other readers of a
    docstring. A browser breaks lines behind any hyphen: words of a command are kept whole.
    """
    html = re.sub(r":(?:func|class|meth|mod|attr|data):(?=<code>)", "", html)
    html = re.sub(r"::(?=</p>)", ":", html)
    return re.sub(r'(?<=<div class="language-sh highlight">).*?(?=</div>)', whole_words, html, flags=re.DOTALL)


def whole_words(block: re.Match[str]) -> str:
    """A highlighted command whose words up to 36 letters, what fits on a phone, have no place to break."""
    word = re.compile(r"[^\s<>]*-[^\s<>]*")

    def keep(text: re.Match[str]) -> str:
        return word.sub(lambda w: f'<span class="whole">{w[0]}</span>' if len(w[0]) <= 36 else w[0], text[0])

    return re.sub(r"(?<=>)[^<]+", keep, block[0])


def commands_index() -> str:
    rows = [f"| [`doge {name}`]({name}.md) | {what} |" for name, (*_, what, _) in stages().items()]
    return COMMANDS_TEXT + "\n".join(rows) + "\n"


def command_page(name: str) -> str:
    """The fields of one stage's recipe, ours first named, with types, defaults and meanings."""
    module, recipe, _, what, bare = stages()[name]
    usage = " ".join([f"doge {name}", *(f"[{field.upper()}]" for field in bare)])
    lines = [f"# doge {name}", "", f"{what[0].upper()}{what[1:]}.", ""]
    lines += ["```sh", f"{usage} [--config RECIPE.yaml] [--field value …] [--verbose]", "```", ""]
    try:
        cls = getattr(importlib.import_module(f"small_doge.{module}"), recipe)
    except importlib.import_module("small_doge.errors").UserError as error:  # Python 3.10 has no TRL
        return "\n".join([*lines, f"The fields are not listed here: {error}.", ""])
    for field in own_fields(cls):
        lines += [f"`{field.name}` · {kind(cls, field.name)}, {default(field)}", f":   {field.metadata['help']}", ""]
    beyond = [base for base in cls.__mro__[1:] if dataclasses.is_dataclass(base) and not ours(base)]
    if beyond:
        known = " and of ".join(f"{base.__module__.split('.')[0]}'s `{base.__name__}`" for base in beyond[:1])
        lines += [f"Every other field of {known} may stand in the recipe too.", ""]
    path = recipes_of(name)
    if path:
        lines += ["## A recipe", "", f"`{path.relative_to(ROOT).as_posix()}`:", "", "```yaml"]
        lines += [*path.read_text(encoding="utf-8").rstrip().splitlines(), "```", ""]
    return "\n".join(lines)


def recipes_of(name: str) -> Path | None:
    """The recipe to show: the smallest size's, if it has one."""
    path = ROOT / "recipes" / "doge-tiny" / f"{name}.yaml"
    return path if path.is_file() else None


def ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "small_doge"


def own_fields(cls: type) -> list[dataclasses.Field]:
    """The fields that a class of this project declares, in their order, each with its help."""
    # In the order they are written in: that of `dataclasses.fields` begins with what a base class names.
    named = dict.fromkeys(name for base in cls.__mro__ if ours(base) for name in vars(base).get("__annotations__", {}))
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    fields = [known[name] for name in named if name in known]
    silent = [f.name for f in fields if "help" not in f.metadata]
    if silent:
        raise ValueError(f"fields of {cls.__name__} without help: {', '.join(silent)}")
    return fields


def kind(cls: type, name: str) -> str:
    """The type of a field, in the words that a mistake in a recipe is answered with."""
    hint = typing.get_type_hints(cls)[name]
    return "anything" if hint is typing.Any else importlib.import_module("small_doge.recipe")._name(hint)


def default(field: dataclasses.Field) -> str:
    """What a field is where a recipe leaves it out."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, str) and Path(value).is_absolute():  # of this machine
        value = Path(value).relative_to(ROOT).as_posix()
    plain = isinstance(value, str) and value and "\n" not in value
    return f"default `{value if plain else json.dumps(value, ensure_ascii=False)}`"


def title(part: str) -> str:
    return f"small_doge.{part}" if part else "small_doge"


def python_index() -> str:
    rows = [f"| [`{part or 'small_doge'}`]({page}.md) | {what} |" for page, (part, what) in PARTS.items()]
    return PYTHON_TEXT + "\n".join(rows) + "\n"


def python_page(part: str, what: str) -> str:
    """Instructions for mkdocstrings to show each public module of a package; the package itself first."""
    lines = [f"# {title(part)}", "", f"{what[0].upper()}{what[1:]}.", ""]
    for name in modules(part):
        lines += [f"::: {name}", "    options:", f"      members: {json.dumps(defined(name))}", ""]
        for stage, (module, recipe, *_) in stages().items():
            if name == f"small_doge.{module}":
                lines += [f"The fields of `{recipe}` are those of [`doge {stage}`](../commands/{stage}.md).", ""]
    return "\n".join(lines)


def defined(name: str) -> list[str] | bool:
    """Public names with a docstring that a module defines; what a package takes in stands where it comes from.

    Recipes are left out: they have pages of their own.
    """
    path = SOURCES.joinpath(*name.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8"))
    names: list[str] = []
    for node, after in itertools.zip_longest(tree.body, tree.body[1:]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names += [node.name] if ast.get_docstring(node) and not is_recipe(node) else []
        elif isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):  # a string behind an assignment
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")] or False


def is_recipe(node: ast.AST) -> bool:
    """Whether a class has fields with help, written as in `small_doge.recipe`."""
    values = [
        ast.unparse(one.value) for one in getattr(node, "body", []) if isinstance(one, ast.AnnAssign) and one.value
    ]
    return any(value.startswith("described(") or "metadata={'help'" in value for value in values)


def modules(part: str) -> list[str]:
    """Names of a package and of the modules right in it."""
    package = f"small_doge.{part}" if part else "small_doge"
    folder = SOURCES.joinpath(*package.split("."))
    inside = [p.stem for p in sorted(folder.glob("*.py")) if not p.stem.startswith(("_", "triton_"))]
    return [package, *(f"{package}.{name}" for name in inside)]
