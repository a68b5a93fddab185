"""The documentation: its commands are the program's, its pages are reached, its pictures are drawn by our code."""

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import yaml

from small_doge import cli, recipe
from test_cli import recipe_class

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def load(name):
    """A script of the documentation, as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands(text):
    """The lines that run the program: `doge …` and `accelerate launch … -m small_doge …`, as lists of words."""
    lines = [line.strip() for line in text.splitlines()]
    for line in lines:
        if line.startswith("doge ") or re.match(r"accelerate launch .*-m small_doge ", line):
            words = shlex.split(line, comments=True)
            yield words[words.index("doge" if words[0] == "doge" else "small_doge") + 1 :]


def check(words, monkeypatch):
    """Let the program read a command up to where it would begin, fields and their types included."""
    seen = {}
    monkeypatch.setattr(cli, "_run", lambda known, rest: seen.update(known=known, rest=rest) or 0)
    assert cli.main(words) == 0, words
    stage = seen["known"].stage
    fields = cli._overrides(seen["rest"], *cli._STAGES[stage][4])
    on_cpu = {"use_cpu": True} if stage == "pretrain" else {}  # or bf16 is refused on a machine without a GPU
    recipe.load(recipe_class(stage), seen["known"].config, fields | on_cpu)


COMMANDS = [(page.relative_to(ROOT).as_posix(), words) for page in PAGES for words in commands(page.read_text("utf-8"))]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{p}: {' '.join(w)[:60]}" for p, w in COMMANDS])
def test_every_command_is_one_that_the_program_takes(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are named from there
    monkeypatch.setenv("DOGE_API_KEY", "a key")
    check(words, monkeypatch)


def test_there_are_commands_of_most_stages():
    assert len(COMMANDS) > 30
    assert {words[0] for _, words in COMMANDS} >= cli._STAGES.keys() - {"demo", "report", "questions", "arithmetic"}


@pytest.mark.parametrize(
    "words", ["pretrain --dat x", "evaluate m --suite doge-base --limit many", "sft --config recipes/none.yaml"]
)
def test_a_wrong_command_is_caught(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception, match=r"unknown field|expected a whole number|does not exist"):
        check(words.split(), monkeypatch)


def in_nav(item):
    if isinstance(item, str):
        return {item}
    return set().union(*map(in_nav, item if isinstance(item, list) else item.values()))


def test_every_page_is_in_the_navigation():
    nav = in_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    made = {target for target in nav if target.startswith("reference/")}  # by docs/site_hooks.py
    assert nav - made == {page.relative_to(DOCS).as_posix() for page in PAGES}


def test_pictures_and_pages_that_are_referred_to_exist():
    shown = set()
    for page in PAGES:
        for bang, words, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
            if re.match(r"\w+:", target) or "reference/" in target:
                continue
            path = (page.parent / target).resolve()
            assert path.is_file(), f"{page.name}: {target}"
            if bang:
                assert len(words) > 40, f"{page.name}: {target} has no words for who cannot see it"
                shown |= {path.stem} if path.parent == DOCS / "images" else set()
    assert shown == load("figures").FIGURES.keys() == {path.stem for path in (DOCS / "images").iterdir()}


@pytest.mark.parametrize("name", list(load("figures").FIGURES))
def test_pictures_are_what_the_code_draws(name):
    """Each function compares what it draws with the reference, too."""
    figures = load("figures")
    drawn, there = figures.to_svg(figures.FIGURES[name]()), (DOCS / "images" / f"{name}.svg").read_text("utf-8")
    pinned = re.search(r"^matplotlib==([\d.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    if matplotlib.__version__ != pinned[1]:
        pytest.skip(f"the pictures were drawn with matplotlib {pinned[1]}: another one places words otherwise")
    lines = [
        [float(x) for x in re.findall(r"-?[\d.]+", " ".join(re.findall(r' d="([^"]*)"', t)))] for t in (drawn, there)
    ]
    assert len(lines[0]) == len(lines[1])
    assert lines[0] == pytest.approx(lines[1], abs=0.02)


@pytest.mark.parametrize("stage", cli._STAGES)
def test_the_page_of_a_stage_has_every_field_of_ours(stage):
    cls = recipe_class(stage)
    page = load("site_hooks").command_page(stage)
    inherited = {f.name for base in cls.__mro__[1:] if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
    for field in dataclasses.fields(cls):
        if field.name not in inherited:
            assert f"\n`{field.name}` · " in page
            assert field.metadata["help"] in page
    assert str(ROOT) not in page


def test_every_public_module_is_on_one_page():
    hooks = load("site_hooks")
    shown = [name for part, _ in hooks.PARTS.values() for name in hooks.modules(part)]
    there = set()
    for path in (ROOT / "src" / "small_doge").rglob("*.py"):
        if not path.stem.startswith(("triton_", "__main__")):
            parts = path.relative_to(ROOT / "src").with_suffix("").parts
            there.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert sorted(shown) == sorted(there)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_nothing_of_other_places(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="([^"]*)"', page.read_text("utf-8"))
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page
