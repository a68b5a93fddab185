"""The notebooks: their code runs, from text to conversation, they are what their source says, and show a whole run."""

import ast
import base64
import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("build_notebook", ROOT / "examples" / "build_notebook.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

TOPICS = {"name": "stdlib", "parts": ["topics"]}
SMALLER = {
    "tokenizer": {"corpus": TOPICS, "vocab_size": 600, "validation_fraction": 0.1},
    "prepare": {"corpus": TOPICS, "row_length": 64, "validation_fraction": 0.1},
    "pretrain": {"max_minutes": None, "max_steps": 4, "logging_steps": 2, "tokens_per_step": 512, "eval_rows": 4},
    "questions": {"validation_fraction": 0.9, "rounds": 1},
    "sft": {"max_steps": 2, "eval_rows": 4},
    "dpo": {"max_steps": 1, "eval_rows": 4, "max_length": 512, "tokens_per_step": 4096},
    "evaluate": {"max_documents": 2},
    "answers": {"rows": 8, "asked": 2, "shown": 1, "max_new_tokens": 6},
}


def read(language):
    return json.loads(build.FILES[language].read_text(encoding="utf-8"))


def cells(language, kind):
    return [cell for cell in read(language)["cells"] if cell["cell_type"] == kind]


def sources(found):
    return ["".join(cell["source"]) for cell in found]


@pytest.fixture
def shown(monkeypatch):
    """IPython's Image as far as the cells need it, so that the tests need no IPython."""
    pictures = []

    class Image:
        def __init__(self, data, alt):
            pictures.append(data)

    package, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    package.version_info = (9, 0)  # matplotlib asks
    display.Image = Image
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return pictures


def test_the_code_runs_from_the_first_cell_to_the_last(shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOGE_NOTEBOOK_FIELDS", json.dumps(SMALLER))
    # Transformers replies here: compiling the engine, where nothing is cached, takes longer than all the cells.
    monkeypatch.setattr("small_doge.inference.chat.open_engine", lambda *_: None)
    taught = importlib.util.find_spec("trl") is not None
    namespace = {}
    for number, cell in enumerate(cells("en", "code"), 1):
        if taught or build.ALIGN not in cell["metadata"].get("tags", []):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)  # noqa: S102
    said = capsys.readouterr().out
    assert "bits per byte" in said
    assert len(shown) == 5
    assert all(picture.startswith(b"\x89PNG") for picture in shown)
    run = tmp_path / namespace["RUN"]
    stages = ["tokenizer", "data", "pretrain", "evaluation"] + taught * ["questions", "sft", "dpo", "answers"]
    assert all((run / stage / "stage.json").is_file() for stage in stages)
    assert (run / "report.html").is_file()
    if taught:
        assert said.count("doge: ") == 3


def test_the_files_are_what_their_source_says():
    outputs = build.kept_outputs(build.FILES["en"])
    for language, path in build.FILES.items():
        written = build.as_text(build.notebook(language, outputs))
        assert path.read_text(encoding="utf-8") == written, "run python examples/build_notebook.py"


def test_both_have_the_same_code_and_each_its_own_words():
    assert sources(cells("en", "code")) == sources(cells("zh", "code"))
    english, chinese = (sources(cells(language, "markdown")) for language in ("en", "zh"))
    assert len(english) == len(chinese)
    for one, other in zip(english, chinese, strict=True):
        assert not re.search(r"[\u3000-\u9fff]", one)
        assert len(re.findall(r"[\u4e00-\u9fff]", other)) > 20
        assert one.split(" ")[0].count("#") == other.split(" ")[0].count("#")
        assert set(re.findall(r"\d+ %|`[^`]+`", one)) == set(re.findall(r"\d+ %|`[^`]+`", other))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_outputs_of_a_whole_run_are_there(language):
    code = cells(language, "code")
    for number, cell in enumerate(code, 1):
        assert cell["execution_count"] == number
        assert cell["outputs"], f"cell {number} has no output: run python examples/build_notebook.py --run"
        assert all(output["output_type"] in ("stream", "execute_result") for output in cell["outputs"])
        ast.parse("".join(cell["source"]))
    outputs = [output for cell in code for output in cell["outputs"]]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 5
    assert all(o["metadata"]["image/png"]["alt"] for o in outputs if "image/png" in o.get("data", {}))
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    words = "".join("".join(o.get("text", []) or o["data"].get("text/plain", [])) for o in outputs)
    assert not re.search(r"/home/|/Users/|/tmp/|/work/|/usr/|[A-Z]:\\\\|\r|\x1b|it/s\]", words)


def test_they_are_small():
    assert sum(path.stat().st_size for path in build.FILES.values()) < 1_000_000


def test_links_lead_somewhere():
    for language, path in build.FILES.items():
        links = re.findall(r"\]\(([^)#]+)\)", "".join(sources(cells(language, "markdown"))))
        assert len(links) >= 5
        for link in links:
            assert (path.parent / link).is_file(), f"{path.name}: {link}"
