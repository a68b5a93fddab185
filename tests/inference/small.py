"""A small random model in a folder, with a tokenizer of few entries, most of them bytes."""

import torch

from small_doge.data.tokenizer import TokenizerRecipe, load_tokenizer, train_tokenizer
from small_doge.models import DogeForCausalLM, config_for

TEXT = "the dog reads é a long 中 book about small houses 🐕"


def small_model(root, name):
    """Written into a folder of that name below ``root``; its window is shorter than the texts of the tests."""
    (root / "corpus").mkdir()
    for i in range(40):
        (root / "corpus" / f"{i}.txt").write_text(f"{TEXT} {i} " * 8, encoding="utf-8")
    train_tokenizer(TokenizerRecipe(output_dir=str(root / "tokenizer"), corpus=str(root / "corpus"), vocab_size=300))
    tokenizer = load_tokenizer(root / "tokenizer")
    torch.manual_seed(0)
    special = {field: getattr(tokenizer, field) for field in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "keep_window_size": 24, "initializer_range": 0.3}
    DogeForCausalLM(config_for("tiny", vocab_size=300, **sizes, **special)).save_pretrained(root / name)
    tokenizer.save_pretrained(root / name)
    return root / name
