"""DynamicMaskCache: the same output as a full pass and as a cache that holds every key, in constant memory."""

import copy
import heapq
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from small_doge import DynamicMaskCache
from small_doge.models.cache_layer import DynamicMaskLayer
from small_doge.ops.dynamic_mask.window import grid

DYNAMIC, YARN = ({"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0} for kind in ("dynamic", "yarn"))
MODELS = {
    "window beyond the text": {"keep_window_size": 64},
    "window of the text": {"keep_window_size": 30},
    "window one short": {"keep_window_size": 29},
    "small window": {"keep_window_size": 7},
    "window of one": {"keep_window_size": 1},
    "local window": {"keep_window_size": 5, "local_window": 3},
    "local window, filled by the text": {"keep_window_size": 25, "local_window": 5},
    "scores that age, local window": {"keep_window_size": 5, "local_window": 3, "score_lifetime": 4.0},
    "first release": {"keep_window_size": 6, "qk_norm": False, "mask_heads": 4, "local_window": 2},
    "yarn": {"keep_window_size": 7, "rope_parameters": YARN},
}
SPLITS = [[1] * 30, [10] + [1] * 20, [3, 7, 1, 1, 12, 1, 5], [30]]
# Words repeat, as they do in text: equal tokens tie in the first layer.
TEXT = [5, 9, 7, 5, 9, 30, 7, 5, 5, 5, 11, 9, 7, 31, 5, 9, 8, 7, 5, 30, 12, 9, 5, 7, 9, 5, 40, 41, 5, 9]
OTHER = [9, 9, 5, 41, 7, 5, 9, 60, 5, 7, 7, 9, 5, 5, 61, 9, 7, 5, 8, 8, 9, 5, 7, 30, 9, 9, 5, 7, 5, 40]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


@pytest.fixture(params=MODELS)
def options(request):
    return MODELS[request.param]


def in_parts(model, ids, lengths, cache, mask=None, positions=None):
    """Logits of ids (B, T) given in parts of ``lengths``."""
    start, logits = 0, []
    for n in lengths:
        end = start + n
        optional = {} if mask is None else {"attention_mask": mask[:, :end]}
        if positions is not None:
            optional["position_ids"] = positions[:, start:end]
        logits.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **optional).logits)
        start = end
    return torch.cat(logits, dim=1)


def padded_batch(where):
    """Two rows, one padded: ids, mask and positions, all (2, 30)."""
    ids, mask = torch.tensor([TEXT, OTHER]), torch.ones(2, 30, dtype=torch.long)
    pads = {"left": slice(0, 9), "middle": slice(8, 13), "right": slice(22, 30)}[where]
    ids[0, pads], mask[0, pads] = 2, 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_parts_equal_the_full_pass_and_the_growing_cache(make_model, options, split, dtype):
    model, ids = make_model(dtype, **options), torch.tensor([TEXT, OTHER])
    full = model(ids, use_cache=False).logits
    got = in_parts(model, ids, split, DynamicMaskCache(model.config))
    assert (got - full).abs().max() < TOLERANCE[dtype]
    assert (got - in_parts(model, ids, split, DynamicCache(config=model.config))).abs().max() < TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("where", ["left", "middle", "right"])
@pytest.mark.parametrize("split", SPLITS[:3], ids=str)
def test_padding_takes_no_place_in_the_window(make_model, options, where, split):
    if where == "middle" and "score_lifetime" in options:
        pytest.skip("a 4-D mask does not say what is padding and makes nothing older; see test_a_turn_may_be_padded")
    model = make_model(torch.float64, **options)
    ids, mask, positions = padded_batch(where)
    # As a 4-D mask: with a 2-D one, positions that stand still in the middle of a text would begin another document.
    sees = mask[:, None, None, :].bool().expand(-1, 1, 30, -1)
    full = model(ids, attention_mask=sees, position_ids=positions, use_cache=False).logits
    got = in_parts(model, ids, split, DynamicMaskCache(model.config), mask, positions)
    assert got.isfinite().all()
    assert (got - full)[mask.bool()].abs().max() < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("window", [7, 64])
@pytest.mark.parametrize("where", ["left", "middle"])
@pytest.mark.parametrize("split", [[10] + [1] * 20, [3, 7, 1, 1, 12, 1, 5]], ids=str)
def test_dynamic_rope_rotates_each_key_by_its_own_position(make_model, window, where, split):
    """One layer, past the trained length: each part equals a full pass over the text so far."""
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 8, "keep_window_size": window, "local_window": 2}
    model = make_model(torch.float64, rope_parameters=DYNAMIC, **sizes)
    ids, mask, positions = padded_batch(where)
    cache, start = DynamicMaskCache(model.config), 0
    for n in split:
        end = start + n
        part = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        got = model(ids[:, start:end], past_key_values=cache, **part).logits
        sees = mask[:, None, None, :end].bool().expand(-1, 1, end, -1)
        full = model(ids[:, :end], attention_mask=sees, position_ids=positions[:, :end], use_cache=False).logits
        assert (got - full[:, start:])[mask[:, start:end].bool()].abs().max() < 1e-9
        start = end


@torch.no_grad()
def test_dynamic_rope_in_deep_models_equals_the_growing_cache(make_model):
    model = make_model(torch.float64, rope_parameters=DYNAMIC, max_position_embeddings=8, keep_window_size=7)
    ids, mask, positions = padded_batch("left")
    caches = DynamicMaskCache(model.config), DynamicCache(config=model.config)
    a, b = (in_parts(model, ids, SPLITS[2], cache, mask, positions) for cache in caches)
    assert (a - b)[mask.bool()].abs().max() < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("local_window", [0, 3])
def test_scores_age_far_past_the_window(make_model, local_window):
    """A text of 40 windows, in parts that are short and long; and each query sees what a loop over keys gives it."""
    T, window, lifetime = 240, 6, 5.0
    options = {"keep_window_size": window, "local_window": local_window}
    model = make_model(torch.float64, score_lifetime=lifetime, **options)
    ids, found = torch.randint(3, 400, (2, T), generator=torch.Generator().manual_seed(0)), []
    for layer in model.model.layers:
        layer.self_attn.dt_proj.register_forward_hook(lambda module, inputs, dt: found.append(dt))
    full, weights = model(ids, output_attentions=True, use_cache=False).to_tuple()
    for layer, dt, seen in zip(model.model.layers, found, weights, strict=True):
        s = torch.exp(layer.self_attn.A * torch.nn.functional.softplus(dt)).transpose(1, 2)
        for b, m in ((0, 0), (0, 1), (1, 0)):
            bits = (s[b, m].float().view(torch.int32) + 1024) // 2048 * 2048  # 12 bits of mantissa
            worth = (bits.int().view(torch.float32).double() * lifetime).floor().tolist()
            for i in range(0, T, 7):
                best = heapq.nlargest(window, range(i + 1), key=lambda j, worth=worth: (worth[j] + j, j))
                best = {*best, *range(max(0, i + 1 - local_window), i + 1)}
                assert set(seen[b, 2 * m, i].nonzero().flatten().tolist()) == best
    # Scores decide, and age decides.
    for other in (None, 1.0):
        assert (make_model(torch.float64, score_lifetime=other, **options)(ids).logits - full).abs().max() > 0.1
    assert (model(ids, use_cache=False).logits - full).abs().max() < 1e-9
    for split in ([20] + [1] * 30 + [70] + [1] * 20 + [17, 83], [T]):
        assert (in_parts(model, ids, split, DynamicMaskCache(model.config)) - full).abs().max() < 1e-9


scores = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.00001, 1.01, 50.0]), min_size=2, max_size=40)
lifetimes = st.sampled_from([None, 0.5, 8.0])


@settings(max_examples=200, deadline=None)
@given(scores, st.integers(1, 9), st.integers(0, 4), lifetimes, st.integers(0, 2**32), st.booleans())
def test_the_slots_hold_what_a_heap_holds(values, window, local_window, lifetime, seed, padded):
    """After parts of any length, the newest token sees the w best real keys and the last l; nobody holds more."""
    g = torch.Generator().manual_seed(seed)
    s = torch.tensor(values, dtype=torch.float64)
    s = torch.stack([s, s.flip(0)])[None]  # (1, 2, T): two heads
    T, real = len(values), torch.rand(1, len(values), generator=g) < (0.7 if padded else 1.1)
    layer, start = DynamicMaskLayer(window, local_window, lifetime), 0
    while start < T:
        n = min(1 + int(torch.randint(5, (), generator=g)) * int(torch.randint(2, (), generator=g)), T - start)
        k = torch.arange(start, start + n, dtype=torch.float64)[None, None, :, None].expand(1, 2, n, 4)
        new = layer.describe(k, -k, s[..., start : start + n], real[:, : start + n] if padded else None)
        layer.step(new) if n == 1 and start else layer.extend(new)
        start += n
        held, visible = layer.held, layer.visible()
        assert held.s.shape[-1] == min(start, window + local_window)
        for head in range(2):
            order = [(grid(s[0, head, j]).item(), j) for j in range(start)]
            if lifetime:
                ages = real[0].cumsum(0).tolist() if padded else range(start)  # padding makes nothing older
                order = [(math.floor(round(s[0, head, j].item(), 3) * lifetime) + ages[j], j) for j in range(start)]
            best = {j for _, j in heapq.nlargest(window, (order[j] for j in range(start) if real[0, j]))}
            best |= {j for j in range(max(0, start - local_window), start) if real[0, j]}
            seen = held.arrivals[0, head] if visible is None else held.arrivals[0, head][visible[0, head]]
            assert len(set(held.arrivals[0, head].tolist())) == held.s.shape[-1]
            assert set(seen.tolist()) - ({start - 1} if not real[0, start - 1] else set()) == best
            assert torch.equal(held.k[0, head, :, 0], held.arrivals[0, head].double())
            assert torch.equal(held.v, -held.k)
            assert torch.equal(held.s[0, head], s[0, head][held.arrivals[0, head]])


GENERATION = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
    "prefill in chunks": {"do_sample": False, "prefill_chunk_size": 4},
}


@torch.no_grad()
@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"keep_window_size": 5, "local_window": 4}, {"score_lifetime": 4.0}], ids=str)
def test_generation_equals_that_with_the_growing_cache(make_model, how, padded, sizes):
    model = make_model(torch.float64, **{"keep_window_size": 6, **sizes})
    ids, mask, _ = padded_batch("left")
    ids, mask = (ids[:, :18], mask[:, :18]) if padded else (ids[1:, :18], mask[1:, :18])
    options = {"max_new_tokens": 16, "eos_token_id": None, "return_dict_in_generate": True, "output_scores": True}
    results = []
    for cache in (None, DynamicCache(config=model.config)):
        torch.manual_seed(3)
        given = {} if cache is None else {"past_key_values": cache}
        results.append(model.generate(ids, attention_mask=mask, **given, **options, **GENERATION[how]))
    bounded, growing = results
    assert type(bounded.past_key_values) is DynamicMaskCache
    assert type(growing.past_key_values) is DynamicCache
    assert bounded.past_key_values.get_seq_length() == 33
    assert torch.equal(bounded.sequences, growing.sequences)
    assert all(torch.allclose(a, b, atol=1e-9, rtol=0) for a, b in zip(bounded.scores, growing.scores, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("lifetime", [None, 4.0])
def test_a_chat_goes_on_from_its_cache(make_model, lifetime):
    """A second turn of several tokens, given alone or with the first turn, equals generation from the whole text."""
    model = make_model(torch.float64, keep_window_size=6, score_lifetime=lifetime)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    first = model.generate(torch.tensor([TEXT[:12]]), return_dict_in_generate=True, **options)
    turn = torch.cat([first.sequences, torch.tensor([OTHER[:7]])], dim=1)
    expected = model.generate(turn, use_cache=False, **options)
    again = copy.deepcopy(first.past_key_values)
    assert torch.equal(model.generate(turn, past_key_values=first.past_key_values, **options), expected)
    new = {"attention_mask": torch.ones_like(turn), "past_key_values": again}
    assert torch.equal(model.generate(turn[:, again.get_seq_length() :], **new, **options)[:, 8:], expected[:, 27:])


@torch.no_grad()
@pytest.mark.parametrize("lifetime", [None, 4.0])
def test_a_turn_may_be_padded(make_model, lifetime):
    """The second turn of a batch of chats, padded on its left: to the text, padding has not come."""
    model, ids = make_model(torch.float64, keep_window_size=6, score_lifetime=lifetime), torch.tensor([TEXT])
    padded = torch.cat([ids[:, :15], torch.full((1, 8), 2), ids[:, 15:]], dim=1)
    mask = torch.ones_like(padded)
    mask[:, 15:23] = 0
    got = in_parts(model, padded, [15, 23], DynamicMaskCache(model.config), mask, mask.cumsum(-1) - 1)
    assert (got[mask.bool()] - model(ids).logits[0]).abs().max() < 1e-9


@torch.no_grad()
def test_generation_that_takes_tokens_back_gets_the_growing_cache(make_model):
    model = make_model(torch.float64, keep_window_size=6)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    plain = model.generate(torch.tensor([TEXT]), **options)
    assistant = make_model(torch.float64, seed=1, keep_window_size=6)
    ways = {"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}, {"cache_implementation": "dynamic"}
    for asked in ways:
        result = model.generate(torch.tensor([TEXT]), **asked, **options)
        assert type(result.past_key_values) is DynamicCache
        assert torch.equal(result.sequences, plain.sequences)
    assert model.generate(torch.tensor([TEXT]), use_cache=False, **options).past_key_values is None


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{"keep_window_size": 7}, {"keep_window_size": 5, "local_window": 3}], ids=str)
@pytest.mark.parametrize("mask_heads", [2, 4])
def test_memory_is_bounded_and_constant_once_the_window_is_full(make_model, sizes, mask_heads):
    model, size = make_model(mask_heads=mask_heads, **sizes), sum(sizes.values())
    cache, D = DynamicMaskCache(model.config), model.config.head_dim
    assert cache.nbytes == 0
    a_slot = 2 * 3 * mask_heads * (2 * D * 4 + 4 + 8)  # rows · layers · heads · (k and v, score, rank)
    for start, n in [(0, 3), *((t, 1) for t in range(3, 20)), (20, 9), (29, 1)]:
        model(torch.tensor([TEXT, OTHER])[:, start : start + n], past_key_values=cache)
        assert cache.get_seq_length() == start + n
        for layer in cache.layers:
            assert layer.keys.shape[2] == layer.values.shape[2] <= size
        assert cache.nbytes <= a_slot * min(size, 2 * (start + n))
        if start + n >= size:
            assert cache.nbytes == a_slot * size
    assert f"30 tokens seen, at most {size} keys a head, {cache.nbytes:,} bytes" in repr(cache)
    assert cache.get_mask_sizes(4, 0) == (34, 0)
    assert cache.get_max_length() == cache.get_max_cache_shape() == -1
    assert not cache.is_compileable
    cache.reset()
    assert cache.nbytes == cache.get_seq_length() == 0


@torch.no_grad()
@pytest.mark.parametrize("before", [5, 20])  # before and after keys are dropped
@pytest.mark.parametrize("rope", [None, DYNAMIC])
@pytest.mark.parametrize("lifetime", [None, 4.0])
def test_rows_are_reordered_repeated_and_selected(make_model, before, rope, lifetime):
    options = {"num_hidden_layers": 1, "rope_parameters": rope, "max_position_embeddings": 16, "keep_window_size": 7}
    options["score_lifetime"] = lifetime
    model, ids = make_model(torch.float64, **options), torch.tensor([TEXT, OTHER])
    rows = {
        "reorder_cache": (torch.tensor([1, 1]), [1, 1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1]),
        "batch_select_indices": (torch.tensor([1]), [1]),
    }
    for method, (argument, expected) in rows.items():
        cache = DynamicMaskCache(model.config)
        in_parts(model, ids[:, :before], [before - 2, 1, 1], cache)
        getattr(cache, method)(argument)
        got = in_parts(model, ids[expected, before:], [1, 1, 3], cache)
        alone = in_parts(model, ids[expected], [before - 2, 1, 1, 1, 1, 3], DynamicMaskCache(model.config))
        assert (got - alone[:, before:]).abs().max() < 1e-9, method
        getattr(DynamicMaskCache(model.config), method)(argument)  # an empty cache has no rows to change


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, {"keep_window_size": 9, "local_window": 3}, {"score_lifetime": 4.0}], ids=str)
def test_crop_is_exact_until_a_key_is_dropped_and_refused_after(make_model, sizes):
    model, ids = make_model(torch.float64, **{"keep_window_size": 12, **sizes}), torch.tensor([TEXT, OTHER])
    cache = DynamicMaskCache(model.config)
    in_parts(model, ids[:, :12], [5, 1, 1, 5], cache)
    assert cache.is_croppable
    cache.crop(-4)
    cache.crop(0)
    assert cache.get_seq_length() == 8
    other = torch.cat([ids[:, :8], ids.flip(0)[:, 8:]], dim=1)  # the text goes on in another way
    got = in_parts(model, other[:, 8:], [1, 1, 2, 1, 1, 10], cache)
    assert (got - model(other[:, :24]).logits[:, 8:]).abs().max() < 1e-9
    assert not cache.is_croppable
    state = [x.clone() for x in cache.layers[0].slots]
    with pytest.raises(ValueError, match="cannot remove the last 2 of 24 tokens: the cache holds the 12 best keys"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="tokens_to_remove is 20, expected a negative number"):
        cache.crop(20)
    cache.crop(0)
    assert cache.get_seq_length() == 24
    assert all(torch.equal(a, b) for a, b in zip(state, cache.layers[0].slots, strict=True))
    cache.reset()
    in_parts(model, ids[:, :5], [5], cache)
    cache.crop(-9)
    assert (in_parts(model, ids, SPLITS[1], cache) - model(ids).logits).abs().max() < 1e-9


@torch.no_grad()
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"keep_window_size": 9}, "made for a model with keep_window_size 9, expected keep_window_size 32"),
        ({"local_window": 2}, "local_window 2, expected local_window 0"),
        ({"score_lifetime": 8.0}, "score_lifetime 8.0, expected score_lifetime None"),
        ({"num_hidden_layers": 2}, "num_hidden_layers 2, expected num_hidden_layers 3"),
        ({"mask_heads": 4, "head_dim": 8}, "mask_heads 4, head_dim 8, expected mask_heads 2, head_dim 12"),
        (
            {"num_key_value_heads": 4},
            "num_key_value_heads 4, mask_heads 4, expected num_key_value_heads 2, mask_heads 2",
        ),
        ({"rope_parameters": DYNAMIC}, "rope_type dynamic, expected rope_type default"),
    ],
)
def test_a_cache_of_another_model_is_refused(make_model, other, message):
    cache = make_model(**other)(torch.tensor([TEXT]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=message):
        make_model()(torch.tensor([[5]]), past_key_values=cache)


@torch.no_grad()
def test_what_else_does_not_fit_is_named(make_model):
    model = make_model(keep_window_size=7)
    cache = model(torch.tensor([TEXT, OTHER])).past_key_values
    with pytest.raises(ValueError, match="the cache holds 2 rows, the input has 1"):
        model(torch.tensor([[5]]), past_key_values=cache)
    with pytest.raises(ValueError, match="needs the score of each key and serves small_doge's Doge models only"):
        cache.update(torch.zeros(2, 2, 1, 12), torch.zeros(2, 2, 1, 12), 0)
    with pytest.raises(ValueError, match="attention_mask is 4-D, but of the 30 tokens before these .* the 7 best keys"):
        model(torch.tensor([[5], [5]]), attention_mask=torch.ones(1, 1, 1, 31, dtype=torch.bool), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("split", [[10] + [1] * 20, [3, 7, 1, 1, 12, 1, 5]], ids=str)
@pytest.mark.parametrize("mask_heads", [2, 4])
@pytest.mark.parametrize("lifetime", [None, 4.0])
def test_attention_weights_cover_all_tokens_that_came(make_model, split, mask_heads, lifetime):
    options = {"keep_window_size": 5, "mask_heads": mask_heads, "score_lifetime": lifetime}
    model, ids = make_model(torch.float64, **options), torch.tensor([TEXT, OTHER])
    caches, start = (DynamicMaskCache(model.config), DynamicCache(config=model.config)), 0
    for n in split:
        part = ids[:, start : start + n]
        ours, theirs = (model(part, past_key_values=cache, output_attentions=True).attentions for cache in caches)
        start += n
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape == (2, 4, n, start)
            assert torch.allclose(a, b, atol=1e-9)


@torch.no_grad()
def test_a_step_reads_nothing_back_to_the_host(make_model):
    """Tensors on the meta device have no values: whoever asks for one fails."""
    for options in MODELS.values():
        model, ids = make_model(**options), torch.zeros(2, 1, dtype=torch.long, device="meta")
        cache = model(torch.tensor([TEXT, OTHER])[:, :5]).past_key_values
        for layer in cache.layers:
            layer._hold(layer.slots.map(lambda x: x.to("meta")))
        model.to("meta")
        with pytest.raises(RuntimeError):
            bool(ids.any())
        for t in range(6, 16):
            mask = torch.ones(2, t, device="meta") if t > 9 else None
            assert model(ids, attention_mask=mask, past_key_values=cache).logits.shape == (2, 1, 400)


def test_inference_mode_autocast_and_gradients_meet_the_cache(make_model):
    model, ids = make_model(keep_window_size=7), torch.tensor([TEXT, OTHER])
    with torch.no_grad():
        full = model(ids).logits
    with torch.inference_mode():
        cache = model(ids[:, :12]).past_key_values
    with torch.no_grad():  # slots made in inference mode are written outside it
        got = in_parts(model, ids[:, 12:], [1, 1, 5, 1, 10], cache)
    assert (got - full[:, 12:]).abs().max() < 2e-4
    with torch.no_grad():  # slots made in bfloat16 are written in float32
        with torch.autocast("cpu", torch.bfloat16):
            cache = model(ids[:, :12]).past_key_values
            in_parts(model, ids[:, 12:14], [1, 1], cache)
        assert in_parts(model, ids[:, 14:], [1, 1, 5, 9], cache).isfinite().all()
    gradients = []
    for use_cache in (False, True):  # a first part has all its gradients, one token long or longer
        model.zero_grad()
        for n in (1, 20):
            model(ids[:, :n], use_cache=use_cache).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("lifetime", [None, 4.0])
def test_a_compiled_model_fills_the_cache(make_model, lifetime):
    """As the Trainer's evaluation does; in one graph."""
    options = {"keep_window_size": 7, "score_lifetime": lifetime, "num_hidden_layers": 1}
    model, ids = make_model(**options), torch.tensor([TEXT, OTHER])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache = compiled(ids[:, :20]).past_key_values
    assert (in_parts(compiled, ids[:, 20:], [1, 1, 8], cache) - model(ids).logits[:, 20:]).abs().max() < 2e-4


@torch.no_grad()
def test_a_bfloat16_model_generates_as_exactly_with_either_cache(make_model):
    """Relative error of cached logits against float64; no worse than with the growing cache, the median of models."""
    errors, ids = [], torch.tensor([TEXT, OTHER])
    for seed in range(5):
        model = make_model(torch.float64, seed=seed, keep_window_size=64)
        exact = model(ids).logits
        model.to(torch.bfloat16)
        caches = DynamicMaskCache(model.config), DynamicCache(config=model.config)
        logits = [in_parts(model, ids, [10] + [1] * 20, cache).double() for cache in caches]
        errors.append([((x - exact).norm() / exact.norm()).item() for x in logits])
    ours, theirs = torch.tensor(errors).median(dim=0).values.tolist()
    assert ours < 1.2 * theirs < 0.04


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_a_step_does_not_wait_for_the_device(make_model):
    model, ids = make_model(keep_window_size=7).cuda(), torch.tensor([TEXT, OTHER]).cuda()
    full = model(ids).logits
    cache = model(ids[:, :5]).past_key_values
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(5, 30)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (torch.cat(logits, 1) - full[:, 5:]).abs().max() < 1e-3
