"""Small models whose every part does something: random A, Wdt, norms and residual weights."""

import pytest
import torch

from small_doge.models import DogeConfig, DogeForCausalLM


@pytest.fixture
def make_model():
    """A function that makes a small eval-mode model with all parameters away from their starting values."""

    def make(dtype=torch.float32, seed=0, **options):
        sizes = {"vocab_size": 400, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
        sizes |= {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "keep_window_size": 32}
        torch.manual_seed(seed)
        model = DogeForCausalLM(DogeConfig(**{**sizes, **options}))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(".A"):
                    p.uniform_(-1, 1)
                elif "dt_proj" in name:
                    p.normal_(std=0.4)  # dt of some units: scores from 0.02 to 50
                elif "norm" in name or "residual" in name:
                    p.uniform_(0.5, 1.5)
                elif p.dim() == 2 and p.shape[0] != 400:
                    p.normal_(std=0.15)  # larger than at the start, so that attention is far from uniform
        return model.to(dtype).eval()

    return make
