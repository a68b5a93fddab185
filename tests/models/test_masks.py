"""What a query may see: descriptions that grow with T, 4-D masks that cannot leak the future, and errors that name."""

import pytest
import torch
from transformers import DynamicCache

from small_doge.models import DynamicMaskCache
from small_doge.models.masks import visibility

IDS = torch.tensor([[5, 9, 7, 5, 9, 30, 7, 5, 5, 5, 11, 9], [9, 5, 41, 7, 7, 9, 5, 60, 9, 5, 7, 8]])
PADDED = torch.tensor([[0, 0, 0] + [1] * 9, [1] * 12])
EMBEDDED = torch.zeros(2, 12, 48)
SIZES = [{"keep_window_size": 5}, {"keep_window_size": 5, "local_window": 2}, {"keep_window_size": 64}]
SIZES += [{"keep_window_size": 5, "score_lifetime": 3.0}]


def test_descriptions_grow_with_the_text_and_not_with_its_square():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])
    key_mask, documents, mask = visibility(EMBEDDED, 0, PADDED, positions)
    assert mask is None
    assert torch.equal(key_mask, PADDED.bool())
    assert torch.equal(documents, torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]]).expand(2, -1))
    plain = visibility(EMBEDDED, 0, torch.ones(2, 12), torch.arange(12)[None])
    assert plain == visibility(EMBEDDED, 0, None, None) == (None, None, None)
    key_mask, documents, mask = visibility(EMBEDDED[:, :3], 9, PADDED, torch.tensor([[0, 0, 1], [9, 10, 11]]))
    assert key_mask.shape == (2, 12)
    assert documents is mask is None  # told apart without a cache only


def as_float(mask, dtype=torch.float32, hidden=float("-inf")):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_4d_mask_equals_the_2d_one_it_spells_out(make_model, sizes):
    model = make_model(torch.float64, **sizes)
    positions = (PADDED.cumsum(-1) - 1).clamp(min=0)
    expected = model(IDS, attention_mask=PADDED, position_ids=positions).logits
    causal = torch.ones(12, 12, dtype=torch.bool).tril() & PADDED.bool()[:, None, None, :]
    forms = [causal, as_float(causal), as_float(causal, torch.bfloat16, torch.finfo(torch.bfloat16).min)]
    forms += [as_float(causal, torch.float64, torch.finfo(torch.float64).min)]
    for form in forms:
        got = model(IDS, attention_mask=form, position_ids=positions).logits
        assert got.isfinite().all()  # padding sees itself where the mask leaves it nothing
        assert (got - expected)[PADDED.bool()].abs().max() < 1e-9
    one_for_all = model(IDS, attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()).logits
    assert (one_for_all - model(IDS).logits).abs().max() < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_4d_mask_spells_out_documents(make_model, sizes):
    model = make_model(torch.float64, **sizes)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]])
    documents = (positions == 0).cumsum(-1)
    same = (documents[:, :, None] == documents[:, None, :])[:, None]
    got = model(IDS, attention_mask=same, position_ids=positions).logits
    assert (got - model(IDS, position_ids=positions).logits).abs().max() < 1e-9
    assert (got - model(IDS).logits).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_4d_mask_cannot_show_the_future(make_model, sizes):
    model = make_model(torch.float64, **sizes)
    edited = IDS.clone()
    edited[:, 7:] += 60
    for everything in (torch.ones(2, 1, 12, 12, dtype=torch.bool), torch.zeros(2, 1, 12, 12)):
        a, b = (model(ids, attention_mask=everything).logits for ids in (IDS, edited))
        assert torch.equal(a[:, :7], b[:, :7])
        assert (a - model(IDS).logits).abs().max() < 1e-9


@torch.no_grad()
def test_a_4d_mask_over_cached_tokens(make_model):
    """(T, past + T) with either cache, while the bounded one still holds every key."""
    model = make_model(torch.float64, keep_window_size=12)
    sees = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    sees[0, :, 3:, 1] = False
    expected = model(IDS, attention_mask=sees).logits
    for cache in (DynamicMaskCache(model.config), DynamicCache(config=model.config)):
        logits = []
        for start, end in [(0, 6), (6, 7), (7, 8), (8, 12)]:
            part = sees[:, :, start:end, :end]
            logits.append(model(IDS[:, start:end], attention_mask=part, past_key_values=cache).logits)
        assert (torch.cat(logits, 1) - expected).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.ones(2, 11),
            r"attention_mask has shape \(2, 11\), expected \(B=2, Tk=12\) or \(2 or 1, 1, T=12, Tk=12\)",
        ),
        (torch.ones(1, 12), r"attention_mask has shape \(1, 12\), expected \(B=2, Tk=12\)"),
        (torch.ones(2, 12, 12), r"attention_mask has shape \(2, 12, 12\), expected"),
        (torch.ones(2, 4, 12, 12).bool(), r"shape \(2, 4, 12, 12\), expected \(2 or 1, 1, T=12, Tk=12\)"),
        (torch.ones(3, 1, 12, 12).bool(), r"shape \(3, 1, 12, 12\), expected \(2 or 1, 1, T=12, Tk=12\)"),
        (torch.ones(2, 1, 12, 11).bool(), r"shape \(2, 1, 12, 11\), expected \(2 or 1, 1, T=12, Tk=12\)"),
        (torch.ones(2, 1, 12, 12).long(), "4-D attention_mask is torch.int64, expected bool, or floating point"),
        (
            torch.ones(2, 1, 12, 12),
            "4-D attention_mask holds 1, expected only 0 where a key is seen and -inf elsewhere",
        ),
        (torch.full((2, 1, 12, 12), -0.5), "4-D attention_mask holds -0.5, expected only 0"),
        (torch.full((2, 1, 12, 12), float("nan")), "4-D attention_mask holds nan, expected only 0"),
        (torch.full((2, 1, 12, 12), float("inf")), "4-D attention_mask holds inf, expected only 0"),
    ],
)
def test_masks_that_do_not_fit_are_named(make_model, mask, message):
    with pytest.raises(ValueError, match=message):
        make_model()(IDS, attention_mask=mask)


COMPILED = {
    "plain": {},
    "padding": {"attention_mask": PADDED},
    "documents": {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]])},
    "4-D": {"attention_mask": as_float(torch.ones(2, 1, 12, 12, dtype=torch.bool).tril())},
}


@pytest.mark.parametrize("what", COMPILED)
@pytest.mark.parametrize("window", [5, 64])
def test_training_is_traced_without_graph_breaks(make_model, what, window):
    gradients = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = make_model(keep_window_size=window).train()
        run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        run(IDS, labels=IDS, use_cache=False, **COMPILED[what]).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
