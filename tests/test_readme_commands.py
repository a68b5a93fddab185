"""The commands of README.md and CONTRIBUTING.md: the program takes them, and what they name is there."""

import re
from pathlib import Path

import pytest

from test_docs import check, commands

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")
COMMANDS = [(page, words) for page in PAGES for words in commands((ROOT / page).read_text("utf-8"))]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{p}: {' '.join(w)[:60]}" for p, w in COMMANDS])
def test_the_program_takes_the_command(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(words, monkeypatch)


def test_there_are_commands():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_is_there(page):
    text = (ROOT / page).read_text("utf-8")
    for path in re.findall(r"(?<![\w/])(?:recipes|docs|docker|benchmarks|experiments|tests|src)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
