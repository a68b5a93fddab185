"""What else the model promises: first-release checkpoints, training features, and errors that name what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, StaticCache
from transformers import DogeForCausalLM as TheirDoge

from small_doge.errors import UserError
from small_doge.models import SIZES, DogeConfig, DogeForCausalLM, DogeForSequenceClassification, config_for, load_model
from small_doge.training.pretrain import RUN_FILE

OLD_NAMES = {
    "embed_tokens.weight": "word_embed.weight",
    "model.norm.weight": "model.final_layernorm.weight",
    ".input_layernorm.": ".pre_layernorm.",
    ".input_residual": ".pre_residual.weight",
    ".post_attention_layernorm.": ".post_layernorm.",
    ".post_attention_residual": ".post_residual.weight",
    ".mlp.": ".feed_forward.",
}
IDS = torch.tensor([[5, 9, 7, 5, 9, 30, 7, 5, 5, 5, 11, 9]])


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in DogeForCausalLM(config).parameters())


@pytest.mark.parametrize(("size", "millions"), [("20m", 13.1), ("60m", 54.6), ("160m", 152.7), ("320m", 335.8)])
def test_published_sizes(size, millions):
    assert parameters(config_for(size)) / 1e6 == pytest.approx(millions, abs=0.06)
    assert config_for(size).heads[-1] == 128


@pytest.mark.parametrize(
    ("size", "dense", "millions", "K"),
    [("40m", "20m", 17.4, 32), ("180m", "60m", 122.7, 64), ("600m", "160m", 496.0, 96), ("1.6b", "320m", 1417.9, 128)],
)
def test_published_sizes_with_experts(size, dense, millions, K):
    config = config_for(f"{size}-moe")
    assert parameters(config) / 1e6 == pytest.approx(millions, abs=0.06)
    assert (config.num_keys, config.num_experts_per_tok) == (K, K // 4)
    assert SIZES[f"{size}-moe"].items() > SIZES[dense].items()


def test_unknown_size():
    with pytest.raises(UserError, match="model size is '20mm', expected one of 20m"):
        config_for("20mm")
    assert "tiny" in SIZES


@torch.no_grad()
def test_checkpoints_of_the_first_release_are_told_from_their_shapes(make_model, tmp_path):
    """Old names, no q and k norm, A and Wdt per query head, and a config that says none of it."""
    model = make_model(qk_norm=False, mask_heads=4, keep_window_size=5, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    assert "model.layers.0.pre_residual.weight" in renamed
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    for field in ("qk_norm", "mask_heads", "local_window", "score_lifetime"):
        config.pop(field)
    config |= {"dynamic_mask_ratio": 0.0, "hidden_bias": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for again in (load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert (again.config.qk_norm, again.config.mask_heads) == (False, 4)
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_mask_ratio_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match=r"dynamic_mask_ratio is 0.25, expected 0"):
        DogeConfig(dynamic_mask_ratio=0.25)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 50, "num_attention_heads": 4}, "hidden_size 50 is not a multiple of num_attention_heads 4"),
        ({"num_attention_heads": 6, "hidden_size": 48, "num_key_value_heads": 4}, "6 is not a multiple of .* 4"),
        ({"keep_window_size": 0}, "keep_window_size is 0, expected at least 1"),
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "mask_heads": 3}, "mask_heads is 3, expected 2 .* or 8"),
        ({"sliding_window": 128}, "sliding_window is 128, expected null"),
        ({"local_window": -1}, "local_window is -1, expected 0 or more"),
        ({"chunk_size_feed_forward": -1}, "chunk_size_feed_forward is -1, expected 0 or more"),
        ({"score_lifetime": 0}, "score_lifetime is 0, expected 1 to 1e9 tokens, or null"),
        ({"score_lifetime": -1.5}, "score_lifetime is -1.5, expected 1 to 1e9 tokens, or null"),
        ({"score_lifetime": float("inf")}, "score_lifetime is inf, expected 1 to 1e9 tokens, or null"),
        ({"score_lifetime": float("nan")}, "score_lifetime is nan, expected 1 to 1e9 tokens, or null"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (
            {"is_moe": True, "num_experts": 24, "num_experts_per_tok": 2},
            "24, expected a perfect square such as 16 or 25",
        ),
        ({"is_moe": True, "num_experts": 0}, "num_experts is 0, expected a perfect square such as 1 or 4"),
        ({"is_moe": True, "num_experts": 16}, "num_experts_per_tok is 64, expected 1 to 16"),
        ({"is_moe": True, "num_experts_per_tok": 0}, "num_experts_per_tok is 0, expected 1 to 16384"),
        ({"is_moe": True, "hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu' with is_moe"),
    ],
)
def test_configurations_that_cannot_be_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DogeConfig(**fields)


@pytest.mark.parametrize("lifetime", [None, 8, 1.5, 4096.0])
def test_the_lifetime_of_scores_is_kept_with_the_model(make_model, tmp_path, lifetime):
    make_model(score_lifetime=lifetime).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["score_lifetime"] == lifetime
    assert load_model(tmp_path).config.score_lifetime == lifetime


def test_inputs_that_do_not_fit_are_named(make_model):
    model = make_model()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 7\), expected"):
        model(IDS, attention_mask=torch.ones(1, 7))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="StaticCache, expected DynamicMaskCache or a cache that grows"):
        model(IDS, past_key_values=StaticCache(model.config, max_cache_len=64))


@torch.no_grad()
def test_logits_to_keep(make_model):
    model = make_model()
    full = model(IDS).logits
    assert torch.allclose(model(IDS, logits_to_keep=3).logits, full[:, -3:], atol=1e-6)
    assert torch.allclose(model(IDS, logits_to_keep=torch.tensor([0, 4])).logits, full[:, [0, 4]], atol=1e-6)


def test_loss_over_items_in_batch(make_model):
    model = make_model()
    mean = model(IDS, labels=IDS).loss
    assert torch.allclose(model(IDS, labels=IDS, num_items_in_batch=22).loss, mean / 2)


def test_gradient_checkpointing_changes_nothing(make_model):
    gradients = []
    for checkpointed in (False, True):
        model = make_model(keep_window_size=5).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_attentions_and_hidden_states(make_model):
    model = make_model(keep_window_size=5)
    out = model(IDS, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 3
    assert len(out.hidden_states) == 4
    for weights in out.attentions:
        assert weights.shape == (1, 4, 12, 12)
        assert ((weights > 0).sum(-1) <= 5).all()
        assert torch.allclose(weights.sum(-1), torch.ones(1, 4, 12))
    assert torch.allclose(out.logits, model(IDS).logits, atol=1e-6)
    assert isinstance(model(IDS, return_dict=False), tuple)


@torch.no_grad()
def test_bfloat16_and_autocast_are_as_exact_as_in_transformers(make_model, tmp_path):
    """Relative error of the logits against float64; a score of 50 amplifies rounding, so the median of five models."""

    def error(model, exact):
        return ((model(IDS).logits.double() - exact).norm() / exact.norm()).item()

    errors = []
    for seed in range(5):
        ours = make_model(torch.float64, seed=seed)
        exact = ours(IDS).logits
        ours.float().save_pretrained(tmp_path)
        both = ours, TheirDoge.from_pretrained(tmp_path, attn_implementation="eager").eval()
        with torch.autocast("cpu", torch.bfloat16):
            autocast = [error(model, exact) for model in both]
        errors.append(autocast + [error(model.to(torch.bfloat16), exact) for model in both])
    ours_autocast, theirs_autocast, ours_half, theirs_half = torch.tensor(errors).median(dim=0).values.tolist()
    assert ours_autocast < 1.1 * theirs_autocast < 0.03
    assert ours_half < 1.1 * theirs_half < 0.03


def test_sequence_classification_learns_from_the_last_real_token(make_model, tmp_path):
    config = make_model(num_labels=3).config
    model = DogeForSequenceClassification(config).eval()
    padded = torch.cat([IDS, torch.full((1, 4), 2)], dim=1)
    mask = (padded != 2).long()
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, model(padded, attention_mask=mask).logits, atol=1e-5)
    model(IDS, labels=torch.tensor([1])).loss.backward()
    assert model.score.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is DogeForSequenceClassification


@pytest.mark.parametrize(("run", "stage"), [({"stage": "sft"}, "sft"), ({"max_steps": 9}, "pretrain")])
def test_a_run_that_is_not_finished_is_told_from_a_folder_without_a_model(make_model, tmp_path, run, stage):
    (tmp_path / RUN_FILE).write_text(json.dumps(run))
    with pytest.raises(UserError, match=rf"is a `doge {stage}` run that is not finished; run the same command again to "
                                        r"finish it$"):  # fmt: skip
        load_model(tmp_path)
    for step in (5, 10):
        make_model().save_pretrained(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-20").mkdir()  # the run was killed while it wrote this
    with pytest.raises(UserError, match=r"or give its newest checkpoint, .*checkpoint-10, as the model"):
        load_model(tmp_path)
    load_model(tmp_path / "checkpoint-10")


def test_folders_that_cannot_be_opened_are_named(make_model, tmp_path):
    with pytest.raises(UserError, match="does not exist; expected a folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is a folder without a config.json"):
        load_model(tmp_path)
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="are cut short or damaged"):
        load_model(tmp_path)
    tensors = {"model.norm.weight": torch.ones(48)}
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack \d+ tensors, the first"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="is of type 'llama', expected 'doge'"):
        load_model(tmp_path)
