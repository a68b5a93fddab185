"""Product keys: retrieval against brute force, experts against their formula, balance against all N × E scores."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from small_doge.ops.product_key import (
    FORCE,
    balance,
    choose_path,
    experts,
    gathered,
    grouped,
    reference,
    retrieve,
    route,
)
from small_doge.ops.product_key.experts import backward, forward


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got − expected‖ / ‖expected‖, in float64; NaN never passes."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def generator(*numbers):
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


# Retrieval


def brute_force(logits, k):
    """All K × K sums, in the dtype that scores have, sorted by (−score, index)."""
    K = logits.shape[-1] // 2
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sums = (wide[..., :K, None] + wide[..., None, K:]).flatten(-2)
    scores, indices = sums.sort(dim=-1, descending=True, stable=True)
    return scores[..., :k], indices[..., :k]


def by_the_rule(rx, ry, k):
    """The rule of retrieval.py in Python, for one token: who has k or more above it is out, (−score, index) decides."""
    above_x = [[x2 > x1 or (x2 == x1 and j <= i) for j, x2 in enumerate(rx)] for i, x1 in enumerate(rx)]
    above_y = [[y2 > y1 or (y2 == y1 and j <= i) for j, y2 in enumerate(ry)] for i, y1 in enumerate(ry)]
    K = len(rx)
    pairs = [(a, b) for a, b in itertools.product(range(K), repeat=2) if sum(above_x[a]) * sum(above_y[b]) - 1 < k]
    score = {(a, b): (torch.tensor(rx[a]) + torch.tensor(ry[b])).item() for a, b in pairs}
    return [a * K + b for a, b in sorted(pairs, key=lambda p: (-score[p], p))][:k]


def on_a_grid(*shape, g, step=2**-10):
    """Normal numbers whose sums in float32 are exact."""
    return (torch.randn(*shape, generator=g) / step).round() * step


def with_half(logits, half):
    return torch.cat([half.expand(len(logits), -1), logits[:, logits.shape[1] // 2 :]], dim=-1)


LOGITS = {
    "random": lambda r, g: r,
    "small integers": lambda r, g: torch.randint(-2, 3, r.shape, generator=g).float(),
    "all equal": lambda r, g: torch.zeros_like(r),
    "one half constant": lambda r, g: with_half(r, torch.zeros(r.shape[1] // 2)),
    "one half rising": lambda r, g: with_half(r, torch.arange(r.shape[1] // 2) / 8),
    "one half falling": lambda r, g: with_half(r, -torch.arange(r.shape[1] // 2) / 8),
    "one half huge": lambda r, g: with_half(r, torch.arange(r.shape[1] // 2).float() * 32),
    "both rising": lambda r, g: torch.arange(r.shape[1]).expand_as(r) / 4,
    "mostly −inf in one half": lambda r, g: torch.where(torch.arange(r.shape[1]) % 3 < 2, r, torch.tensor(-torch.inf)),
    "signed zeros": lambda r, g: torch.where(r > 0, 0.0, -0.0),
}


def some_k(K):
    return sorted({1, 2, 3, K // 2, K - 1, K} - {0}) if K > 8 else list(range(1, K * K + 1))


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("K", [1, 2, 3, 5, 8, 32, 64, 100, 256])
def test_retrieval_is_brute_force(kind, K):
    """Scores and experts, with every rule for ties, for one token (sorted) and for many (packed into integers)."""
    g = generator(K)
    for k in some_k(K):
        for N in (1, 23):
            logits = LOGITS[kind](on_a_grid(N, 2 * K, g=g), g)
            finite = logits[:, :K].isfinite().sum(-1) * logits[:, K:].isfinite().sum(-1)
            if finite.min() < k:
                continue  # sums of −inf are tied without being equal: see the test of the rule
            for dtype in (torch.float32, torch.float64):
                scores, indices = retrieve(logits.to(dtype), k)
                expected, expected_indices = brute_force(logits.to(dtype), k)
                assert torch.equal(scores, expected), (k, N, dtype)
                assert torch.equal(indices, expected_indices), (k, N, dtype)
                assert indices.dtype == torch.int64


@pytest.mark.parametrize("K", [16, 32, 64, 128, 256])
def test_retrieval_of_random_floats(K):
    """Sums that round: the scores are bit for bit those of brute force, the experts have them, and none comes twice."""
    for k in some_k(K):
        logits = torch.randn(60, 2 * K, generator=generator(K, k))
        logits[::2] *= 1e-3
        scores, indices = retrieve(logits, k)
        assert torch.equal(scores, brute_force(logits, k)[0])
        assert torch.equal(logits.gather(1, indices // K) + logits.gather(1, K + indices % K), scores)
        assert (indices.sort(dim=-1).values.diff(dim=-1) > 0).all()
        exact = logits.double()
        assert torch.equal(retrieve(exact, k)[1], brute_force(exact, k)[1])


values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2**-23, 2**-24, -(2**-25), 3e-39, 1e30, -1e30, 16777216.0, -torch.inf]),
    st.floats(-4, 4, width=32),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_rule_where_different_sums_round_to_one_float(data):
    K = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, K * K))
    halves = [data.draw(st.lists(values, min_size=K, max_size=K)) for _ in range(2)]
    logits = torch.tensor(halves).view(1, 2 * K)
    scores, indices = retrieve(logits, k)
    assert torch.equal(scores, brute_force(logits, k)[0])
    assert indices[0].tolist() == by_the_rule(*halves, k)
    many_scores, many = retrieve(logits.expand(2100, -1), k)  # as many as are packed into integers
    assert torch.equal(many, indices.expand(2100, -1))
    assert torch.equal(many_scores, scores.expand(2100, -1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", LOGITS)
def test_a_gpu_retrieves_the_same(kind):
    for K in (5, 32, 128):
        g = generator(K)
        logits = LOGITS[kind](torch.randn(300, 2 * K, generator=g), g)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for k in some_k(K):
                here, there = retrieve(logits.to(dtype), k), retrieve(logits.to(dtype).cuda(), k)
                assert torch.equal(here[0], there[0].cpu())
                assert torch.equal(here[1], there[1].cpu())


def test_retrieval_adds_16_bit_floats_in_float32():
    logits = torch.randn(50, 2 * 32, generator=generator(0)).bfloat16()
    scores, indices = retrieve(logits, 8)
    expected, expected_indices = brute_force(logits, 8)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)
    assert torch.equal(indices, expected_indices)


def test_retrieval_takes_any_leading_shape():
    logits = torch.randn(2, 3, 5, 2 * 9, generator=generator(1))
    scores, indices = retrieve(logits, 4)
    flat_scores, flat_indices = retrieve(logits.flatten(0, 2), 4)
    assert scores.shape == indices.shape == (2, 3, 5, 4)
    assert torch.equal(scores.flatten(0, 2), flat_scores)
    assert torch.equal(indices.flatten(0, 2), flat_indices)
    assert retrieve(logits[:0], 4)[1].shape == (0, 3, 5, 4)


def test_scores_carry_the_gradient_to_their_two_logits():
    logits = torch.randn(7, 2 * 6, dtype=torch.float64, generator=generator(2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: retrieve(r, 9)[0], logits)
    assert torch.autograd.gradcheck(lambda r: route(r, 9, normalise=True)[0], logits)
    assert not retrieve(logits, 9)[1].requires_grad


def test_weights_are_the_softmax_of_the_scores():
    logits = torch.randn(7, 2 * 6, generator=generator(3)).bfloat16()
    scores, indices = retrieve(logits, 5)
    weights, same = route(logits, 5)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, scores.softmax(-1))
    assert torch.equal(indices, same)
    assert torch.allclose(route(logits, 5, normalise=True)[0], weights)


def test_retrieval_first_exported_then_without_gradients_then_with_them():
    """What is remembered from the first call must be usable in every later one, and nothing of an exported graph is."""

    class Retrieve(torch.nn.Module):
        def forward(self, logits):
            return retrieve(logits, 7)

    logits = torch.randn(3, 2 * 11)
    exported = torch.export.export(Retrieve(), (logits,), strict=False).module()
    with torch.inference_mode():
        assert torch.equal(retrieve(logits, 7)[1], exported(logits)[1])
    retrieve(torch.randn(3, 2 * 11, requires_grad=True), 7)[0].sum().backward()


@pytest.mark.parametrize(
    ("shape", "k", "message"),
    [
        ((4, 7), 1, r"logits have shape \(4, 7\), expected \(..., 2K\)"),
        ((4, 0), 1, r"logits have shape \(4, 0\), expected \(..., 2K\)"),
        ((4, 6), 10, "k is 10, expected 1 to 9, the number of pairs of K=3 keys"),
        ((4, 6), 0, "k is 0, expected 1 to 9"),
    ],
)
def test_what_cannot_be_retrieved_is_named(shape, k, message):
    with pytest.raises(ValueError, match=message):
        retrieve(torch.zeros(shape), k)


# Experts


def inputs(N, C, E, k, dtype=torch.float64, seed=0):
    """x, down, up, weights as leaves, and indices; with E small, experts come more than once in a token."""
    g = generator(N, C, E, k, seed)
    x, down, up = (torch.randn(n, C, generator=g, dtype=torch.float64) for n in (N, E, E))
    weights = torch.rand(N, k, generator=g, dtype=torch.float64)
    down = down / C**0.5  # so that dot products are about 1
    indices = torch.randint(0, E, (N, k), generator=g)
    leaves = [leaf.to(dtype).requires_grad_() for leaf in (x, down, up)]
    return [*leaves, weights.to(torch.promote_types(dtype, torch.float32)).requires_grad_()], indices


def formula(x, down, up, indices, weights):
    hidden = torch.nn.functional.silu(torch.einsum("nc,nkc->nk", x, down[indices]))
    return torch.einsum("nk,nkc->nc", weights * hidden, up[indices])


def assert_agrees(path, leaves, indices, tolerance):
    """Outputs and all gradients under one random cotangent."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = formula(*exact[:3], indices, exact[3])
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=generator(1)).to(leaves[0].dtype)
    got = path(*leaves[:3], indices, leaves[3])
    assert got.dtype == leaves[0].dtype
    assert relative_error(got, expected) < tolerance
    gradients = torch.autograd.grad(got, leaves, cotangent)
    expected_gradients = torch.autograd.grad(expected, exact, cotangent.double())
    largest = max(x.abs().max() for x in expected_gradients)
    for name, leaf, a, b in zip(("x", "down", "up", "weights"), leaves, gradients, expected_gradients, strict=True):
        assert a.dtype == leaf.dtype
        # with one token and one expert a gradient can be next to nothing, all of it cancelled
        assert relative_error(a, b) < tolerance or (a - b).abs().max() < tolerance * largest, name


PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]


@pytest.mark.parametrize("path", [gathered, grouped, experts])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("N", [1, 2, 17, 129])
def test_experts_agree_with_the_formula_in_outputs_and_gradients(path, dtype, tolerance, N):
    if path is gathered and dtype == torch.bfloat16 and N > 2:
        pytest.skip("gathered sums the gradients of an expert in bfloat16: experts does not take it for that")
    for C, E, k in itertools.product((16, 80), (4, 9, 64, 1024), (1, 3, 8)):
        assert_agrees(path, *inputs(N, C, E, k, dtype), tolerance)


@pytest.mark.parametrize(("N", "K", "k"), [(1, 2, 4), (5, 3, 2), (17, 8, 8), (33, 32, 5)])
def test_the_whole_layer_agrees_with_the_reference(N, K, k):
    """Routing, weights and experts together, gradients to the logits included."""
    leaves, _ = inputs(N, 24, K * K, k)
    leaves[3] = torch.randn(N, 2 * K, dtype=torch.float64, generator=generator(N)).requires_grad_()
    x, down, up, logits = leaves
    expected, expected_indices, expected_weights = reference(x, logits, down, up, k)
    weights, indices = route(logits, k)
    got = experts(x, down, up, indices, weights)
    assert torch.equal(indices, expected_indices)
    assert relative_error(weights, expected_weights) < 1e-12
    assert relative_error(got, expected) < 1e-12
    assert relative_error(expected, formula(x, down, up, expected_indices, expected_weights)) < 1e-12
    cotangent = torch.randn(N, 24, dtype=torch.float64, generator=generator(2))
    gradients = (torch.autograd.grad(out, leaves, cotangent) for out in (got, expected))
    for name, a, b in zip(("x", "down", "up", "logits"), *gradients, strict=True):
        assert relative_error(a, b) < 1e-10, name


@pytest.mark.parametrize("path", [gathered, grouped])
def test_gradients_are_those_of_differences(path):
    leaves, indices = inputs(4, 5, 9, 3)
    indices[1] = 7  # one expert three times in a token
    assert torch.autograd.gradcheck(lambda x, down, up, w: path(x, down, up, indices, w), leaves)


def test_operators_keep_what_torch_asks_of_them():
    leaves, indices = inputs(6, 8, 9, 3, torch.float32)
    x, down, up, weights = leaves
    torch.library.opcheck(torch.ops.small_doge.experts_forward, (x, down, up, indices, weights))
    out, dots = torch.ops.small_doge.experts_forward(*(leaf.detach() for leaf in leaves[:3]), indices, weights.detach())
    arguments = (out, *(leaf.detach() for leaf in leaves[:3]), indices, weights.detach(), dots)
    torch.library.opcheck(torch.ops.small_doge.experts_backward, arguments)


@pytest.mark.parametrize("N", [1, 600])
def test_the_layer_compiles_into_one_graph(N):
    def layer(x, logits, down, up):
        weights, indices = route(logits, 4)
        loss, _ = balance(logits, indices)
        return experts(x, down, up, indices, weights), loss

    (x, down, up, _), _ = inputs(N, 16, 64, 4, torch.float32)
    logits = torch.randn(N, 16, generator=generator(4)).requires_grad_()
    leaves = (x, logits, down, up)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [[*f(*leaves), *torch.autograd.grad(sum(y.sum() for y in f(*leaves)), leaves)] for f in (layer, compiled)]
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5
    with torch.no_grad():
        assert relative_error(compiled(*leaves)[0], layer(*leaves)[0]) < 1e-5


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operator returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for y in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(y, torch.Tensor):
                self.numbers = max(self.numbers, y.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_stores_no_tokens_times_experts_a_token_times_size(dtype):
    N, C, E, k = 300, 64, 256, 8
    leaves, indices = inputs(N, C, E, k, dtype)
    x, down, up, weights = (leaf.detach() for leaf in leaves)
    with LargestTensor() as grouped_:
        _, dots = forward(x, down, up, indices, weights)
        backward(torch.ones_like(x), x, down, up, indices, weights, dots)
    with LargestTensor() as gathered_:
        gathered(x, down, up, indices, weights)
    assert grouped_.numbers == max(N * C, E * C)
    assert gathered_.numbers == N * k * C


def test_a_token_is_its_own_business():
    """Other tokens, their order and their number change neither a token's experts and weights nor its output."""
    (x, down, up, _), _ = inputs(40, 16, 64, 4, torch.float32)
    logits = torch.randn(40, 16, generator=generator(5))
    weights, indices = route(logits, 4)
    out = experts(x, down, up, indices, weights)
    order = torch.randperm(40, generator=generator(6))
    kept = torch.arange(40) % 2 == 0
    changed = torch.where(kept[:, None], logits, 100 - logits)
    for other, rows, same in (
        (logits[order], order, slice(None)),
        (changed, slice(None), kept),
        (logits[3:4], [3], [0]),
    ):
        got_weights, got_indices = route(other, 4)
        got = experts(x[rows], down, up, got_indices, got_weights)
        assert torch.equal(got_indices[same], indices[rows][same])
        assert torch.equal(got_weights[same], weights[rows][same])
        assert relative_error(got[same], out[rows][same]) < 1e-6


@pytest.mark.parametrize("path", ["gathered", "grouped"])
def test_autocast_casts_once_and_leaves_the_weights(monkeypatch, path):
    monkeypatch.setenv(FORCE, path)
    leaves, indices = inputs(30, 16, 9, 4, torch.float32)
    x, down, up, weights = leaves
    with torch.autocast("cpu", torch.bfloat16):
        got = experts(x, down, up, indices, weights)
    expected = experts(*(leaf.bfloat16() for leaf in leaves[:3]), indices, weights)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)
    gradients = (torch.autograd.grad(y.float().square().sum(), leaves) for y in (got, expected))
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_rows_may_lie_anywhere_and_there_may_be_none():
    leaves, indices = inputs(20, 16, 9, 4)
    x, down, up, weights = (leaf.detach() for leaf in leaves)
    strided = [leaf.repeat_interleave(2, dim=-1)[:, ::2] for leaf in (x, down, up)]
    for path in (gathered, grouped):
        assert relative_error(path(*strided, indices, weights), path(x, down, up, indices, weights)) < 1e-14
        assert path(x[:0], down, up, indices[:0], weights[:0]).shape == (0, 16)
    none = [leaf[:0].requires_grad_() if n in (0, 3) else leaf.requires_grad_() for n, leaf in enumerate(leaves)]
    experts(*none[:3], indices[:0], none[3]).sum().backward()


def test_the_path_is_chosen_by_shape_and_says_why(monkeypatch):
    monkeypatch.delenv(FORCE, raising=False)
    assert choose_path(torch.empty(1, 8), False) == ("gathered", "few tokens: 1")
    assert choose_path(torch.empty(1, 8), True) == ("grouped", "gradients are needed")
    assert choose_path(torch.empty(400, 8), False) == ("grouped", "many tokens: 400")
    monkeypatch.setenv(FORCE, "gathered")
    assert choose_path(torch.empty(400, 8), True) == ("gathered", f"{FORCE} says so")
    for path, message in (
        ("all", "'all', which cannot be: expected one of fused"),
        ("fused", "needs Triton and an NV"),
    ):
        monkeypatch.setenv(FORCE, path)
        with pytest.raises(ValueError, match=message):
            choose_path(torch.empty(400, 8), True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, d, u, i, w: (x[0], d, u, i, w), "do not fit"),
        (lambda x, d, u, i, w: (x[:, :3], d, u, i, w), "do not fit"),
        (lambda x, d, u, i, w: (x, d, u[:3], i, w), "do not fit"),
        (lambda x, d, u, i, w: (x, d, u, i[:2], w), "do not fit"),
        (lambda x, d, u, i, w: (x, d, u, i, w[:, :1]), "do not fit"),
        (lambda x, d, u, i, w: (x, d, u, i.int(), w), "indices are torch.int32, expected torch.int64"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    (x, down, up, weights), indices = inputs(5, 8, 9, 3)
    with pytest.raises(ValueError, match=message):
        experts(*change(x, down, up, indices, weights))


# Balance


def all_scores(logits, indices, mask=None):
    """The loss from its equations, with the N × E matrix of probabilities."""
    K = logits.shape[1] // 2
    probabilities = (logits[:, :K, None] + logits[:, None, K:]).flatten(1).softmax(-1)  # (N, E)
    chosen = torch.zeros_like(probabilities)
    for n, e in itertools.product(range(len(indices)), range(indices.shape[1])):
        chosen[n, indices[n, e]] += 1 / indices.shape[1]
    if mask is not None:
        probabilities, chosen = probabilities[mask], chosen[mask]
    return K * K * (chosen.mean(0) * probabilities.mean(0)).sum(), chosen.mean(0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("N", "K", "k"), [(1, 1, 1), (3, 2, 4), (50, 9, 3), (33, 16, 16)])
def test_balance_is_the_formula_over_all_scores(N, K, k, masked):
    logits = torch.randn(N, 2 * K, dtype=torch.float64, generator=generator(N, K)).requires_grad_()
    indices = retrieve(logits, k)[1]
    mask = torch.arange(N) % 3 != 1 if masked else None
    loss, usage = balance(logits, indices, mask)
    expected, expected_usage = all_scores(logits, indices, mask)
    assert relative_error(loss, expected) < 1e-12
    assert relative_error(usage, expected_usage) < 1e-12
    assert not usage.requires_grad
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    assert relative_error(gradient, expected_gradient) < 1e-10 or gradient.abs().max() < 1e-15


def test_balance_is_one_where_all_is_even_and_e_where_one_expert_has_everything():
    even = torch.arange(16).repeat(3)[:, None]
    loss, usage = balance(torch.zeros(48, 8), even)
    assert loss.item() == pytest.approx(1)
    assert torch.allclose(usage, torch.full((16,), 1 / 16))
    assert balance(torch.randn(48, 8), even)[0].item() == pytest.approx(1)  # f alone
    one = torch.full((48, 8), -50.0)
    one[:, [2, 5]] = 50
    assert balance(one, torch.full((48, 1), 2 * 4 + 1))[0].item() == pytest.approx(16)


def test_balance_in_float32_whatever_the_logits_are():
    logits = torch.randn(40, 2 * 8, generator=generator(7)).bfloat16()
    indices = retrieve(logits, 4)[1]
    expected = all_scores(logits.double(), indices)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss, usage = balance(logits, indices)
    assert loss.dtype == usage.dtype == torch.float32
    assert relative_error(loss, expected) < 1e-6


def test_balance_without_a_real_token_is_nothing():
    logits = torch.randn(5, 8).requires_grad_()
    loss, usage = balance(logits, retrieve(logits, 2)[1], torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == usage.sum().item() == logits.grad.abs().sum().item() == 0


def test_balance_stores_nothing_of_size_tokens_times_experts():
    N, K, k = 500, 32, 4
    logits = torch.randn(N, 2 * K)
    with LargestTensor() as largest:
        balance(logits, torch.randint(0, K * K, (N, k)))
    assert largest.numbers <= max(N * 2 * K, K * K)


def test_balance_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"logits \(4, 7\), indices \(4, 2\) and mask None do not fit"):
        balance(torch.zeros(4, 7), torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask \(3,\) do not fit: expected \(N, 2K\), \(N, k\) and \(N,\)"):
        balance(torch.zeros(4, 8), torch.zeros(4, 2, dtype=torch.int64), torch.ones(3, dtype=torch.bool))
