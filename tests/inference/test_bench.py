"""`doge bench`: what it writes, and what it says to wrong input."""

import csv
import json

import pytest

from small_doge import cli
from small_doge.models import DogeForCausalLM, config_for

pytest.importorskip("numba", reason="the engine needs Numba")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    config = config_for("tiny", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    DogeForCausalLM(config).save_pretrained(folder)
    return folder


def test_it_leaves_a_table_a_picture_and_the_best_figure(model, capsys):
    words = ["bench", str(model), "--precisions", "[float32, int8]", "--threads", "[1]", "--contexts", "[3, 9]"]
    assert cli.main([*words, "--tokens", "2", "--rounds", "2"]) == 0
    with open(model / "bench/bench.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["precision"], row["context"]) for row in rows] == [
        *(("float32", "3"), ("int8", "3"), ("float32", "9"), ("int8", "9")),
        *(("transformers", "3"), ("transformers", "9")),
    ]
    assert all(float(row["tokens_per_second"]) > 0 and float(row["first_token_ms"]) > 0 for row in rows)
    sizes = {row["precision"]: int(row["weight_bytes"]) for row in rows}
    assert sizes["int8"] < sizes["float32"] / 2
    facts = json.loads((model / "bench/bench.json").read_text())
    fastest = max(float(row["tokens_per_second"]) for row in rows if row["precision"] != "transformers")
    assert facts["best"]["tokens_per_second"] == fastest
    assert (model / "bench/bench.png").stat().st_size > 5000
    assert f"at best {fastest:,.0f} tokens/s" in capsys.readouterr().out


def test_a_size_stands_for_a_model_of_random_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["bench", "tiny", "--precisions", "[bf16]", "--threads", "[1]", "--contexts", "[3]", "--tokens", "1"]
    assert cli.main([*words, "--rounds", "1", "--transformers", "false"]) == 0
    assert json.loads((tmp_path / "runs/bench-tiny/bench.json").read_text())["best"]["precision"] == "bf16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--contexts", "[0]"], "`contexts` is [0], expected numbers of tokens above 0"),
        (["--tokens", "0"], "`tokens` is 0, expected at least 1"),
        (["--precisions", "[int3]"], "int3"),
        (["--threads", "[-1]"], "thread counts of 0 or more"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(model, capsys, words, message):
    assert cli.main(["bench", str(model), *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (model / "bench").exists()
