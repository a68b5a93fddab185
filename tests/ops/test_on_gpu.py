"""What only a GPU can show: its attention kernels, its memory, and compilation. Run with ``pytest -m gpu``."""

import pytest
import torch
from test_heads import compare
from test_residual import CASES, compare_norms

from small_doge.models import DogeForCausalLM, config_for, projections
from small_doge.ops.dynamic_mask import (
    FORCE,
    aged,
    decode,
    eviction_times,
    folded,
    packed,
    reference,
    sparse,
    visible_keys,
)
from small_doge.ops.dynamic_mask.decode import replace_worst
from small_doge.ops.heads import projected_heads
from small_doge.ops.linear_cross_entropy import linear_cross_entropy
from small_doge.ops.residual import norm_and_carry

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def poison():
    """Fill the allocator's free memory with NaN, so that reading what was never written shows."""
    torch.full((1 << 28,), float("nan"), device="cuda")


@pytest.mark.parametrize("T", [1, 17, 128, 1000, 2048])
@pytest.mark.parametrize(("H", "G", "M"), [(2, 1, 1), (4, 2, 2), (4, 2, 4)])
@pytest.mark.parametrize("D", [16, 64, 80, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_folded_against_the_float64_reference(T, H, G, M, D, dtype, tolerance):
    g = torch.Generator("cuda").manual_seed(T)
    shapes = [(2, H, T, D), (2, G, T, D), (2, G, T, D), (2, M, T), (2, H, T, D)]
    q, k, v, s, cotangent = (torch.randn(shape, generator=g, device="cuda", dtype=torch.float64) for shape in shapes)
    leaves = [q.to(dtype), k.to(dtype), v.to(dtype), (s.abs() * 3).float()]
    exact = [x.double().requires_grad_() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    expected = reference(*exact, T)[0]
    expected_gradients = torch.autograd.grad((expected * cotangent).sum(), exact)
    poison()
    got = folded(*leaves)
    gradients = torch.autograd.grad((got * cotangent.to(dtype)).sum(), leaves)
    assert relative_error(got, expected) < tolerance
    if T > 1:
        for name, a, b in zip("qkvs", gradients, expected_gradients, strict=True):
            assert relative_error(a, b) < 2 * tolerance, name


@pytest.mark.parametrize(
    "lengths", [[2048], [1, 2047], [3, 40, 1, 7] * 20, [1, 2] * 680, [1000, 17, 1031], [1], [4097]]
)
@pytest.mark.parametrize(
    ("H", "G", "M", "D"), [(2, 1, 1, 128), (8, 2, 2, 72), (4, 2, 2, 64), (4, 2, 4, 80), (2, 2, 2, 16)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_packed_documents_against_the_float64_reference(lengths, H, G, M, D, dtype, tolerance):
    T = sum(lengths)
    g = torch.Generator("cuda").manual_seed(T)
    shapes = [(2, T, H, D), (2, T, G, D), (2, T, G, D), (2, M, T), (2, H, T, D)]
    q, k, v, s, cotangent = (torch.randn(shape, generator=g, device="cuda", dtype=torch.float64) for shape in shapes)
    leaves = [x.to(dtype).transpose(1, 2) for x in (q, k, v)] + [(s.abs() * 3).float()]
    documents = torch.arange(len(lengths), device="cuda").repeat_interleave(torch.tensor(lengths, device="cuda"))
    documents = documents.expand(2, -1)
    exact = [x.double().requires_grad_() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    expected = reference(*exact, T, mask=visible_keys(T, T, q.device, None, documents))[0]
    expected_gradients = torch.autograd.grad((expected * cotangent).sum(), exact)
    poison()
    got = packed(*leaves, documents)
    poison()
    gradients = torch.autograd.grad((got * cotangent.to(dtype)).sum(), leaves, retain_graph=True)
    assert relative_error(got, expected) < tolerance
    largest = max(x.abs().max() for x in expected_gradients)
    for name, a, b in zip("qkvs", gradients, expected_gradients, strict=True):
        assert relative_error(a, b) < 2 * tolerance or (a.double() - b).abs().max() < tolerance * largest, name
    again = torch.autograd.grad((got * cotangent.to(dtype)).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    with torch.no_grad():  # an earlier document's values do not matter at all, however large
        if len(lengths) > 1:
            v = leaves[2].clone()
            v[:, :, : lengths[0]] = 1e30
            again = packed(*leaves[:2], v, leaves[3], documents)
            assert torch.equal(again[:, :, lengths[0] :], got[:, :, lengths[0] :])


def test_compiled_folding_is_as_exact_as_plain():
    """A kernel that torch.compile makes of it must not lose the second column of the score."""
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, h, 1000, 64, generator=g, device="cuda").bfloat16() for h in (4, 2, 2))
    s = torch.randn(2, 2, 1000, generator=g, device="cuda").abs() * 20
    expected = reference(*(x.double() for x in (q, k, v, s)), 1000)[0]
    plain = relative_error(folded(q, k, v, s), expected)
    assert relative_error(torch.compile(folded, fullgraph=True)(q, k, v, s), expected) < 1.1 * plain < 1e-2


@pytest.mark.parametrize(("V", "C"), [(1000, 64), (32768, 64), (50257, 64), (32768, 1024)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_head_in_kernels_against_float64(V, C, dtype, tolerance):
    g = torch.Generator("cuda").manual_seed(V)
    hidden = torch.randn(9001, C, generator=g, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(V, C, generator=g, device="cuda") / C**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (9001,), generator=g, device="cuda")
    labels[::3] = -100
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum") / 7
    expected.backward()
    poison()
    got = linear_cross_entropy(hidden, weight, labels, 7)
    got.backward()
    assert abs(got.item() - expected.item()) < tolerance * abs(expected.item())
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert relative_error(ours.grad, theirs.grad) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_products_in_one_give_what_they_give_alone(monkeypatch, dtype, tolerance, compiled):
    torch.manual_seed(0)
    model = DogeForCausalLM(config_for("tiny", vocab_size=300)).cuda().to(dtype)
    exact = DogeForCausalLM(model.config).cuda().double()
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(0, 300, (32, 200), device="cuda")
    assert ids.numel() * model.config.hidden_size > projections._ENOUGH
    with monkeypatch.context() as patch:
        patch.setattr(projections, "_ENOUGH", 1 << 40)
        expected = exact(ids, labels=ids).loss
        expected.backward()
    got = (torch.compile(model) if compiled else model)(
        input_ids=ids, labels=ids, skip_logits=True, use_cache=False
    ).loss
    got.backward()
    assert abs(got.item() - expected.item()) < tolerance * expected.item()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if name.endswith(("q_norm.weight", "k_norm.weight", "proj.weight")) and "dt_proj" not in name:
            assert relative_error(p.grad, q.grad) < 3 * tolerance, name


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 1, 1, 2), (2, 1037, 200, 4, 2, 64), (3, 190, 48, 6, 3, 80), (1, 4097, 256, 8, 4, 128)], ids=str
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_projected_heads_against_float64(shape, dtype, tolerance, compiled):
    poison()
    run = torch.compile(projected_heads, fullgraph=True) if compiled else projected_heads
    compare(run, shape, dtype, tolerance, device="cuda", bias=shape[1] == 190, rows_differ=shape[0] > 1)


@pytest.mark.parametrize(("shape", "dtype", "update", "tolerance"), [*CASES, ((4, 2048, 768), *CASES[1][1:3], 1e-5)])
@pytest.mark.parametrize("compiled", [False, True])
def test_norm_and_carry_against_float64(shape, dtype, update, tolerance, compiled):
    poison()
    torch.compiler.reset()
    run = torch.compile(norm_and_carry, fullgraph=True) if compiled else norm_and_carry
    for autocast in (False, True):
        compare_norms(run, shape, dtype, update, tolerance, device="cuda", autocast=autocast)


@pytest.mark.parametrize("T", [1, 2, 17, 127, 128, 129, 1000, 4097])
@pytest.mark.parametrize("window", ["1", "7", "128", "T - 1", "T", "2 * T"])
@pytest.mark.parametrize(("H", "G", "M", "D"), [(2, 2, 2, 128), (4, 2, 2, 64), (4, 1, 1, 80), (4, 2, 4, 16)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_sparse_against_the_float64_reference(T, window, H, G, M, D, dtype, tolerance):
    window = max(1, eval(window, {"T": T}))  # noqa: S307
    in_two = T > 2 and window == 128
    g = torch.Generator("cuda").manual_seed(T)
    shapes = [(2, T, H, D), (2, T, G, D), (2, T, G, D), (2, M, T), (2, H, T, D)]
    q, k, v, s, cotangent = (torch.randn(shape, generator=g, device="cuda", dtype=torch.float64) for shape in shapes)
    leaves = [x.to(dtype).transpose(1, 2) for x in (q, k, v)] + [(s.abs() * 3).float()]
    exact = [x.double().requires_grad_() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    documents = mask = None
    if in_two:
        documents = (torch.arange(T, device="cuda") >= T // 3).long().expand(2, T).contiguous()
        mask = visible_keys(T, T, q.device, None, documents)
    expected = reference(*exact, window, mask=mask)[0]
    expected_gradients = torch.autograd.grad((expected * cotangent).sum(), exact)
    poison()
    e = eviction_times(leaves[3], window, documents=documents)
    got = sparse(*leaves, e, min(window, T))
    poison()
    gradients = torch.autograd.grad((got * cotangent.to(dtype)).sum(), leaves)
    assert relative_error(got, expected) < tolerance
    largest = max(x.abs().max() for x in expected_gradients)
    for name, a, b in zip("qkvs", gradients, expected_gradients, strict=True):
        assert relative_error(a, b) < 2 * tolerance or (a.double() - b).abs().max() < tolerance * largest, name


@pytest.mark.parametrize("window", [1, 1000, 2048, 16000])
def test_eviction_times_are_the_same_on_both_devices(window):
    g = torch.Generator().manual_seed(window)
    s = torch.rand(2, 4, 16384, generator=g)
    s[1] = (s[1] * 20).floor()  # ties
    poison()
    assert torch.equal(eviction_times(s.cuda(), window).cpu(), eviction_times(s, window))
    s = s.exp()
    for lifetime in (1.0, 500.0, 1e6):
        by = aged(s, lifetime)
        assert torch.equal(aged(s.cuda(), lifetime).cpu(), by)
        assert torch.equal(eviction_times(by.cuda(), window).cpu(), eviction_times(by, window))


def test_sparse_gives_the_same_bits_where_it_says_so():
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 2, 3000, 64, generator=g, device="cuda").bfloat16() for _ in range(3))
    s = torch.rand(2, 2, 3000, generator=g, device="cuda")
    outs, dqs = [], []
    for _ in range(3):
        leaf = q.clone().requires_grad_()
        out = sparse(leaf, k, v, s, eviction_times(s, 500), 500)
        outs.append(out.detach())
        dqs += torch.autograd.grad(out.float().square().sum(), leaf)
    assert all(torch.equal(outs[0], x) for x in outs)
    assert all(torch.equal(dqs[0], x) for x in dqs)


@torch.no_grad()
@pytest.mark.parametrize(("B", "H", "M", "N", "D"), [(1, 1, 1, 1, 16), (2, 4, 2, 300, 80), (1, 8, 4, 2048, 128)])
def test_one_token_over_a_bounded_cache(B, H, M, N, D):
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(B, h, n, D, generator=g, device="cuda").bfloat16() for h, n in ((H, 1), (M, N), (M, N)))
    s = torch.rand(B, M, N, generator=g, device="cuda") * 3
    poison()
    got = decode(q, k, v, s)
    exact = reference(*(x.double() for x in (q, k, v, s)), N)[0]
    assert relative_error(got, exact) < 1e-2
    ranks = torch.rand(B, M, N, generator=g, device="cuda").argsort(-1) * 5
    held, other = [k, v, s, ranks], [x.cpu() for x in (k, v, s, ranks)]
    for rank in (-1, 7, 5 * N + 1):
        new = [x[:, :, -1:].clone() + 1 for x in (k, v, s)] + [torch.full((B, M, 1), rank, device="cuda")]
        replace_worst(held, new)
        replace_worst(other, [x.cpu() for x in new])
    assert all(torch.equal(x.cpu(), y) for x, y in zip(held, other, strict=True))


def test_chunked_loss_under_autocast():
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(5000, 64, generator=g, device="cuda").requires_grad_()
    weight = torch.randn(32768, 64, generator=g, device="cuda").mul(0.1).requires_grad_()
    labels = torch.randint(0, 32768, (5000,), generator=g, device="cuda")
    exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, labels)
    expected = torch.autograd.grad(exact, [hidden, weight])
    poison()
    with torch.autocast("cuda", torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, labels, 5000)
    gradients = torch.autograd.grad(got, [hidden, weight])
    assert abs(got.item() - exact.item()) < 1e-3 * exact.item()
    for a, b in zip(gradients, expected, strict=True):
        assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize(("window", "path"), [(2048, "folded"), (2048, "packed"), (50, "chunked"), (50, "sparse")])
def test_training_compiles_without_graph_breaks(monkeypatch, window, path):
    monkeypatch.setenv(FORCE, path)
    torch.manual_seed(0)
    model = DogeForCausalLM(config_for("tiny", vocab_size=512, keep_window_size=window)).cuda().train()
    ids = torch.randint(0, 512, (2, 128), device="cuda")
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    if path == "packed":
        inputs["position_ids"] = (torch.arange(128, device="cuda") % 50).expand(2, -1)
    with torch.autocast("cuda", torch.bfloat16):
        loss, plain = compiled(**inputs).loss, model(**inputs).loss
    loss.backward()
    assert abs(loss.item() - plain.item()) < 1e-2 * plain.item()


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_the_laws_on_the_sparse_path(monkeypatch, dtype, tolerance):
    """A later token changes no earlier logit, and a document equals itself alone, packed or padded."""
    torch.manual_seed(0)
    model = DogeForCausalLM(config_for("tiny", vocab_size=512, keep_window_size=50)).cuda().to(dtype).eval()
    for layer in model.model.layers:
        layer.self_attn.A.uniform_(-1, 1)
    ids = torch.randint(0, 20, (2, 300), device="cuda")
    monkeypatch.setenv(FORCE, "sparse")
    full = model(ids, use_cache=False).logits
    edited = ids.clone()
    edited[:, 200:] = 21
    assert relative_error(model(edited, use_cache=False).logits[:, :200], full[:, :200]) < tolerance
    positions = torch.cat([torch.arange(120), torch.arange(180)]).expand(2, 300).cuda()
    packed = model(ids, position_ids=positions, use_cache=False).logits
    for part in (slice(0, 120), slice(120, 300)):
        assert relative_error(packed[:, part], model(ids[:, part], use_cache=False).logits) < tolerance
    mask = torch.ones(2, 340, dtype=torch.long, device="cuda")
    mask[:, :40] = 0
    padded = model(torch.cat([ids[:, :40], ids], 1), attention_mask=mask, use_cache=False).logits
    assert relative_error(padded[:, 40:], full) < tolerance


@torch.no_grad()
@pytest.mark.parametrize("window", [64, 2048])
def test_a_cached_step_equals_the_full_pass_on_a_gpu(window):
    torch.manual_seed(0)
    model = DogeForCausalLM(config_for("20m", vocab_size=512, keep_window_size=window)).cuda().double().eval()
    for layer in model.model.layers:
        layer.self_attn.A.uniform_(-1, 1)
    ids = torch.randint(0, 20, (2, 200), device="cuda")  # words repeat
    full = model(ids).logits
    out = model(ids[:, :120], use_cache=True)
    logits = [out.logits]
    for t in range(120, 200, 8):
        logits.append(model(ids[:, t : t + 8], past_key_values=out.past_key_values, use_cache=True).logits)
    assert (torch.cat(logits, 1) - full).abs().max() < 1e-9
    edited = ids.clone()
    edited[:, 150:] = 21
    assert torch.equal(model(edited).logits[:, :150], full[:, :150])
