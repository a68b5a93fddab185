import json
import lzma

import pytest
import torch

from small_doge import DogeConfig, DogeForCausalLM
from small_doge.data.packing import PackedTokens, PrepareRecipe, prepare
from small_doge.data.tokenizer import TokenizerRecipe, train_tokenizer
from small_doge.errors import UserError
from small_doge.evaluation.baselines import ngram_bits_per_byte
from small_doge.evaluation.bits_per_byte import bits_per_byte
from small_doge.evaluation.evaluate import EvaluateRecipe, evaluate


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A packed corpus of 60 short documents, and an untrained model of its tokenizer."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "corpus").mkdir()
    for i in range(60):
        text = f"def area_{i}(width, height):\n    return width * height + {i * i}  # × <|end_of_text|>\n" * (1 + i % 5)
        (root / "corpus" / f"{i}.txt").write_text(text, encoding="utf-8", newline="")
    corpus, model, data = str(root / "corpus"), str(root / "model"), str(root / "data")
    train_tokenizer(TokenizerRecipe(model, corpus=corpus, vocab_size=300, validation_fraction=0.2))
    prepare(PrepareRecipe(model, data, corpus=corpus, row_length=32, validation_fraction=0.2))
    torch.manual_seed(0)
    config = DogeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    DogeForCausalLM(config).save_pretrained(model)
    return model, data


def test_results_are_those_of_the_parts(folders, tmp_path, capsys):
    model, data = folders
    path = evaluate(EvaluateRecipe(model, data, str(tmp_path / "evaluation"), batch_size=3))
    assert path == tmp_path / "evaluation" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))

    packed = PackedTokens(data, "validation")
    facts = packed.manifest["splits"]["validation"]
    assert results["bytes"] == facts["bytes"]
    assert results["documents"] == facts["documents"] > 3
    assert results["tokens"] == facts["tokens"] - facts["documents"]
    assert results["context_length"] == 32
    alone = bits_per_byte(DogeForCausalLM.from_pretrained(model), packed.documents(), facts["bytes"], 32, batch_size=1)
    assert results["bits_per_byte"]["model"] == pytest.approx(alone.bits_per_byte, rel=1e-6)
    assert results["loss"] == pytest.approx(alone.nats / alone.tokens, rel=1e-6)
    # An untrained model knows nothing: about ln(vocabulary) nats for each token.
    assert results["loss"] == pytest.approx(5.7, abs=0.3)

    held_out, training = (texts(folders, split) for split in ("validation", "train"))
    assert results["bits_per_byte"]["xz -9"] == 8 * len(lzma.compress(b"".join(held_out), preset=9)) / facts["bytes"]
    assert results["bits_per_byte"]["order-5 n-gram"] == ngram_bits_per_byte(training, held_out, 5)
    assert results["bits_per_byte"]["xz -9 after the training text"] < results["bits_per_byte"]["xz -9"]
    assert results["baseline_training_bytes"] == sum(map(len, training))
    assert "xz -9 after the training text" in capsys.readouterr().out


def texts(folders, split):
    """The documents of a split as bytes."""
    from small_doge.data.tokenizer import decode_bytes, load_tokenizer

    tokenizer = load_tokenizer(folders[0])
    return [decode_bytes(tokenizer, ids.tolist()) for ids in PackedTokens(folders[1], split).documents()]


def test_a_finished_evaluation_is_kept_and_another_is_refused(folders, tmp_path):
    model, data = folders
    recipe = EvaluateRecipe(model, data, str(tmp_path / "out"), baselines=False, max_documents=2)
    path = evaluate(recipe)
    before = path.stat().st_mtime_ns
    assert set(json.loads(path.read_text(encoding="utf-8"))["bits_per_byte"]) == {"model"}
    assert json.loads(path.read_text(encoding="utf-8"))["documents"] == 2
    recipe.batch_size = 1  # changes no figure
    assert evaluate(recipe).stat().st_mtime_ns == before
    recipe.max_documents = 3
    with pytest.raises(UserError, match="max_documents"):
        evaluate(recipe)


def test_mistakes_are_told_and_leave_no_folder(folders, tmp_path):
    model, data = folders
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    corpus = tmp_path / "other.txt"
    corpus.write_text("another text altogether, with its own merges\n" * 30, encoding="utf-8")
    train_tokenizer(TokenizerRecipe(str(tmp_path / "other"), corpus=str(corpus), vocab_size=280, validation_fraction=0))
    DogeForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "other")
    out = tmp_path / "out"
    for arguments, said in (
        ((str(tmp_path / "empty"), data), "holds no model"),
        ((model, str(tmp_path / "empty")), "holds no prepared data"),
        ((str(tmp_path / "other"), data), "packed"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate(EvaluateRecipe(*arguments, str(out)))
        assert not out.exists()
    with pytest.raises(ValueError, match="context_length"):
        EvaluateRecipe(model, data, str(out), context_length=0)
    assert not list(tmp_path.glob(".*"))
