"""`doge info`: its figures against a model and a cache that exist, and its mistakes."""

import pytest
import torch

from small_doge import DynamicMaskCache
from small_doge.errors import UserError
from small_doge.inference.info import InfoRecipe, info
from small_doge.models import DogeForCausalLM, config_for


def test_figures_are_those_of_a_model_that_ran(tmp_path, capsys):
    config = config_for("tiny", vocab_size=512, keep_window_size=64, local_window=4, score_lifetime=50.0)
    model = DogeForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    facts = info(InfoRecipe(model=str(tmp_path), length=100, device="cpu"))
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in facts["model"]
    cache = DynamicMaskCache(config)
    with torch.no_grad():
        model(torch.randint(0, 512, (1, 100)), past_key_values=cache)
    assert f"at most {cache.nbytes / 2**20:,.1f} MiB" in facts["cache"]
    assert facts["attention"] == "chunked for 1 × 100 tokens in float32: keys drop out: 100 keys, a window of 64"
    assert facts["window"].endswith("; a score higher by 1 makes up for 50 tokens of age")
    assert facts["attention"] in capsys.readouterr().out


def test_a_size_needs_no_folder_and_the_path_follows_the_shape():
    assert "335,750,272 parameters" in info(InfoRecipe(model="320m", device="cpu"))["model"]
    assert info(InfoRecipe(model="20m", device="cpu"))["attention"].startswith("folded")
    assert info(InfoRecipe(model="20m", device="cpu"))["window"].endswith("the last 0 whatever their score")
    assert info(InfoRecipe(model="20m", length=4096, device="cpu"))["attention"].startswith("chunked")
    packed = info(InfoRecipe(model="20m", rows=64, packed=True, device="cpu"))["attention"]
    assert packed.startswith("chunked")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "nowhere"}, "nowhere is neither a folder with a config.json nor one of 20m, 60m"),
        ({"model": "20m", "dtype": "int8"}, "`dtype` is 'int8', expected a floating point type"),
        ({"model": "20m", "device": "tpu"}, "`device` is 'tpu', expected cpu"),
    ],
)
def test_mistakes_are_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        info(InfoRecipe(**options))


def test_a_forced_path_that_cannot_be_is_told(monkeypatch):
    monkeypatch.setenv("DOGE_ATTENTION", "folded")
    with pytest.raises(UserError, match="`folded` drops no key, and there are 4096 keys"):
        info(InfoRecipe(model="20m", length=4096, device="cpu"))
