"""A small corpus, its tokenizer and its packed tokens, made once; and a function that pretrains on them."""

import importlib.util
import random

import pytest

from small_doge import recipe
from small_doge.data.packing import PrepareRecipe, prepare
from small_doge.data.tokenizer import TokenizerRecipe, train_tokenizer

# TRL runs on Python 3.11 and newer
collect_ignore = [] if importlib.util.find_spec("trl") else ["test_sft.py", "test_dpo.py", "test_grpo.py"]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Folders ``tokenizer`` and ``data`` of a corpus of 200 short texts."""
    root = tmp_path_factory.mktemp("prepared")
    words = "the dog runs to a small house and reads one long book about tiny models".split()
    rng = random.Random(0)
    texts = [" ".join(rng.choice(words) for _ in range(rng.randint(20, 120))) + f" {i}." for i in range(200)]
    (root / "corpus").mkdir()
    for i, text in enumerate(texts):
        (root / "corpus" / f"{i:03}.txt").write_text(text, encoding="utf-8")
    corpus = str(root / "corpus")
    train_tokenizer(TokenizerRecipe(output_dir=str(root / "tokenizer"), corpus=corpus, vocab_size=300))
    prepare(
        PrepareRecipe(
            output_dir=str(root / "data"),
            tokenizer=str(root / "tokenizer"),
            corpus=corpus,
            row_length=32,
            validation_fraction=0.1,
        )
    )
    return root


@pytest.fixture
def arguments(prepared, tmp_path):
    """A function that makes PretrainArguments for a very small run, with fields overridden."""
    from small_doge.training.pretrain import PretrainArguments

    def make(**overrides):
        fields = {
            "model": "tiny",
            "data": str(prepared / "data"),
            "tokenizer": str(prepared / "tokenizer"),
            "output_dir": str(tmp_path / "run"),
            "max_steps": 12,
            "per_device_train_batch_size": 2,
            "logging_steps": 4,
            "save_steps": 5,
            "use_cpu": True,
            "report_to": "tensorboard",
            "eval_rows": 4,
        }
        return recipe.build(PretrainArguments, {**fields, **overrides})

    return make
