"""Expert use: the counts are those of all scores of every token that counts, and measuring changes nothing."""

import json
import math

import numpy as np
import pytest
import torch

from small_doge import DogeConfig, DogeForCausalLM
from small_doge.data.packing import PackedTokens, PrepareRecipe, prepare
from small_doge.data.tokenizer import TokenizerRecipe, train_tokenizer
from small_doge.evaluation.bits_per_byte import bits_per_byte, windows_of
from small_doge.evaluation.evaluate import EvaluateRecipe, evaluate
from small_doge.evaluation.expert_use import ExpertUse, evenness

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2}
EXPERTS = {"is_moe": True, "num_experts": 49, "num_experts_per_tok": 3}


def make_model(**options):
    torch.manual_seed(0)
    model = DogeForCausalLM(DogeConfig(**SIZES, **options)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            if model.config.is_moe:
                layer.mlp.router_gate.weight[:8] *= 4  # lopsided
    return model


def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 300, size) for size in (2, 60, 9, 33, 17, 40)]


def counts_by_hand(model, texts, context_length):
    """Every window alone, all pairs of both halves of the router's logits, and the k best of them."""
    K, k = math.isqrt(model.config.num_experts), model.config.num_experts_per_tok
    counts = np.zeros((model.config.num_hidden_layers, K * K), np.int64)
    for i, text in enumerate(texts):
        for w in windows_of(i, len(text), context_length):
            with torch.no_grad():
                out = model(torch.tensor(text[None, w.begin : w.end]), output_router_logits=True)
            for layer, r in enumerate(out.router_logits):
                scores = (r[:, :K, None] + r[:, None, K:]).flatten(1)[w.scored - w.begin :]
                np.add.at(counts[layer], scores.topk(k).indices.flatten().numpy(), 1)
    return counts


@pytest.mark.parametrize("context_length", [16, 64])
def test_counts_are_those_of_all_scores_and_the_figure_stays(context_length):
    """Padding and the halves of windows that overlap are passed over."""
    model, texts = make_model(**EXPERTS), documents()
    plain = bits_per_byte(model, texts, 1000, context_length, batch_size=4)
    use = ExpertUse(49, 3)
    assert bits_per_byte(model, texts, 1000, context_length, batch_size=4, expert_use=use) == plain
    assert use.tokens == plain.tokens
    counts = use.counts()
    assert counts.sum(axis=1).tolist() == [3 * plain.tokens] * 2
    assert np.array_equal(counts, counts_by_hand(model, texts, context_length))
    assert len({tuple(layer) for layer in counts.tolist()}) == 2


@pytest.mark.parametrize(("groups", "dead"), [(1, 46 / 49), (2, 43 / 49)])
def test_experts_that_a_router_cannot_reach_are_dead(groups, dead):
    """A router of zeros ties all scores, and the first k experts win; one that separates two groups of tokens, 2 k."""
    use = ExpertUse(49, 3)
    logits = torch.zeros(10, 14)
    if groups == 2:
        logits[::2, 3] = 1  # row 3 of the grid: experts 21, 22, 23
    use.add([logits], torch.arange(10))
    (layer,) = evenness(use.counts())
    assert layer["dead_share"] == pytest.approx(dead)
    assert layer["effective_experts"] == pytest.approx(3 * groups)
    assert layer["largest"] == pytest.approx(49 / (3 * groups))
    assert set(np.flatnonzero(use.counts()[0])) == ({0, 1, 2} if groups == 1 else {0, 1, 2, 21, 22, 23})


def test_a_model_whose_router_is_dead_says_so():
    model = make_model(**EXPERTS)
    with torch.no_grad():
        model.model.layers[1].mlp.router_gate.weight.zero_()
    use = ExpertUse(49, 3)
    bits_per_byte(model, documents(), 1000, 64, expert_use=use)
    first, second = evenness(use.counts())
    assert first["dead_share"] < 0.5
    assert second["dead_share"] == pytest.approx(46 / 49)


def test_figures_of_known_counts():
    even, half, one = evenness(np.array([[5, 5, 5, 5], [4, 4, 0, 0], [0, 0, 9, 0]]))
    assert even == pytest.approx({"dead_share": 0, "largest": 1, "entropy": math.log(4), "effective_experts": 4})
    assert half == pytest.approx({"dead_share": 0.5, "largest": 2, "entropy": math.log(2), "effective_experts": 2})
    assert one == pytest.approx({"dead_share": 0.75, "largest": 4, "entropy": 0, "effective_experts": 1})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tokenizer, and packed tokens of 30 short documents."""
    root = tmp_path_factory.mktemp("expert_use")
    (root / "corpus").mkdir()
    for i in range(30):
        text = f"def area_{i}(width, height):\n    return width * height + {i * i}\n" * (1 + i % 5)
        (root / "corpus" / f"{i}.txt").write_text(text, encoding="utf-8")
    corpus, tokenizer, data = (str(root / name) for name in ("corpus", "tokenizer", "data"))
    train_tokenizer(TokenizerRecipe(tokenizer, corpus=corpus, vocab_size=300, validation_fraction=0.3))
    prepare(PrepareRecipe(tokenizer, data, corpus=corpus, row_length=32, validation_fraction=0.3))
    return root


def evaluated(folders, tmp_path, **options):
    make_model(**options).save_pretrained(tmp_path / "model")
    for file in (folders / "tokenizer").glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    recipe = EvaluateRecipe(str(tmp_path / "model"), str(folders / "data"), str(tmp_path / "out"), baselines=False)
    return json.loads(evaluate(recipe).read_text(encoding="utf-8"))


def test_evaluate_writes_the_use_of_experts(folders, tmp_path, capsys):
    use = evaluated(folders, tmp_path, **EXPERTS)["expert_use"]
    texts = list(PackedTokens(folders / "data", "validation").documents())
    expected = counts_by_hand(DogeForCausalLM.from_pretrained(tmp_path / "model").eval(), texts, 32)
    assert np.array_equal(np.load(tmp_path / "out" / "expert_use.npy"), expected)
    assert use["layers"] == evenness(expected)
    assert use["tokens"] == sum(len(text) - 1 for text in texts)
    assert (use["num_experts"], use["num_experts_per_tok"]) == (49, 3)
    assert "of 49 experts a layer" in capsys.readouterr().out


def test_evaluate_of_a_dense_model_is_as_it_was(folders, tmp_path, capsys):
    assert "expert_use" not in evaluated(folders, tmp_path)
    assert not (tmp_path / "out" / "expert_use.npy").exists()
    assert "expert" not in capsys.readouterr().out
