"""`doge generate`: the engine and transformers say the same, text comes whole, and why it is not the engine is said."""

import builtins

import pytest
import torch

from small_doge.data.tokenizer import load_tokenizer
from small_doge.errors import UserError
from small_doge.inference import generate as module
from small_doge.inference.generate import GenerateRecipe, generate
from small_doge.models import DogeForCausalLM, config_for

pytest.importorskip("numba")

from small import TEXT, small_model

from small_doge.inference.engine import weights
from small_doge.inference.engine.pack import PRECISIONS
from small_doge.inference.engine.text import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("generate"), "model")


def without_numba(monkeypatch):
    original = builtins.__import__

    def refuse(name, globals=None, locals=None, fromlist=(), level=0):
        if name == "engine" and level == 1:
            raise ImportError("No module named 'numba'")
        return original(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.parametrize("stream", [True, False])
def test_both_ways_say_the_same(folder, capsys, monkeypatch, stream):
    recipe = GenerateRecipe(str(folder), prompt=TEXT, do_sample=False, max_new_tokens=60, stream=stream)
    ours = generate(recipe)
    said = capsys.readouterr()
    assert said.out == ours + "\n"
    assert "on cpu, float32" in said.err
    without_numba(monkeypatch)
    assert generate(recipe) == ours
    theirs = capsys.readouterr()
    assert theirs.out.strip() == ours.strip()
    assert "generating with transformers in float32, several times slower: Numba is not here (No module" in theirs.err


def test_a_seed_repeats(folder, capsys):
    recipe = GenerateRecipe(str(folder), prompt="the", max_new_tokens=30, seed=3, top_k=50, repetition_penalty=1.2)
    first = generate(recipe)
    assert generate(recipe) == first
    recipe.seed = 4
    assert generate(recipe) != first


def test_a_model_that_the_engine_does_not_run(folder, tmp_path, capsys):
    model = DogeForCausalLM.from_pretrained(folder)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model.save_pretrained(tmp_path)
    load_tokenizer(folder).save_pretrained(tmp_path)
    generate(GenerateRecipe(str(tmp_path), prompt="the", max_new_tokens=4, do_sample=False))
    said = capsys.readouterr().err
    assert (
        f"generating with transformers: the engine cannot run {tmp_path} (the model's RoPE is of type dynamic" in said
    )
    assert "4 tokens, " in said


def test_a_gpu_takes_transformers_unless_a_precision_is_asked_for(folder, monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert module.open_engine(str(folder)) is None
    assert module.open_engine(str(folder), "int8").precision == "int8"


def test_characters_of_several_tokens_come_whole(folder):
    tokenizer, theirs = Tokenizer(folder), load_tokenizer(folder)
    for text in (TEXT, "🐕🐕🐕", "", "a\n\n  b", "中" * 30):
        assert tokenizer.encode(text) == theirs(text)["input_ids"]
        ids, stream = tokenizer.encode(text), tokenizer.stream()
        pieces = [stream.push(i) for i in ids]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.end() == tokenizer.decode(ids) == text
        assert stream.end() == ""
    stream = tokenizer.stream()
    half = tokenizer.encode("🐕")[:-1]
    assert "".join(map(stream.push, half)) == ""
    assert "\ufffd" in stream.end()


def test_what_it_refuses(folder, tmp_path):
    with pytest.raises(UserError, match="precision is 'int2', expected auto, float32, bf16, int8, int4"):
        generate(GenerateRecipe(str(folder), precision="int2"))
    with pytest.raises(UserError, match="nowhere does not exist"):
        generate(GenerateRecipe(str(tmp_path / "nowhere"), prompt="x"))
    torch.manual_seed(0)
    DogeForCausalLM(config_for("tiny", vocab_size=290, hidden_size=48, num_hidden_layers=1)).save_pretrained(tmp_path)
    load_tokenizer(folder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 300 entries and its model 290"):
        generate(GenerateRecipe(str(tmp_path), prompt="x"))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        generate(GenerateRecipe(str(tmp_path), prompt="x"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 0), ("temperature", 0.0), ("top_p", 0.0), ("top_k", -1), ("repetition_penalty", 0.0),
     ("threads", 0)],
)  # fmt: skip
def test_options_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"`{field}` is {value}"):
        GenerateRecipe("m", **{field: value})


def test_names_are_the_engines():
    assert tuple(PRECISIONS) == module.PRECISIONS
    assert weights.PACKED_FILE == module.PACKED_FILE
