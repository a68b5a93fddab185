"""Our dense model and transformers' own Doge: the same logits from the same folder, both ways."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import DogeForCausalLM as TheirDoge

import small_doge  # noqa: F401 - registers the model
from small_doge.models import DogeForCausalLM

TOLERANCE = 1e-4  # float32, largest difference of a logit


def distinct_tokens(B, T, seed=0):
    """Rows of tokens none of which repeats: equal tokens have equal scores in the first layer, and theirs leaves ties
    to top-k's whim where ours keeps the newer key."""
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(390, generator=g)[:T] + 5 for _ in range(B)])


@pytest.fixture
def both(make_model, tmp_path):
    ours = make_model()
    ours.save_pretrained(tmp_path / "ours")
    theirs = TheirDoge.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(theirs).__module__.startswith("transformers.")
    return ours, theirs


def well_separated(model, ids):
    """Whether no query's choice of keys hangs on a score difference near the grid's step."""
    captured = []
    hooks = [
        layer.self_attn.dt_proj.register_forward_hook(
            lambda m, i, dt, a=layer.self_attn.A: captured.append(torch.exp(a * torch.nn.functional.softplus(dt)))
        )
        for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    gaps = [s.log().sort(dim=1).values.diff(dim=1).min().item() for s in captured]
    return min(gaps) > 5e-4


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 2, 31, 32])
def test_logits_up_to_the_window(both, T):
    ours, theirs = both
    ids = distinct_tokens(2, T)
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < TOLERANCE


@torch.no_grad()
def test_logits_beyond_the_window(both):
    ours, theirs = both
    ours.config.keep_window_size = theirs.config.keep_window_size = 5
    for layer in theirs.model.layers:
        layer.self_attn.keep_window_size = 5
    checked = 0
    for seed in range(200):
        ids = distinct_tokens(1, 12, seed)
        if well_separated(ours, ids):
            assert (ours(ids).logits - theirs(ids).logits).abs().max() < TOLERANCE
            checked += 1
    assert checked >= 10


@torch.no_grad()
@pytest.mark.parametrize("pads", [1, 9])
def test_logits_with_left_padding(both, pads):
    ours, theirs = both
    ids = distinct_tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :pads], ids[0, :pads] = 0, 2
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for options in ({}, {"position_ids": positions}):
        a, b = (m(ids, attention_mask=mask, **options).logits[mask.bool()] for m in (ours, theirs))
        assert (a - b).abs().max() < TOLERANCE


@torch.no_grad()
def test_logits_with_a_cache(both):
    ids = distinct_tokens(2, 30)
    caches = {}
    for first, last in [(0, 11), (11, 12), (12, 13), (13, 20), (20, 30)]:
        logits = []
        for model in both:
            out = model(ids[:, first:last], past_key_values=caches.get(model), use_cache=True)
            caches[model] = out.past_key_values
            logits.append(out.logits)
        assert (logits[0] - logits[1]).abs().max() < TOLERANCE


@torch.no_grad()
def test_greedy_generation_of_a_padded_batch(both):
    ids = distinct_tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :2] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    ours, theirs = (m.generate(ids, **options) for m in both)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_their_folder_opens_as_ours_through_the_auto_class(both, tmp_path):
    ours, theirs = both
    theirs.save_pretrained(tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert type(again) is DogeForCausalLM
    ids = distinct_tokens(2, 30)
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert set(again.state_dict()) == set(theirs.state_dict())


def test_gradients(both):
    ours, theirs = both
    ids = distinct_tokens(2, 30)
    for model in both:
        model(ids, labels=ids).loss.backward()
    reference = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        error = (p.grad - reference[name].grad).norm() / reference[name].grad.norm().clamp(min=1e-12)
        assert error < 1e-4, name


def test_untied_folder_without_our_extra_fields(make_model, tmp_path):
    """transformers leaves fields that equal its defaults out of config.json: they must mean the same here."""
    ours = make_model(tie_word_embeddings=False)
    theirs = TheirDoge(TheirDoge.config_class(**{k: v for k, v in ours.config.to_dict().items() if k != "head_dim"}))
    theirs.load_state_dict(ours.state_dict())
    theirs.save_pretrained(tmp_path)
    again = DogeForCausalLM.from_pretrained(tmp_path).eval()
    ids = distinct_tokens(1, 20)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, ours(ids).logits)
