"""The three laws, over every path: causality, a cached step equals the full pass, a document equals itself alone."""

import itertools

import pytest
import torch
from transformers import DogeForCausalLM as TheirDoge
from transformers import DynamicCache

PATHS = {
    "folded": {"keep_window_size": 64},
    "reference": {"keep_window_size": 7},
    "window of one": {"keep_window_size": 1},
    "local window": {"keep_window_size": 5, "local_window": 3},
    "scores that age": {"keep_window_size": 7, "score_lifetime": 4.0},
    "scores that age, local window": {"keep_window_size": 5, "local_window": 3, "score_lifetime": 4.0},
    "first release": {"keep_window_size": 7, "qk_norm": False, "mask_heads": 4},
    "first release, folded": {"keep_window_size": 64, "qk_norm": False, "mask_heads": 4},
    "biases": {"keep_window_size": 7, "attention_bias": True, "mlp_bias": True},
    "first release, local window": {"keep_window_size": 6, "qk_norm": False, "mask_heads": 4, "local_window": 2},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}, "keep_window_size": 7},
    "experts": {"keep_window_size": 7, "is_moe": True, "num_experts": 25, "num_experts_per_tok": 3},
}
# Words repeat, as they do in text: equal tokens tie in the first layer.
TEXT = [5, 9, 7, 5, 9, 30, 7, 5, 5, 5, 11, 9, 7, 31, 5, 9, 8, 7, 5, 30, 12, 9, 5, 7, 9, 5, 40, 41, 5, 9]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


def ids(*rows):
    return torch.tensor(rows or [TEXT])


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_later_token_changes_no_earlier_logit(make_model, path, dtype):
    model = make_model(dtype, **path)
    before = model(ids()).logits
    for position in (29, 15, 1):
        edited = ids()
        edited[0, position:] = torch.arange(30 - position) + 50
        after = model(edited).logits
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.allclose(before[:, position], after[:, position])


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("steps", [[30], [1] * 30, [10] + [1] * 20, [3, 7, 1, 1, 12, 6]], ids=str)
@pytest.mark.parametrize("growing", [False, True])  # the default cache, of constant size, and transformers'
def test_a_cached_step_equals_the_full_sequence(make_model, path, dtype, steps, growing):
    model = make_model(dtype, **path)
    full, cache, start, logits = model(ids(), use_cache=False).logits, None, 0, []
    if growing:
        cache = DynamicCache(config=model.config)
    for n in steps:
        out = model(ids()[:, start : start + n], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + n
        logits.append(out.logits)
    assert (torch.cat(logits, 1) - full).abs().max() < TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_documents_packed_in_a_row_equal_themselves_alone(make_model, path, dtype):
    model = make_model(dtype, **path)
    cuts = [0, 9, 10, 22, 30]
    spans = list(itertools.pairwise(cuts))
    positions = torch.cat([torch.arange(b - a) for a, b in spans])[None]
    packed = model(ids(), position_ids=positions).logits
    for a, b in spans:
        assert (packed[:, a:b] - model(ids()[:, a:b]).logits).abs().max() < TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_text_equals_itself_alone(make_model, path, side):
    model = make_model(torch.float64, **path)
    for pads in (1, 6):
        real = slice(pads, None) if side == "left" else slice(None, 30 - pads)
        padded, mask = torch.full((1, 30), 2), torch.zeros(1, 30, dtype=torch.long)
        padded[:, real], mask[:, real] = ids()[:, : 30 - pads], 1
        batch, masks = torch.cat([padded, ids()]), torch.cat([mask, torch.ones_like(mask)])
        got = model(batch, attention_mask=masks, position_ids=(masks.cumsum(-1) - 1).clamp(min=0)).logits
        assert (got[0, real] - model(ids()[:, : 30 - pads]).logits[0]).abs().max() < 1e-9
        assert (got[1] - model(ids()).logits[0]).abs().max() < 1e-9
        assert got.isfinite().all()


@torch.no_grad()
def test_generation_of_a_padded_batch_equals_each_text_alone(make_model, path):
    model = make_model(torch.float64, **path)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    batch, mask = torch.full((2, 18), 2), torch.zeros(2, 18, dtype=torch.long)
    for row, n in enumerate((18, 7)):
        batch[row, 18 - n :], mask[row, 18 - n :] = ids()[0, :n], 1
    together = model.generate(batch, attention_mask=mask, **options)
    for row, n in enumerate((18, 7)):
        alone = model.generate(ids()[:, :n], attention_mask=torch.ones(1, n, dtype=torch.long), **options)
        assert torch.equal(together[row, 18:], alone[0, n:])


@torch.no_grad()
@pytest.mark.parametrize("window", [7, 64])
def test_beams_and_cached_generation_equal_uncached(make_model, window):
    model = make_model(torch.float64, keep_window_size=window)
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        cached, uncached = (model.generate(ids(), use_cache=c, **options) for c in (True, False))
        assert torch.equal(cached, uncached)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def largest_step_difference(model):
    """Between cached steps and full passes over the text so far, past the trained length, in logits."""
    with torch.no_grad():
        cache, worst = model(ids()[:, :10], use_cache=True).past_key_values, 0.0
        for t in range(10, 30):
            step = model(ids()[:, t : t + 1], past_key_values=cache, use_cache=True).logits[:, -1]
            worst = max(worst, (step - model(ids()[:, : t + 1], use_cache=False).logits[:, -1]).abs().max().item())
    return worst


def test_dynamic_rope_with_a_cache_past_the_trained_length(make_model, tmp_path):
    """Keys are cached unrotated and take the angles of the text as it has grown, so attention itself is exact.

    In deeper layers a key was made from hidden states under the angles of its time, and no cache can change that:
    what is left is less than where cached keys keep their old angles, as in transformers.
    """
    options = {"rope_parameters": DYNAMIC, "max_position_embeddings": 16, "keep_window_size": 64}
    for window in (64, 7):
        one_layer = options | {"num_hidden_layers": 1, "keep_window_size": window}
        assert largest_step_difference(make_model(torch.float64, **one_layer)) < 1e-9
    deep = make_model(torch.float64, **options)
    deep.save_pretrained(tmp_path)
    theirs = TheirDoge.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager").eval()
    assert largest_step_difference(deep) < 0.7 * largest_step_difference(theirs)
    default = make_model(torch.float64, max_position_embeddings=16, keep_window_size=64)
    with torch.no_grad():
        assert torch.allclose(default(ids()[:, :16]).logits, deep(ids()[:, :16]).logits, atol=1e-6)
        assert not torch.allclose(default(ids()).logits, deep(ids()).logits)


@torch.no_grad()
def test_dynamic_rope_forgets_a_long_text(make_model):
    """transformers keeps the frequencies of the longest text seen; ours are a function of the text at hand."""
    model = make_model(torch.float64, rope_parameters=DYNAMIC, max_position_embeddings=16)
    before = model(ids()[:, :20]).logits
    model(ids())
    assert torch.equal(before, model(ids()[:, :20]).logits)
