"""The whole way, small: the demo, run again, stopped by a real Ctrl-C, and its model used as a user would."""

import html
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from small_doge.artifacts import sha256
from small_doge.cli import main
from small_doge.demo import DemoRecipe, demo

ROOT = Path(__file__).parents[1]
SMALLER = {
    "tokenizer": {"corpus": {"name": "stdlib", "parts": ["topics"]}, "vocab_size": 600, "validation_fraction": 0.1},
    "prepare": {"corpus": {"name": "stdlib", "parts": ["topics"]}, "row_length": 64, "validation_fraction": 0.1},
    "pretrain": {"max_steps": 24, "logging_steps": 4, "eval_steps": 12, "save_steps": 10, "tokens_per_step": 512},
    "questions": {"validation_fraction": 0.9, "rounds": 1},
    "sft": {"max_steps": 2, "eval_rows": 8},
    "dpo": {"max_steps": 2, "eval_rows": 8, "max_length": 512, "tokens_per_step": 4096},
    "evaluate": {"max_documents": 2},
    "answers": {"rows": 8, "asked": 4, "shown": 2, "max_new_tokens": 6},
    "report": {},
}


def doge(*words, cwd, **options):
    command = [sys.executable, "-m", "small_doge", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=environment, **options
    )


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with the recipes of doge-tiny, shortened, and the demo made from them in ``run``."""
    desk = tmp_path_factory.mktemp("demo")
    shutil.copytree(ROOT / "recipes" / "doge-tiny", desk / "recipes")
    for name, changes in SMALLER.items():
        path = desk / "recipes" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text(encoding="utf-8")) | changes))
    demo(DemoRecipe(output_dir=str(desk / "run"), recipes=str(desk / "recipes"), max_minutes=1))
    return desk


def test_it_leaves_a_report_and_every_stage_finished(desk):
    page = (desk / "run" / "report.html").read_text(encoding="utf-8")
    results = json.loads((desk / "run" / "evaluation" / "results.json").read_text())["bits_per_byte"]
    assert {"model", "xz -9", "order-5 n-gram"} <= set(results)
    assert f"{results['model']:.3f}" in page
    for stage in ("tokenizer", "data", "pretrain", "questions", "sft", "dpo", "evaluation", "answers"):
        assert (desk / "run" / stage / "stage.json").exists()
    assert not list(desk.rglob("*.partial"))


def test_the_report_shows_what_each_model_answers(desk):
    page = (desk / "run" / "report.html").read_text(encoding="utf-8")
    found = json.loads((desk / "run" / "answers" / "answers.json").read_text(encoding="utf-8"))
    assert list(found["figures"]) == ["pretrain", "sft", "dpo"]
    assert len(found["shown"]) == 2
    for item in found["shown"]:
        assert html.escape(item["question"], quote=True) in page
        assert set(item["answers"]) == {"pretrain", "sft", "dpo"}
    for figures in found["figures"].values():
        assert f"{figures['loss']:.3f}" in page
        assert 0 <= figures["ended"] <= 1
        assert 0 <= figures["preference_accuracy"] <= 1


def test_each_model_is_made_from_the_one_before(desk):
    run = desk / "run"
    for stage, before in (("sft", "pretrain"), ("dpo", "sft")):
        record = json.loads((run / stage / "stage.json").read_text())
        assert record["settings"]["model_sha256"] == sha256(run / before / "model.safetensors")
        assert sha256(run / stage / "model.safetensors") != sha256(run / before / "model.safetensors")


def test_without_trl_the_model_is_not_taught_to_answer(desk, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "trl" else find_spec(name, *more)
    )
    for name in ("tokenizer", "data", "pretrain", "evaluation"):
        shutil.copytree(desk / "run" / name, tmp_path / "run" / name)
    demo(DemoRecipe(output_dir=str(tmp_path / "run"), recipes=str(desk / "recipes"), max_minutes=1))
    assert "TRL is not installed" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "What it answers" not in page
    assert "doge chat" not in page


def test_a_second_run_reuses_the_first(desk):
    written = {p: p.stat().st_mtime_ns for p in (desk / "run").rglob("*.safetensors")}
    demo(DemoRecipe(output_dir=str(desk / "run"), recipes=str(desk / "recipes"), max_minutes=1))
    assert written == {p: p.stat().st_mtime_ns for p in (desk / "run").rglob("*.safetensors")}


def test_the_stages_one_by_one_find_what_the_demo_made(desk):
    """README's commands after `make demo`: the recipe's own minutes do not make it another run."""
    paths = ["--data", "run/data", "--tokenizer", "run/tokenizer", "--output_dir", "run/pretrain"]
    process = doge("pretrain", "--config", "recipes/pretrain.yaml", *paths, cwd=desk)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "holds this run already, finished" in said


def test_another_run_in_the_same_folder_is_refused(desk):
    path = desk / "recipes" / "tokenizer.yaml"
    before = path.read_text()
    try:
        path.write_text(before.replace("600", "620"))
        process = doge("tokenizer", "--config", path, "--output_dir", "run/tokenizer", cwd=desk)
        said, _ = process.communicate()
        assert process.returncode == 1
        assert "holds a different run: `vocab_size` is 600 there and 620 here" in said
    finally:
        path.write_text(before)


def test_generate_streams_a_completion(desk):
    process = doge("generate", "The ", "--model", "run/pretrain", "--max_new_tokens", 8, "--seed", 1, cwd=desk)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "\nThe " in "\n" + said  # the engine may say first that it compiles itself, once
    assert "8 tokens, " in said


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_saves_and_the_same_command_continues(desk, monkeypatch):
    def words(folder):
        paths = ["--data", "run/data", "--tokenizer", "run/tokenizer", "--output_dir", folder]
        short = ["--max_minutes", "null", "--max_steps", 16, "--sample_prompts", "[]"]
        return ["pretrain", "--config", "recipes/pretrain.yaml", *paths, *short]

    process = doge(*words("stopped"), cwd=desk)
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    said = process.stdout.read()
    assert process.wait() == 130, said
    assert "the same command continues" in said
    process = doge(*words("stopped"), cwd=desk)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "continuing from" in said
    monkeypatch.chdir(desk)
    assert main([str(word) for word in words("whole")]) == 0
    histories = []
    for folder in ("stopped", "whole"):
        history = json.loads((desk / folder / "trainer_state.json").read_text())["log_history"]
        histories.append([(row["step"], row.get("loss", row.get("eval_loss"))) for row in history])
    assert histories[0] == histories[1]
