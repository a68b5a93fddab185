"""The command: quick help, recipes with overrides, one sentence a mistake, and nothing changed on disk by one."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from small_doge import cli, recipe
from small_doge.errors import UserError

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("doge-*/*.yaml"))
STAGE_OF = {"tokenizer": "tokenizer", "prepare": "prepare", "pretrain": "pretrain"}
STAGE_OF |= {"evaluate": "evaluate", "report": "report", "sft": "sft", "dpo": "dpo"}
STAGE_OF |= {"questions": "questions", "answers": "answers", "arithmetic": "arithmetic", "grpo": "grpo"}


def doge(*words, **options):
    """Run the command as a user does; returns the finished process."""
    command = [sys.executable, "-m", "small_doge", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def recipe_class(stage):
    if stage in ("sft", "dpo", "grpo"):
        pytest.importorskip("trl", reason="TRL runs on Python 3.11 and newer")
    module, name, *_ = cli._STAGES[stage]
    return getattr(importlib.import_module(f"small_doge.{module}"), name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_recipe_is_valid_and_commented(path):
    on_cpu = {"use_cpu": True} if path.stem == "pretrain" else {}  # or bf16 is refused on a machine without a GPU
    recipe.load(recipe_class(STAGE_OF[path.stem]), path, on_cpu)
    assert path.read_text(encoding="utf-8").startswith("#")


def test_there_are_recipes():
    assert {p.stem for p in RECIPES if p.parent.name == "doge-tiny"} == set(STAGE_OF)


@pytest.mark.parametrize("stage", cli._STAGES)
def test_every_field_has_help(stage, capsys):
    cls = recipe_class(stage)
    inherited = {f.name for base in cls.__mro__[1:] if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
    for field in dataclasses.fields(cls):
        assert "help" in field.metadata or field.name in inherited, field.name
    assert cli.main([stage, "--help"]) == 0
    assert f"usage: doge {stage}" in capsys.readouterr().out


def test_help_imports_neither_torch_nor_transformers():
    code = "import sys; sys.argv = ['doge', '--help']\nfrom small_doge.cli import main\ntry: main()\n"
    code += "finally: print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pretrain" in done.stdout
    assert done.stderr.strip().endswith("[]")


def test_importing_the_package_registers_the_model():
    code = "import small_doge\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
    code += "config = AutoConfig.for_model('doge', vocab_size=64, hidden_size=8, num_attention_heads=2)\n"
    code += "config.num_hidden_layers = 1\nprint(type(AutoModelForCausalLM.from_config(config)).__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "small_doge.models.modeling_doge"


@dataclasses.dataclass
class Sample:
    size: int = dataclasses.field(metadata={"help": "how large"})
    rate: float = 1e-3
    name: str | None = None
    names: list[str] = dataclasses.field(default_factory=list)
    on: bool = False


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        *[("rate", "8e-3", 8e-3), ("rate", "1e3", 1000.0), ("size", "-2", -2), ("on", "true", True)],
        *[("name", "null", None), ("name", "no", "no"), ("name", "1e3", "1e3"), ("name", "[a, b]", "[a, b]")],
        *[("name", "x: [", "x: ["), ("names", "[a, b]", ["a", "b"])],
    ],
)
def test_words_on_the_command_line_are_read_as_a_person_means_them(field, text, value):
    made = recipe.build(Sample, {"size": 1, field: recipe.Word(text)})
    assert getattr(made, field) == value
    assert type(getattr(made, field)) is type(value)


@pytest.mark.parametrize(
    "words", [["no", "--model", "m", "--stream"], ["--model", "m", "no", "--stream"], ["--stream", "--model=m", "no"]]
)
def test_a_prompt_may_stand_anywhere(words):
    assert cli._overrides(words, "prompt") == {"prompt": "no", "model": "m", "stream": True}


def test_fields_are_checked_and_converted():
    made = recipe.build(Sample, {"size": 4.0, "rate": 2, "name": 7, "names": ["a"], "on": True})
    assert made == Sample(4, 2.0, "7", ["a"], True)
    assert isinstance(made.size, int)
    for values, message in [
        ({}, "lacks the field `size`: how large"),
        ({"size": 1, "rats": 2}, r"unknown field `rats` \(did you mean `rate`\?\)"),
        ({"size": 1, "n": 2}, r"unknown field `n` \(did you mean `name`\?\)"),
        ({"size": "many"}, r"`size` is 'many', expected a whole number"),
        ({"size": 1.5}, r"`size` is 1.5, expected a whole number"),
        ({"size": True}, r"`size` is True, expected a whole number"),
        ({"size": 1, "on": "yes please"}, r"`on` is 'yes please', expected true or false"),
        ({"size": 1, "names": "a"}, r"`names` is 'a', expected a list"),
    ]:
        with pytest.raises(UserError, match=message):
            recipe.build(Sample, values)


def test_recipe_files_that_cannot_be_read(tmp_path):
    for content, message in [
        ("a: [1", "is not YAML at line"),
        ("- a\n", "holds a list"),
        ("just words", "holds a str"),
    ]:
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(UserError, match=message):
            recipe.read_yaml(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="does not exist"):
        recipe.read_yaml(tmp_path / "y.yaml")


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


MISTAKES = {
    "no such corpus": (["tokenizer", "--output_dir", "out", "--corpus", "nowhere.txt"], "nowhere.txt"),
    "empty corpus": (["tokenizer", "--output_dir", "out", "--corpus", "empty.txt"], "empty.txt"),
    "not text": (["tokenizer", "--output_dir", "out", "--corpus", "binary.txt"], "binary.txt is not UTF-8 text"),
    "not JSON": (["tokenizer", "--output_dir", "out", "--corpus", "broken.jsonl"], "broken.jsonl"),
    "its line": (["tokenizer", "--output_dir", "out", "--corpus", "broken.jsonl"], "line 2"),
    "no text field": (
        ["tokenizer", "--output_dir", "out", "--corpus", "{path: good.jsonl, text_field: body}"],
        "title",
    ),
    "unknown field": (["prepare", "--outptu_dir", "out"], "did you mean `output_dir`?"),
    "another run": (["tokenizer", "--output_dir", "taken", "--corpus", "some.txt"], "taken holds files"),
    "no such model": (["generate", "x", "--model", "nowhere"], "nowhere does not exist"),
    "nothing to evaluate": (
        ["evaluate", "--model", "nowhere", "--data", "no", "--output_dir", "out"],
        "nowhere holds no model",
    ),
    "no run": (["report", "nowhere"], "nowhere"),
    "unknown recipe": (["pretrain", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    "stray word": (["prepare", "stray"], "found 'stray', expected `--field value`"),
    "nothing to do": (["pretrain", "--output_dir", "out"], "`data` is not set"),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    (folder / "empty.txt").write_text("")
    (folder / "some.txt").write_text("some text")
    (folder / "binary.txt").write_bytes(b"\x00\xff\xfe\x80")
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "good.jsonl").write_text('{"text": "fine", "title": "t"}\n')
    (folder / "taken").mkdir()
    (folder / "taken" / "mine.txt").write_text("mine")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_changes_nothing(desk, mistake, monkeypatch, capsys):
    words, expected = MISTAKES[mistake]
    monkeypatch.chdir(desk)
    before = files(desk)
    assert cli.main(words) == 1
    said = capsys.readouterr().err.strip()
    assert expected in said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1
    assert files(desk) == before
    assert not (desk / "out").exists()


def test_the_process_exits_with_status_one_and_verbose_shows_the_traceback(desk):
    quiet = doge("tokenizer", "--output_dir", "out", "--corpus", "nowhere.txt", cwd=desk)
    assert quiet.returncode == 1
    assert "Traceback" not in quiet.stderr
    verbose = doge("tokenizer", "--output_dir", "out", "--corpus", "nowhere.txt", "--verbose", cwd=desk)
    assert verbose.returncode == 1
    assert "Traceback" in verbose.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file size are POSIX's")
def test_a_disk_that_fills_is_one_sentence(tmp_path):
    """A limit on the size of files stands in for a full disk: the write fails in the same place."""
    (tmp_path / "text.txt").write_text("some words that repeat and repeat\n" * 20000)
    code = "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\nfrom small_doge.cli import main\nsys.exit(main())"
    words = ["tokenizer", "--output_dir", "out", "--corpus", "text.txt", "--vocab_size", "280"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--validation_fraction", "0"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_the_demo_is_the_recipes_of_doge_tiny():
    """No recipe of the demo differs from what each stage would do alone: it changes folders and minutes only."""
    source = (ROOT / "src" / "small_doge" / "demo.py").read_text(encoding="utf-8")
    for name in STAGE_OF.keys() - {"sft", "dpo", "grpo", "arithmetic"}:  # where the demo does not go yet
        assert f'settings("{name}"' in source
    for path in RECIPES:
        if path.parent.name == "doge-tiny":
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            assert json.dumps(content)


BARS = """
import sys, time
sys.argv = ["doge"]
from small_doge import cli
cli.main(["info", "no-such-model"])
from datasets import Dataset
from tqdm import tqdm
from transformers.utils.logging import tqdm as theirs
Dataset.from_list([{"a": 1}] * 9).map(lambda row: row)
list(tqdm(range(9)))
list(theirs(range(9)))
for _ in tqdm(range(40), disable=False):  # as TRL asks for the one over the reference's log-probabilities
    time.sleep(0.01)
"""


def test_a_log_has_no_progress_bars():
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    done = subprocess.run([sys.executable, "-c", BARS], env=variables, capture_output=True, text=True, check=True)
    assert "9/9" not in done.stderr
    assert done.stderr.count("/40 [") == 2  # where it begins and where it ends
