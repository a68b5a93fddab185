"""The recipes of the four published sizes hold the published table."""

from pathlib import Path

import pytest

from small_doge.data.corpora import _entry
from small_doge.recipe import read_yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
# learning rate, warmup and decay steps, steps, tokens a step
TABLE = {
    "20m": (8e-3, 800, 8_000, 1 << 19),
    "60m": (6e-3, 1_600, 16_000, 1 << 20),
    "160m": (4e-3, 2_400, 24_000, 3 << 19),
    "320m": (2e-3, 3_200, 32_000, 1 << 21),
}
SAME = {"weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "max_grad_norm": 1.0}
SHARES = {"fineweb-edu-dedup": 7, "cosmopedia-v2": 2, "python-edu": 0.5, "finemath-4plus": 0.5}


@pytest.mark.parametrize("size", TABLE)
def test_a_size_is_trained_as_published(size):
    rate, warmup, steps, tokens = TABLE[size]
    folder = RECIPES / f"doge-{size}"
    pretrain, prepare, tokenizer = (read_yaml(folder / f"{n}.yaml") for n in ("pretrain", "prepare", "tokenizer"))
    assert (pretrain["learning_rate"], pretrain["max_steps"]) == (rate, steps)
    assert pretrain["warmup_steps"] == pretrain["decay_steps"] == warmup == steps // 10
    assert pretrain["tokens_per_step"] == tokens
    assert SAME.items() <= pretrain.items()
    assert (pretrain["seed"], pretrain["bf16"], pretrain["model"]) == (233, True, size)
    assert prepare["row_length"] == 2048
    assert tokens % 2048 == 0
    assert pretrain["auto_find_batch_size"]
    assert steps * tokens <= prepare["max_tokens"] < 1.01 * steps * tokens
    assert prepare["mix_by"] == "tokens"
    for corpus in (prepare["corpus"], tokenizer["corpus"]):
        assert {entry["name"]: entry["weight"] for entry in corpus} == SHARES
        assert all("dataset" in _entry(entry) for entry in corpus)
    assert prepare["validation_fraction"] == tokenizer["validation_fraction"]
    for made, used in (("tokenizer", tokenizer), ("data", prepare)):
        assert pretrain[made] == used["output_dir"] == f"runs/doge-{size}/{made}"
