"""Scores that age: their order against exact fractions, and attention that ranks by it against a loop over queries."""

import heapq
import importlib
import math
import os
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small_doge.ops.dynamic_mask import FORCE, aged, dynamic_mask_attention, eviction_times, ranks
from small_doge.ops.dynamic_mask.window import AT_ONCE, LONGEST, as_scores, grid, places

attending = importlib.import_module("small_doge.ops.dynamic_mask")
window_module = importlib.import_module("small_doge.ops.dynamic_mask.window")
launcher = importlib.import_module("small_doge.ops.dynamic_mask.sparse")


def exact_places(scores, lifetime, arrivals=None):
    """The definition, in fractions: of each score, rounded to 12 bits of mantissa, ⌊s · lifetime⌋ + arrival + 1."""
    worth = []
    for s in scores:
        if s < math.inf:
            mantissa, exponent = math.frexp(s)  # in [½, 1): one bit, and 12 that are kept
            s = Fraction(math.floor(mantissa * 2**13 + 0.5), 2**13) * Fraction(2) ** exponent
            worth.append(min(math.floor(s * Fraction(lifetime)), LONGEST))
        else:
            worth.append(LONGEST)
    return [x + j + 1 for x, j in zip(worth, range(len(worth)) if arrivals is None else arrivals, strict=True)]


# Near ones that differ on the grid or do not, and any others. Below 1e-37 floats have fewer bits.
score = st.sampled_from([0.0, 1.0, 1.0, 1.00001, 1.0003, 1.01, 2.0, 50.0, 1e30, 3.4e38, math.inf])
score |= st.floats(0, 100, width=32, allow_subnormal=False) | st.floats(0, width=32, allow_subnormal=False)
# The products of these with 13 bits of a score are floats: nothing but ⌊ ⌋ rounds them.
lifetimes = st.sampled_from([2**-20, 0.25, 1, 3, 100, 2047, 2.0**15, 2.0**60])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(score, st.integers(1, 9)), min_size=1, max_size=50), lifetimes)
def test_the_order_is_that_of_fractions(keys, lifetime):
    """Also of keys that a cache holds, between whose arrivals others came; and wherever the text begins."""
    s, gaps = (torch.tensor(x) for x in zip(*keys, strict=True))
    arrivals = gaps.cumsum(0)
    place = places(s, arrivals, lifetime)
    by = as_scores(place)
    expected = exact_places(s.tolist(), lifetime, arrivals.tolist())
    assert place.tolist() == expected
    assert ranks(by).argsort().tolist() == sorted(range(len(keys)), key=lambda j: (expected[j], j))
    assert torch.equal(grid(by) - grid(by)[0], place - place[0])
    later = arrivals + 10**6
    assert torch.equal(places(s, later, lifetime), place + 10**6)
    assert torch.equal(as_scores(places(s, later, lifetime)), by)
    alone = as_scores(places(s, torch.arange(7, 7 + len(keys)), lifetime))
    assert torch.equal(aged(s[None, None], lifetime)[0, 0], alone)


@settings(max_examples=100, deadline=None)
@given(st.lists(score, min_size=1, max_size=20), st.floats(1e-6, 1e30))
def test_any_lifetime_is_off_by_a_token_at_most(values, lifetime):
    got = places(torch.tensor(values), torch.arange(len(values)), lifetime).tolist()
    assert all(abs(x - y) <= 1 for x, y in zip(got, exact_places(values, lifetime), strict=True))


def test_noise_in_the_last_bits_of_a_score_does_not_decide():
    s = torch.full((6,), 1.3) * (1 + torch.tensor([2e-6, -2e-6, 1e-6, 0, -1e-6, 0]))
    for x in (s, s.double()):
        assert places(x, torch.zeros(6, dtype=torch.int64), 1e5).tolist() == exact_places([1.3], 1e5) * 6


@pytest.mark.parametrize("lifetime", [1e-3, 1.0, 4096.0])
def test_equal_scores_are_a_sliding_window(lifetime):
    """And a score higher by 1 makes up for ``lifetime`` tokens of age, not for one more."""
    s = torch.full((1, 1, 100), 1.3)
    assert eviction_times(aged(s, lifetime), 7)[0, 0].tolist() == [min(j + 7, 100) for j in range(100)]
    s = torch.tensor([2.0, 1.0, 1.0])
    for age, first_is_better in ((4095, True), (4096, False)):
        old, new = places(s[:2], torch.tensor([0, age]), 4096).tolist()
        assert (old > new) == first_is_better


def test_so_many_tokens_are_told_apart_and_no_more():
    s = torch.zeros(AT_ONCE)
    s[AT_ONCE // 2 :] = math.inf
    by = aged(s, 1.0)
    assert by.isfinite().all()
    assert (by >= torch.finfo(torch.float32).tiny).all()  # smaller ones may be flushed to zero
    gaps = grid(by).diff()
    assert gaps[AT_ONCE // 2 - 1] == LONGEST + 1
    assert (gaps == 1).sum() == AT_ONCE - 2
    with pytest.raises(ValueError, match=f"{AT_ONCE + 1:,} tokens at once .*, expected at most {AT_ONCE:,}"):
        aged(torch.zeros(1).expand(AT_ONCE + 1), 1.0)


def test_keys_that_a_cache_holds_for_long_are_told_from_new_ones():
    """The first is there for as long as a score can keep it; the newest have such scores themselves."""
    s, arrivals = LONGEST + torch.tensor([0.0, -LONGEST, 0, -192]), LONGEST - torch.tensor([LONGEST, 300, 299, 200])
    place = places(s, arrivals, 1.0)
    assert torch.equal(ranks(as_scores(place)).argsort(), place.argsort())


def kept_by_hand(s, lifetime, window, key_mask=None, documents=None, local_window=0):
    """Scores (B, M, T) → what each query sees, (B, M, T, T) bool, one query after the other."""
    B, M, T = s.shape
    kept = torch.zeros(B, M, T, T, dtype=torch.bool)
    for b in range(B):
        real = [True] * T if key_mask is None else key_mask[b].tolist()
        document = [0] * T if documents is None else documents[b].tolist()
        for m in range(M):
            place = exact_places(s[b, m].float().tolist(), lifetime)
            for i in range(T):
                seen = [j for j in range(i + 1) if real[j] and document[j] == document[i]]
                best = heapq.nlargest(window, seen, key=lambda j: (place[j], j))
                kept[b, m, i, best + [j for j in seen if i - j < local_window] + [i] * (not real[i])] = True
    return kept


def attention(q, k, v, s, kept):
    """Softmax over what is kept; as many queries as keys."""
    k, v, s, kept = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v, s, kept))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + s[:, :, None]
    return logits.masked_fill(~kept, -math.inf).softmax(-1) @ v


def inputs(B=2, H=4, G=2, M=2, T=60, D=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, T, D, generator=g)
    k, v = (torch.randn(B, G, T, D, generator=g) for _ in range(2))
    s = torch.rand(B, M, T, generator=g) * 3 + 0.1
    return [x.to(dtype).requires_grad_() for x in (q, k, v, s)]


def described(T):
    """Padding on the left of the first row, and three documents."""
    key_mask = torch.ones(2, T, dtype=torch.bool)
    key_mask[0, : T // 9] = False
    starts = torch.zeros(2, T, dtype=torch.int64)
    starts[:, [T // 3, T // 3 + 2]] = 1
    return {"key_mask": key_mask, "documents": starts.cumsum(-1)}


def assert_equal(got, leaves, expected, exact, rows, tolerance):
    """Outputs, where queries are real, and all gradients."""
    g = torch.Generator().manual_seed(1)
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=g) * rows
    gradients = torch.autograd.grad((got * cotangent.to(got.dtype)).sum(), leaves)
    expected_gradients = torch.autograd.grad((expected * cotangent).sum(), exact)
    assert ((got - expected) * rows).norm() < tolerance * (expected * rows).norm()
    for name, a, b in zip("qkvs", gradients, expected_gradients, strict=True):
        assert (a - b).norm() < 10 * tolerance * b.norm(), name


LIFETIME = 8  # scores are worth up to 25 tokens


@pytest.mark.parametrize("path", ["reference", "chunked"])
@pytest.mark.parametrize("window", [3, 20])
@pytest.mark.parametrize("local_window", [0, 5])
@pytest.mark.parametrize("M", [2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_that_of_a_loop_over_queries(monkeypatch, path, window, local_window, M, packed):
    leaves, options = inputs(M=M), described(60) if packed else {}
    kept = kept_by_hand(leaves[3], LIFETIME, window, local_window=local_window, **options)
    rows = options["key_mask"][:, None, :, None].double() if packed else torch.ones(2, 1, 60, 1)
    monkeypatch.setenv(FORCE, path)
    by = aged(leaves[3], LIFETIME)
    got, _ = dynamic_mask_attention(*leaves, window, rank_by=by, local_window=local_window, **options)
    assert_equal(got, leaves, attention(*leaves, kept), leaves, rows, 1e-12)
    # Neither what scores alone give nor what age alone gives
    for other in (leaves[3], aged(torch.ones_like(leaves[3]), LIFETIME)):
        off, _ = dynamic_mask_attention(*leaves, window, rank_by=other, local_window=local_window, **options)
        assert ((off - got) * rows).abs().max() > 0.01


@pytest.mark.parametrize("path", ["reference", "chunked"])
def test_new_queries_after_old_keys(monkeypatch, path):
    q, k, v, s = inputs()
    monkeypatch.setenv(FORCE, path)
    got, _ = dynamic_mask_attention(q[:, :, -9:], k, v, s, 6, rank_by=aged(s, LIFETIME), local_window=2)
    expected = attention(q, k, v, s, kept_by_hand(s, LIFETIME, 6, local_window=2))[:, :, -9:]
    assert (got - expected).abs().max() < 1e-12


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run on the GPU here")
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_equal_a_loop_over_queries(monkeypatch, packed):
    """Those that sort the keys, among the smallest of normal floats, and those that attend."""
    pytest.importorskip("triton", reason="needs Triton, which is there on Linux only")
    monkeypatch.setattr(launcher, "CHUNK", 128)
    monkeypatch.setattr(attending, "usable", lambda x: True)
    monkeypatch.setattr(window_module, "usable", lambda x: True)
    monkeypatch.setattr(window_module, "_rank_and_evict", None)
    monkeypatch.setenv(FORCE, "sparse")
    leaves = inputs(B=2 if packed else 1, H=2, G=1, M=1, T=135, D=16, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    options = described(135) if packed else {}
    kept = kept_by_hand(leaves[3], LIFETIME, 30, local_window=3, **options)
    rows = options["key_mask"][:, None, :, None].double() if packed else torch.ones(1, 1, 135, 1)
    got, _ = dynamic_mask_attention(*leaves, 30, rank_by=aged(leaves[3], LIFETIME), local_window=3, **options)
    assert_equal(got, leaves, attention(*exact, kept), exact, rows, 1e-6)


@pytest.mark.parametrize("window", [7, 60])
def test_what_to_rank_by_has_the_shape_of_the_scores(window):
    leaves = inputs()
    for wrong in (leaves[3][:, :1], leaves[3][:, :, 1:], leaves[3][0]):
        with pytest.raises(ValueError, match=r"rank_by has shape .*, expected that of the scores, \(2, 2, 60\)"):
            dynamic_mask_attention(*leaves, window, rank_by=wrong)
