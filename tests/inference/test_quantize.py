"""`doge quantize`: a folder that generates, and the figure of what it costs, which is the model's own."""

import json
import math

import numpy as np
import pytest
import torch

from small_doge.data.packing import PackedTokens, PrepareRecipe, prepare
from small_doge.data.tokenizer import TokenizerRecipe, load_tokenizer, train_tokenizer
from small_doge.errors import UserError
from small_doge.models import DogeForCausalLM, config_for

pytest.importorskip("numba")

from small_doge.inference.engine import Engine
from small_doge.inference.generate import GenerateRecipe, generate, open_engine
from small_doge.inference.quantize import QuantizeRecipe, quantize, spread

WORDS = "the dog reads a long book about small houses and every house has one red door".split()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model trained for a few steps, so that rounding has something to lose, its tokens, and a text."""
    root, random = tmp_path_factory.mktemp("quantize"), np.random.default_rng(0)
    (root / "corpus").mkdir()
    for i in range(120):
        (root / "corpus" / f"{i}.txt").write_text(" ".join(random.choice(WORDS, 60)), encoding="utf-8")
    train_tokenizer(TokenizerRecipe(output_dir=str(root / "tokenizer"), corpus=str(root / "corpus"), vocab_size=300))
    corpus = {"corpus": str(root / "corpus"), "tokenizer": str(root / "tokenizer"), "output_dir": str(root / "data")}
    prepare(PrepareRecipe(**corpus, row_length=64, validation_fraction=0.2))
    tokenizer = load_tokenizer(root / "tokenizer")
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = DogeForCausalLM(config_for("tiny", vocab_size=300, num_hidden_layers=2, keep_window_size=48, **special))
    optimizer, rows = torch.optim.AdamW(model.parameters(), 3e-3), PackedTokens(root / "data", "train")
    for step in range(30):
        batch = torch.stack([rows[(8 * step + i) % len(rows)]["input_ids"] for i in range(8)])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "text.txt").write_text(" ".join(random.choice(WORDS, 300)), encoding="utf-8")
    return root


def recipe(root, precision, output, **options):
    options = options or {"data": str(root / "data")}
    return QuantizeRecipe(str(root / "model"), str(output), precision, context_length=64, threads=1, **options)


@pytest.mark.parametrize(("precision", "most", "size"), [("bf16", 0.001, 2), ("int8", 0.005, 3.7), ("int4", 0.03, 7)])
def test_a_folder_with_its_figure(root, tmp_path, capsys, precision, most, size):
    folder = quantize(recipe(root, precision, tmp_path / "out"))
    figure = json.loads((folder / "quantization.json").read_text())
    bits = figure["bits_per_byte"]
    assert abs(figure["change"]) < most
    assert math.isclose(bits[precision] / bits["float32"] - 1, figure["change"], abs_tol=1e-9)
    assert f"{precision}: " in capsys.readouterr().out
    assert figure["float32_bytes"] / figure[f"{precision}_bytes"] > size * 0.95
    assert json.loads((folder / "stage.json").read_text())["stage"] == "quantize"
    assert not list(folder.glob("*.safetensors"))
    engine = open_engine(str(folder))
    assert engine.precision == precision
    assert generate(GenerateRecipe(str(folder), prompt="the dog", max_new_tokens=5, do_sample=False))
    written = (folder / "weights.doge").stat().st_mtime_ns
    quantize(recipe(root, precision, tmp_path / "out"))
    assert (folder / "weights.doge").stat().st_mtime_ns == written


def test_the_figure_is_the_models(root, tmp_path):
    """Bits per byte in float32 are those of the model, piece by piece, by its own forward pass."""
    folder = quantize(recipe(root, "bf16", tmp_path / "out", text=str(root / "text.txt")))
    figure = json.loads((folder / "quantization.json").read_text())
    tokenizer, model = load_tokenizer(root / "model"), DogeForCausalLM.from_pretrained(root / "model").eval()
    text = (root / "text.txt").read_text()
    ids, nats = tokenizer(text)["input_ids"], 0.0
    for first in range(0, len(ids) - 1, 64):
        piece = torch.tensor([ids[first : first + 64]])
        with torch.no_grad():
            nats += float(model(piece, labels=piece).loss) * (piece.shape[1] - 1)
    assert math.isclose(figure["bits_per_byte"]["float32"], nats / math.log(2) / figure["bytes"], rel_tol=1e-4)
    assert figure["bytes"] <= len(text)


def test_pieces_are_spread():
    documents = [range(0, 10), range(100, 101), range(200, 225)]
    assert [list(p) for p in spread(documents, 10, 100)] == [
        list(range(10)), list(range(200, 210)), list(range(210, 220)), list(range(220, 225)),
    ]  # fmt: skip
    assert [p[0] for p in spread([range(1000)], 10, 200)] == list(range(0, 1000, 50))


def test_what_it_refuses(root, tmp_path):
    with pytest.raises(ValueError, match="one of `data` and `text`"):
        QuantizeRecipe("m", "o")
    with pytest.raises(ValueError, match="`precision` is 'int3', expected 'bf16', 'int8' or 'int4'"):
        QuantizeRecipe("m", "o", "int3", data="d")
    with pytest.raises(UserError, match=r"text .*nowhere cannot be read"):
        quantize(recipe(root, "int8", tmp_path / "out", text=str(tmp_path / "nowhere")))
    assert not (tmp_path / "out").exists()
    folder = quantize(recipe(root, "int8", tmp_path / "out", text=str(root / "text.txt")))
    with pytest.raises(UserError, match="holds weights of precision int8, expected int4"):
        Engine.open(folder, "int4")
    with pytest.raises(UserError, match="`precision` is 'int8' there and 'int4' here"):
        quantize(recipe(root, "int4", tmp_path / "out", text=str(root / "text.txt")))
