"""Dynamic Mask Attention: the reference against brute force, the folded path against the reference."""

import heapq
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small_doge.ops.dynamic_mask import dynamic_mask_attention, folded, reference
from small_doge.ops.dynamic_mask.reference import causal_mask, kept_keys, ranks


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got − expected‖ / ‖expected‖, in float64; NaN never passes."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def inputs(B=2, H=4, G=2, M=2, Tq=17, Tk=17, D=16, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, Tq, D, generator=g, dtype=torch.float64)
    k, v = (torch.randn(B, G, Tk, D, generator=g, dtype=torch.float64) for _ in range(2))
    s = torch.rand(B, M, Tk, generator=g, dtype=torch.float64) * 3 + 0.1
    return [x.to(dtype).requires_grad_() for x in (q, k, v, s)]


def brute_force(q, k, v, s, window, mask=None, local_window=0):
    """The formula of the design, one query at a time, in Python floats and a heap; on a tie the newer key wins."""
    B, H, Tq, D = q.shape
    G, M, Tk = k.shape[1], s.shape[1], k.shape[2]
    out = torch.zeros(B, H, Tq, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(Tq):
                i = Tk - Tq + t
                scores = s[b, h * M // H]
                seen = [j for j in range(Tk) if (j <= i if mask is None else mask[b, 0, t, j])]
                best = set(heapq.nlargest(window, seen, key=lambda j: (scores[j].item(), j)))
                best |= {j for j in seen if i - j < local_window}
                kept = sorted(best)
                logits = [(q[b, h, t] @ k[b, h * G // H, j]).item() / math.sqrt(D) + scores[j].item() for j in kept]
                top = max(logits)
                weights = [math.exp(x - top) for x in logits]
                for j, weight in zip(kept, weights, strict=True):
                    out[b, h, t] += weight / sum(weights) * v[b, h * G // H, j]
    return out


def documents_mask(lengths, pad=0):
    """(1, 1, T, T): documents of the given lengths after ``pad`` padding keys, each seeing itself only."""
    ids = torch.tensor([-1] * pad + [d for d, n in enumerate(lengths) for _ in range(n)])
    T = len(ids)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    mask = (ids[:, None] == ids) & causal & (ids >= 0)
    return (mask | torch.eye(T, dtype=torch.bool))[None, None]


@pytest.mark.parametrize("window", [1, 3, 7, 16, 17, 34])
@pytest.mark.parametrize("local_window", [0, 2])
@pytest.mark.parametrize(("G", "M"), [(1, 1), (2, 2), (4, 4), (2, 4)])
def test_reference_is_the_formula(window, local_window, G, M):
    q, k, v, s = inputs(G=G, M=M)
    out, weights = reference(q, k, v, s, window, local_window=local_window)
    expected = brute_force(q, k, v, s, window, local_window=local_window)
    assert relative_error(out, expected) < 1e-12
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_reference_with_several_new_queries_after_old_keys():
    q, k, v, s = inputs(Tq=5, Tk=19)
    assert relative_error(reference(q, k, v, s, 6)[0], brute_force(q, k, v, s, 6)) < 1e-12


def test_reference_with_documents_and_padding():
    q, k, v, s = inputs(B=1, Tq=20, Tk=20)
    mask = documents_mask([9, 8], pad=3)
    assert relative_error(reference(q, k, v, s, 4, mask=mask)[0], brute_force(q, k, v, s, 4, mask)) < 1e-12


@pytest.mark.parametrize("T", [1, 2, 17, 64, 129])
@pytest.mark.parametrize(("H", "G", "M"), [(1, 1, 1), (4, 2, 2), (4, 4, 4), (4, 1, 4), (6, 3, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_folded_agrees_with_reference_in_outputs_and_gradients(T, H, G, M, masked):
    leaves = inputs(H=H, G=G, M=M, Tq=T, Tk=T)
    mask = documents_mask([T - T // 3, T // 3] if T > 2 else [T]).expand(2, -1, -1, -1) if masked else None
    cotangent = torch.randn(2, H, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = reference(*leaves, T, mask=mask)[0]
    expected_gradients = torch.autograd.grad((expected * cotangent).sum(), leaves)
    got = folded(*leaves, mask=mask)
    gradients = torch.autograd.grad((got * cotangent).sum(), leaves)
    assert relative_error(got, expected) < 1e-12
    for name, a, b in zip("qkvs", gradients, expected_gradients, strict=True):
        # with one visible key the softmax is constant: nothing flows to q, k and s
        assert relative_error(a, b) < 1e-10 or (a - b).abs().max() < 1e-14, name


@pytest.mark.parametrize(("Tq", "Tk"), [(1, 9), (4, 9), (9, 9)])
def test_folded_aligns_new_queries_to_the_newest_keys(Tq, Tk):
    leaves = inputs(Tq=Tq, Tk=Tk)
    assert relative_error(folded(*leaves), brute_force(*leaves, Tk)) < 1e-12


def test_folded_in_bfloat16_is_as_exact_as_plain_attention():
    """The score takes two columns: with one, a score of 40 alone would be off by 0.1 in the logit."""
    leaves = inputs(B=4, Tq=200, Tk=200, D=64, dtype=torch.bfloat16)
    exact = [x.detach().double() for x in leaves[:3]]
    s = torch.rand(4, 2, 200) * 40
    error = relative_error(folded(*leaves[:3], s), reference(*exact, s.double(), 200)[0])
    plain = torch.nn.functional.scaled_dot_product_attention(*leaves[:3], is_causal=True, enable_gqa=True)
    plain_error = relative_error(plain, reference(*exact, torch.zeros(4, 2, 200).double(), 200)[0])
    assert error < 1.5 * plain_error < 1e-2


def test_folded_under_autocast_splits_the_score_for_the_dtype_it_meets():
    leaves = [x.detach() for x in inputs(B=4, Tq=200, Tk=200, D=64, dtype=torch.bfloat16)]
    s = torch.rand(4, 2, 200) * 40
    with torch.autocast("cpu", torch.bfloat16):
        got = folded(*(x.float() for x in leaves[:3]), s)
    assert torch.equal(got, folded(*leaves[:3], s))


def test_folded_gradient_of_the_score_in_bfloat16_is_counted_once():
    """The high and the low column both carry a gradient; together they must give that of one score."""
    leaves = inputs(Tq=65, Tk=65, D=32, dtype=torch.bfloat16)
    s = (torch.rand(2, 2, 65) * 3).requires_grad_()
    (got,) = torch.autograd.grad(folded(*leaves[:3], s).float().square().sum(), s)
    exact_s = s.detach().double().requires_grad_()
    out = reference(*(x.detach().double() for x in leaves[:3]), exact_s, 65)[0]
    (expected,) = torch.autograd.grad(out.square().sum(), exact_s)
    assert relative_error(got, expected) < 2e-2


scores = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.00001, 1.01, 2.0, 50.0, 1e4]), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(scores, st.integers(1, 12))
def test_kept_keys_are_those_of_a_heap_and_never_return(values, window):
    """W(i) against a heap on the grid; and once a key has left W it stays away, so that the mask is an interval."""
    s = torch.tensor(values, dtype=torch.float64)[None, None]
    T = len(values)
    kept = kept_keys(s, causal_mask(T, T, s.device), window)[0, 0]
    order = ranks(s)[0, 0].tolist()
    for i in range(T):
        best = set(heapq.nlargest(window, range(i + 1), key=lambda j: order[j]))
        assert set(kept[i].nonzero().flatten().tolist()) == best
    left = (kept.int().diff(dim=0) < 0).cumsum(0)
    assert not (kept[1:] & (left > 0)).any()


def test_a_tie_goes_to_the_newer_key_and_noise_does_not_decide_it():
    s = torch.full((1, 1, 6), 1.3, dtype=torch.float32)
    noisy = s * (1 + torch.tensor([2e-6, -2e-6, 1e-6, 0, -1e-6, 0]))
    for scores_ in (s, noisy, noisy.double()):
        kept = kept_keys(scores_, causal_mask(6, 6, s.device), 2)[0, 0]
        assert kept[5].nonzero().flatten().tolist() == [4, 5]


def test_ranks_order_as_numbers_do():
    values = torch.tensor([-torch.inf, -3.0, -1.0, -1e-30, 0.0, 1e-30, 0.7, 0.701, 1.0, 1e30, torch.inf])
    order = ranks(values).tolist()
    assert order == sorted(order)
    assert len(set(order)) == len(order)
    assert ranks(torch.tensor([0.0, -0.0])).tolist() == [r * 1 for r in ranks(torch.tensor([0.0, 0.0])).tolist()]


def test_dispatcher_folds_up_to_the_window_and_not_beyond():
    leaves = inputs()
    assert dynamic_mask_attention(*leaves, 17)[1] is None
    out, weights = dynamic_mask_attention(*leaves, 16)
    assert weights is not None
    assert relative_error(out, brute_force(*leaves, 16)) < 1e-12
    assert dynamic_mask_attention(*leaves, 17, return_weights=True)[1].shape == (2, 4, 17, 17)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, s: (q, k, v, s, 0), "window is 0"),
        (lambda q, k, v, s: (q, k[:, :, :, :8], v, s, 4), "do not fit"),
        (lambda q, k, v, s: (q[:, :3], k, v, s, 4), "do not fit"),
        (lambda q, k, v, s: (q, k, v, s[:, :, :5], 4), "scores have shape"),
        (lambda q, k, v, s: (q, k, v, torch.cat([s, s[:, :1]], 1), 4), "scores have shape"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dynamic_mask_attention(*change(*inputs()))


def test_masks_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="mask is torch.float32"):
        dynamic_mask_attention(*inputs(), 4, mask=torch.ones(2, 1, 17, 17))
    with pytest.raises(ValueError, match="expected bool"):
        dynamic_mask_attention(*inputs(), 4, mask=torch.ones(2, 1, 17, 16, dtype=torch.bool))
