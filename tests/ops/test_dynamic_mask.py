"""Dynamic Mask Attention: the reference against brute force, the folded path against the reference."""

import heapq
import importlib
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small_doge.ops.dynamic_mask import (
    FORCE,
    choose_path,
    chunked,
    dynamic_mask_attention,
    eviction_times,
    folded,
    ranks,
    reference,
    visible_keys,
)
from small_doge.ops.dynamic_mask.reference import kept_keys


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_scores_keep_their_low_part(dtype):
    """torch.compile takes x.to(half).to(float) for x inside a kernel: what the first column leaves out would be 0."""
    g = torch.Generator().manual_seed(0)
    k, s = torch.randn(1, 2, 33, 64, generator=g).to(dtype), torch.randn(1, 2, 33, generator=g) * 3
    append = sys.modules[folded.__module__]._append
    for f in (append, torch.compile(append, fullgraph=True)):
        columns = f(k, s, 72)[..., 64:].double()
        assert relative_error(columns[..., 0], s.double() * 8) > 2**-14  # one column does not hold it
        assert relative_error(columns.sum(-1), s.double() * 8) < 2**-15


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
    kept = kept_keys(s, visible_keys(T, T, s.device), window)[0, 0]
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
        kept = kept_keys(scores_, visible_keys(6, 6, s.device), 2)[0, 0]
        assert kept[5].nonzero().flatten().tolist() == [4, 5]


def test_ranks_order_as_numbers_do():
    values = torch.tensor([-torch.inf, -3.0, -1.0, -1e-30, 0.0, 1e-30, 0.7, 0.701, 1.0, 1e30, torch.inf])
    order = ranks(values).tolist()
    assert order == sorted(order)
    assert len(set(order)) == len(order)
    assert ranks(torch.tensor([0.0, -0.0])).tolist() == [r * 1 for r in ranks(torch.tensor([0.0, 0.0])).tolist()]


SCORES = {
    "random": lambda s: s,
    "tied": torch.ones_like,
    "rising": lambda s: s.sort(-1).values,
    "falling": lambda s: s.sort(-1, descending=True).values,
    "one huge key": lambda s: s.index_fill(-1, torch.tensor([s.shape[-1] // 3]), 40.0),
    "minus infinity": lambda s: s.masked_fill(s < 1.5, -torch.inf).index_fill(-1, torch.tensor([0]), 1.0),
    "equal in bfloat16": lambda s: 1 + s * 2**-10,
}


def assert_agrees(got, leaves, expected, exact, tolerance, rows=1.0):
    """Outputs and all gradients under one random cotangent; ``rows`` is 0 where a query is padding."""
    g = torch.Generator().manual_seed(1)
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=g) * rows
    gradients = torch.autograd.grad((got * cotangent.to(got.dtype)).sum(), leaves)
    expected_gradients = torch.autograd.grad((expected * cotangent).sum(), exact)
    assert relative_error(got * rows, expected * rows) < tolerance
    largest = max(x.abs().max() for x in expected_gradients)
    for name, a, b in zip("qkvs", gradients, expected_gradients, strict=True):
        # with one visible key the softmax is constant: nothing flows to q, k and s
        assert relative_error(a, b) < 2 * tolerance or (a - b).abs().max() < tolerance * largest, name


LENGTHS = [1, 2, 17, 127, 128, 129, 1000]
WINDOWS = [lambda T: 1, lambda T: 7, lambda T: 128, lambda T: T - 1, lambda T: T, lambda T: 2 * T]
SHAPES = [*sorted({(T, w(T)) for T in LENGTHS for w in WINDOWS if w(T)}), (4097, 128)]


@pytest.mark.parametrize(("T", "window"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_chunked_agrees_with_reference_at_odd_lengths(T, window, dtype, tolerance):
    leaves = inputs(B=1, H=2, G=1, M=1, Tq=T, Tk=T, dtype=dtype, seed=T)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    e = eviction_times(leaves[3], window)
    got = chunked(*leaves, e, min(window, T), chunk=100)
    assert_agrees(got, leaves, reference(*exact, window)[0], exact, tolerance)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(
    ("H", "G", "M", "D"), [(4, 4, 4, 16), (4, 2, 2, 80), (4, 1, 1, 64), (4, 1, 4, 16), (2, 1, 1, 128)]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_chunked_agrees_with_reference_for_any_score_and_head(kind, H, G, M, D, dtype, tolerance):
    leaves = [x.detach() for x in inputs(H=H, G=G, M=M, Tq=150, Tk=150, D=D, dtype=dtype)]
    leaves[3] = SCORES[kind](leaves[3].to(torch.promote_types(dtype, torch.float32)))  # scores are never bfloat16
    leaves = [x.requires_grad_() for x in leaves]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    got = chunked(*leaves, eviction_times(leaves[3], 40), 40, chunk=64)
    assert_agrees(got, leaves, reference(*exact, 40)[0], exact, tolerance)


@pytest.mark.parametrize("window", [3, 30, 200])
@pytest.mark.parametrize("local_window", [0, 5])
def test_padding_and_documents_on_every_path(window, local_window, monkeypatch):
    leaves = inputs(Tq=130, Tk=130)
    key_mask = torch.arange(130) >= torch.tensor([[9], [0]])
    documents = torch.tensor([0] * 60 + [1] * 2 + [2] * 68).expand(2, -1).contiguous()
    rows = key_mask[:, None, :, None].double()
    expected = brute_force(*leaves, window, visible_keys(130, 130, rows.device, key_mask, documents), local_window)
    for path in ("reference", "chunked", *(["folded"] if window >= 130 else [])):
        monkeypatch.setenv(FORCE, path)
        got, _ = dynamic_mask_attention(
            *leaves, window, key_mask=key_mask, documents=documents, local_window=local_window
        )
        assert relative_error(got * rows, expected * rows) < 1e-12, path


@pytest.mark.parametrize(("Tq", "Tk"), [(1, 90), (5, 90), (64, 90)])
def test_new_queries_after_old_keys_past_the_window(Tq, Tk):
    leaves = inputs(Tq=Tq, Tk=Tk)
    got, _ = dynamic_mask_attention(*leaves, 20, local_window=2)
    assert relative_error(got, brute_force(*leaves, 20, local_window=2)) < 1e-12


def test_chunked_with_dropout_drops_weights_and_not_more():
    q, k, v, s = inputs(B=1, Tq=400, Tk=400)
    e = eviction_times(s, 100)
    torch.manual_seed(0)
    ones = chunked(q, k, torch.ones_like(v), s, e, 100, dropout_p=0.5)  # weights sum to 1 on average
    assert abs(ones.mean().item() - 1) < 0.05
    assert ones.std() > 0.05


def test_chunked_needs_no_memory_that_grows_with_the_square(monkeypatch):
    """The largest tensor that attention is asked to mask is chunk × (window + chunk)."""
    sizes = []
    module = importlib.import_module("small_doge.ops.dynamic_mask.chunked")
    original = module.folded

    def recorded(*tensors, mask, **options):
        sizes.append(mask.shape[-2:])
        return original(*tensors, mask=mask, **options)

    monkeypatch.setattr(module, "folded", recorded)
    q, k, v, s = inputs(B=1, Tq=3000, Tk=3000)
    chunked(q, k, v, s, eviction_times(s, 64), 64, chunk=128).sum().backward()
    assert max(sizes) == (128, 192)


def test_the_path_is_chosen_by_shape_and_says_why(monkeypatch):
    monkeypatch.delenv(FORCE, raising=False)
    q, k, _, _ = inputs()
    assert choose_path(q, k, 17) == ("folded", "no key can drop out: 17 keys, a window of 17")
    assert choose_path(q, k, 16) == ("chunked", "keys drop out: 17 keys, a window of 16")
    assert choose_path(q, k, 17, return_weights=True)[0] == "reference"
    assert choose_path(q, k, 16, mask=True)[0] == "reference"
    assert choose_path(q, k, 17, mask=True)[0] == "folded"
    assert choose_path(q[:, :, :16], k, 16) == ("reference", "few queries: 16 of 17 keys, a window of 16")
    assert choose_path(q[:, :, :16], k[:, :, :16], 15)[0] == "chunked"
    long = torch.empty(1, 1, 16384, 16, device="meta")
    assert choose_path(long, long, 16384)[0] == "folded"
    assert choose_path(long, long, 16384, packed=True)[0] == "chunked"


@pytest.mark.parametrize("path", ["reference", "folded", "chunked"])
def test_a_path_can_be_forced(monkeypatch, path):
    leaves = inputs()
    expected = brute_force(*leaves, 17)
    monkeypatch.setenv(FORCE, path)
    out, weights = dynamic_mask_attention(*leaves, 17)
    assert relative_error(out, expected) < 1e-12
    assert (weights is not None) == (path == "reference")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("flash", {}, "'flash', which cannot be: expected one of reference, folded, packed, chunked, sparse"),
        ("folded", {"window": 5}, "`folded` drops no key, and there are 17 keys for a window of 5"),
        ("chunked", {"return_weights": True}, "only `reference` returns the attention weights"),
        ("chunked", {"mask": torch.ones(1, 1, 17, 17, dtype=torch.bool)}, "takes no mask of its own for every query"),
        ("sparse", {}, "the kernels need Triton and an NVIDIA GPU"),
        ("packed", {}, "`packed` takes documents, and no padding"),
        ("packed", {"documents": torch.zeros(2, 17, dtype=torch.int64)}, "the kernels need Triton and an NVIDIA GPU"),
        ("packed", {"window": 5}, "`packed` drops no key, and there are 17 keys for a window of 5"),
        ("packed", {"key_mask": torch.ones(2, 17, dtype=torch.bool)}, "`packed` takes documents, and no padding"),
    ],
)
def test_a_path_that_cannot_be_forced_is_refused(monkeypatch, path, options, message):
    monkeypatch.setenv(FORCE, path)
    with pytest.raises(ValueError, match=message):
        dynamic_mask_attention(*inputs(), **{"window": 17, **options})


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
    with pytest.raises(ValueError, match=r"key_mask is torch.int64 \(2, 17\), expected bool"):
        dynamic_mask_attention(*inputs(), 4, key_mask=torch.ones(2, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"documents is torch.int64 \(2, 16\), expected integers"):
        dynamic_mask_attention(*inputs(), 4, documents=torch.ones(2, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="local_window is -1"):
        dynamic_mask_attention(*inputs(), 4, local_window=-1)
    mask = torch.ones(2, 1, 17, 17, dtype=torch.bool)
    with pytest.raises(ValueError, match="one or the other"):
        dynamic_mask_attention(*inputs(), 4, mask=mask, key_mask=mask[:, 0, 0])
