"""The Chinese pages beside the English ones; the training guide beside recipes, figures and command; the images' files.

A figure or a command that changes on one page fails here, under the name of its section, until it changes on the other.
"""

import csv
import re
import shlex
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import torch

from small_doge import cli, recipe
from small_doge.models import SIZES, DogeForCausalLM, config_for
from small_doge.training.estimates import largest_micro_batch, training_bytes
from test_cli import recipe_class
from test_docs import check

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "README_zh.md", "recipes/README.md": "recipes/README_zh.md"}
GUIDE, DOCKER = "recipes/README.md", "docker/README.md"
DENSE = ("20m", "60m", "160m", "320m")
NUMBER = re.compile(r"(?<![\d.])\d+(?:,\d{3})*(?:\.\d+)*(?:e-?\d+)?")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# In a message that the guide quotes: what the code puts in, and where it puts a message into another.
FILLED_IN = re.compile(r"…|\b(?:2,048|6|nan|learning_rate|this run)\b|(?<= has) |(?<=stopped: )")
COMMANDS = ("doge ", "pip ", "python ", "make ", "accelerate ", "docker ", "mkdir ", ".venv", "source ")


@dataclass
class Section:
    """What stands between two headings, code, tables and all else apart."""

    title: str
    level: int
    code: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)  # of all its tables, without the lines below their heads
    prose: str = ""


def sections(page: str) -> list[Section]:
    found, fenced = [Section("", 0)], False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        here = found[-1]
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            here.code.append(line.strip())
        elif line.startswith("#"):
            marks, title = line.split(" ", 1)
            found.append(Section(title, len(marks)))
        elif line.startswith("|"):
            if not set(line) <= set("|-: "):
                here.rows.append([cell.strip() for cell in line.strip("|").split("|")])
        else:
            here.prose += line + "\n"
    return found


def pairs(english: str) -> list[tuple[Section, Section]]:
    """Section beside section. The Chinese README may have the one on Docker before the English one does."""
    mine, theirs = sections(english), sections(PAGES[english])
    if not any(section.title == "Docker" for section in mine):
        theirs = [section for section in theirs if section.title != "Docker"]
    titles = [[section.title for section in page] for page in (mine, theirs)]
    assert [s.level for s in mine] == [s.level for s in theirs], titles
    return list(zip(mine, theirs, strict=True))


def what_runs(line: str) -> str:
    """A line of code without its remark; of a list of places, which is no code, the place."""
    line = re.split(r"\s+#\s", line)[0]
    python = re.match(r"(import|from|print|\w+ = )", line)
    return line if line.startswith(COMMANDS) or python else line.split("  ")[0]


def numbers(text: str) -> list[str]:
    text = LINK.sub("]", text)
    return NUMBER.findall(re.sub(r"https?://\S+", "", text))


@pytest.mark.parametrize("english", PAGES)
def test_both_languages_have_the_same_code(english):
    for mine, theirs in pairs(english):
        assert [what_runs(line) for line in theirs.code] == [what_runs(line) for line in mine.code], mine.title


@pytest.mark.parametrize("english", PAGES)
def test_both_languages_have_the_same_figures_in_every_row(english):
    for mine, theirs in pairs(english):
        assert len(mine.rows) == len(theirs.rows), mine.title
        for row, other in zip(mine.rows, theirs.rows, strict=True):
            assert [numbers(cell) for cell in other] == [numbers(cell) for cell in row], (mine.title, row, other)
            assert [cell.count("**") for cell in other] == [cell.count("**") for cell in row], (mine.title, row, other)


@pytest.mark.parametrize("english", PAGES)
def test_both_languages_have_the_same_figures_and_names_in_the_text(english):
    """In any order within a section: sentences are built differently."""
    for mine, theirs in pairs(english):
        assert Counter(numbers(theirs.prose)) == Counter(numbers(mine.prose)), mine.title
        quoted = [Counter(re.sub(r"\s+", " ", x) for x in re.findall(r"`([^`]+)`", s.prose)) for s in (theirs, mine)]
        assert quoted[0] == quoted[1], mine.title


@pytest.mark.parametrize("english", PAGES)
def test_both_languages_link_to_the_same_places_that_are_there(english):
    for mine, theirs in pairs(english):
        links = [Counter(LINK.findall(section.prose)) for section in (mine, theirs)]
        if not mine.title:
            assert links == [Counter({Path(PAGES[english]).name: 1}), Counter({Path(english).name: 1})]
            continue
        assert links[0] == links[1], mine.title
        for link in links[0]:
            assert link.startswith("http") or (ROOT / english).parent.joinpath(link).exists(), link


def doge_commands(page: str) -> list[list[str]]:
    """The words behind `doge`, also where accelerate or an image starts it."""
    found = []
    for words in (shlex.split(line, comments=True) for section in sections(page) for line in section.code):
        if words[0] in ("doge", "accelerate") or words[:2] == ["docker", "run"]:
            program = next(w for w in ("small_doge", "doge", "small-doge", "small-doge:gpu") if w in words)
            found.append(words[words.index(program) + 1 :])
    return found


@pytest.mark.parametrize("page", [GUIDE, DOCKER])
def test_every_command_parses(page, monkeypatch):
    """By the parser of the command and the fields of its recipe, so that no option is one that is not there."""
    monkeypatch.chdir(ROOT)
    commands = doge_commands(page)
    assert len(commands) > 3
    for words in commands:
        check(words, monkeypatch)


def test_every_option_in_the_text_is_a_field_of_some_stage():
    known = {field.name for stage in cli._STAGES for field in fields(recipe_class(stage))} | {"verbose", "help"}
    named = {name for section in sections(GUIDE) for name in re.findall(r"`[^`]*?--(\w+)", section.prose)}
    assert len(named) > 10
    assert named <= known


@pytest.mark.parametrize("page", [*PAGES, *PAGES.values(), DOCKER])
def test_every_recipe_and_file_it_names_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"(?:recipes|docker|benchmarks|experiments)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path


def table(title: str, *head: str) -> list[list[str]]:
    """The rows of the table under ``title`` in the guide whose head begins with ``head``."""
    (section,) = (s for s in sections(GUIDE) if s.title == title)
    rows = iter(section.rows)
    for row in rows:
        if row[: len(head)] == list(head):
            return [found for _, found in zip(range(4 if head[0] == "size" else 99), rows, strict=False)]
    raise AssertionError(f"{title} has no table that begins with {head}")


def value(text: str) -> float:
    return float(numbers(text)[0].replace(",", ""))


def of_size(size: str, stage: str) -> dict:
    return recipe.read_yaml(ROOT / "recipes" / f"doge-{size}" / f"{stage}.yaml")


def test_the_published_settings_are_those_of_the_recipes():
    rows = table("The published settings", "size", "learning rate")
    assert [row[0] for row in rows] == list(DENSE)
    for size, *cells in rows:
        yaml = of_size(size, "pretrain")
        names = ("learning_rate", "warmup_steps", "decay_steps", "max_steps", "tokens_per_step")
        assert [value(cell) for cell in cells[:5]] == [yaml[name] for name in names]
        assert cells[5] == f"{yaml['max_steps'] * yaml['tokens_per_step'] / 1e9:.1f} billion"
    for size, *cells in table("The published settings", "size", "SFT: learning rate"):
        sft, dpo = of_size(size, "sft"), of_size(size, "dpo")
        expected = [s[name] for s in (sft, dpo) for name in ("learning_rate", "tokens_per_step")]
        assert [value(cell) for cell in cells] == [*expected, dpo["beta"]]
        assert sft["num_train_epochs"] == dpo["num_train_epochs"] == 2
        assert sft["tokens_per_step"] == 128 * sft["max_length"]
        assert dpo["tokens_per_step"] == 128 * dpo["max_length"]


def parameters(size: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DogeForCausalLM(config_for(size, vocab_size=32768)).parameters())


def test_the_sizes_with_experts_are_those_of_the_recipes():
    for size, dense, experts, per_token, count, rate, steps, tokens in table("With experts", "size"):
        made, yaml = SIZES[size], of_size(size, "pretrain")
        assert (made["num_experts"], made["num_experts_per_tok"]) == (value(experts), value(per_token))
        assert made | SIZES[dense] == made
        assert count == f"{parameters(size) / 1e6:,.1f} M"
        names = ("learning_rate", "max_steps", "tokens_per_step")
        assert [value(rate), value(steps), value(tokens)] == [yaml[name] for name in names]
        assert all(yaml[name] == of_size(dense, "pretrain")[name] for name in names)


def test_the_hours_follow_from_the_measured_speed():
    with open(ROOT / "benchmarks" / "results" / "train_throughput_h200.csv", newline="", encoding="utf-8") as file:
        measured = [row for row in csv.DictReader(file) if row["model"] == "ours"]
    published = {"20m": "14", "60m": "128", "160m": "522", "320m": "1,856"}
    for size, speed, hours, on_a_4090 in table("Hardware and hours", "size", "tokens/s on one H200 (measured)"):
        rate = max(float(row["tokens_per_second"]) for row in measured if row["size"] == size)
        yaml = of_size(size, "pretrain")
        expected = yaml["max_steps"] * yaml["tokens_per_step"] / rate / 3600
        assert speed == f"{rate:,.0f}"
        assert hours == f"{expected:.{2 if expected < 1 else 1}f}"
        assert on_a_4090 == published[size]


def test_the_memory_is_that_of_the_estimate():
    for size, *cells in table("Hardware and hours", "size", "22 GiB free (a card of 24 GB)"):
        config, count = config_for(size, vocab_size=32768), parameters(size)
        rows = of_size(size, "pretrain")["tokens_per_step"] // 2048
        for free, cell in zip((22, 76), cells, strict=True):
            fits = largest_micro_batch(config, count, rows, 2048, True, True, free << 30)
            gib = training_bytes(config, count, fits, 2048, True, True) / 2**30
            assert cell == f"{fits} rows, {gib:.1f}", size


def test_what_preparing_takes_is_that_of_the_recipes():
    for size, tokens, text, disk, hours in table("Hardware and hours", "size", "tokens", "text read"):
        yaml = of_size(size, "prepare")
        remarks = (ROOT / "recipes" / f"doge-{size}" / "prepare.yaml").read_text(encoding="utf-8")
        assert tokens == f"{yaml['max_tokens'] / 1e9:.1f} billion"
        assert f"some {text} of text" in remarks
        assert f"{disk} on disk" in remarks
        assert hours == f"{yaml['max_tokens'] / 1.17e6 / 3600:.1f}"


def test_the_curve_is_the_measured_one():
    with open(ROOT / "experiments" / "pretrain_20m.csv", newline="", encoding="utf-8") as file:
        measured = [row for row in csv.DictReader(file) if row["run"] == "2026-11-30"]  # the table's
    rows = table("What the curves should look like", "step")
    assert len(rows) > 5
    for step, rate, loss, held_out, norm in rows:
        there = [row for row in measured if int(row["step"]) == value(step)]
        trained = next(row for row in there if row["loss"])
        looked = next((f"{float(row['eval_loss']):.2f}" for row in there if row["eval_loss"]), "")
        assert value(rate) == float(f"{float(trained['learning_rate']):.1e}")
        assert loss == f"{float(trained['loss']):.2f}"
        assert held_out == looked
        assert norm == f"{float(trained['grad_norm']):.2f}"


def test_quoted_messages_are_those_of_the_code():
    """What the guide quotes as *"…"* stands in the source; an ellipsis is whatever a message fills in."""
    paths = sorted((ROOT / "src").rglob("*.py"))
    source = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    source = re.sub(r'(?<!\\)["\']\s*\n\s*f?["\']', "", source)  # strings that go on in the next line
    source = re.sub(r"\{[^{}]*\}", "…", source.replace("{{% generation %}}", "…"))
    quoted = [q for section in sections(GUIDE) for q in re.findall(r'\*"([^"]+)"\*', section.prose)]
    assert len(quoted) > 10
    for message in quoted:
        message = re.sub(r"\s+", " ", message).replace("{% generation %}", "…")
        for part in FILLED_IN.split(message):
            assert part.strip(" ;,.") in source, (message, part)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_an_image_copies_what_is_there_and_does_not_run_as_root(name):
    lines = (ROOT / "docker" / name).read_text(encoding="utf-8").splitlines()
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"src", "recipes", "pyproject.toml"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists()
        assert f"!{path}" in allowed
    (base,) = (line.split()[1] for line in lines if line.startswith("FROM "))
    assert not base.endswith(":latest")
    assert ":" in base
    (user,) = (line.split()[1] for line in lines if line.startswith("USER "))
    assert user.split(":")[0] not in ("0", "root")


def test_the_images_commands_are_the_same_on_every_page():
    theirs = {line for section in sections(DOCKER) for line in section.code}
    for page in ("README.md", "README_zh.md"):
        for section in sections(page):
            if section.title == "Docker":
                assert set(filter(None, section.code)) <= theirs
