"""QuACK's products, which run on a Hopper only. Run with ``pytest -m gpu``."""

import pytest
import torch
from test_on_gpu import poison
from test_products import compare_layer, compare_mlp

from small_doge.models import DogeForCausalLM, config_for
from small_doge.ops import products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not products.HAS_QUACK, reason="needs QuACK's products"),
]

SIZES_OF_PRODUCTS = [((1,), 8, 8), ((3, 5), 16, 24), ((2, 333), 264, 136), ((4, 2048), 1024, 2048)]


@pytest.mark.parametrize(("compiled", "autocast"), [(False, False), (True, True)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)])
@pytest.mark.parametrize("shape", SIZES_OF_PRODUCTS, ids=str)
def test_a_swiglu_in_products_against_float64(shape, dtype, tolerance, compiled, autocast):
    poison()
    assert max(compare_mlp(*shape, dtype, device="cuda", compiled=compiled, autocast=autocast)) < tolerance


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "shape", [((1, 1), 16, 8), ((3, 5), 16, 24), ((2, 333), 272, 136), ((4, 2048), 1024, 2048)], ids=str
)
def test_a_layer_whose_norms_and_stream_are_left_to_products_against_float64(shape, compiled):
    poison()
    assert max(compare_layer(*shape, torch.bfloat16, device="cuda", compiled=compiled)) < 4e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 6e-4)])
@pytest.mark.parametrize(("N", "C", "width"), [(1, 8, 8), (15, 24, 16), (999, 264, 136), (8192, 1024, 2048)])
def test_the_ends_of_products_against_float64(N, C, width, dtype, tolerance):
    """Each operator beside what test_products.py writes down for it, its sums over tiles added up."""
    g = torch.Generator("cuda").manual_seed(N)

    def random(*shape, dtype=dtype):
        return torch.randn(shape, generator=g, device="cuda", dtype=torch.float64).to(dtype)

    x, y, gate_up = random(N, C), random(N, C), random(N, 2 * width)
    wide, down = random(2 * width, C) / C**0.5, random(C, width) / C**0.5
    rstd, correction = (random(N, dtype=torch.float32).abs() for _ in range(2))
    scale, hidden = random(C, dtype=torch.float32), random(N, width)
    for operator, given in (
        (products.scaled_product, (x, rstd, wide)),
        (products.gated_product, (x, rstd, wide)),
        (products.gated_product_backward, (x, down, gate_up, rstd)),
        (products.added_product, (x, y / 256, scale, hidden, down)),
        (products.carried_product, (gate_up, wide, x, scale, y, correction)),
    ):
        if operator in (products.added_product, products.carried_product) and dtype != torch.bfloat16:
            continue
        poison()
        found, again = operator(*given), operator(*given)
        right = operator(*(a.double().cpu() for a in given))
        found, again, right = ([a] if torch.is_tensor(a) else a for a in (found, again, right))
        if operator is products.added_product:
            high, low = found[:2]
            assert (low.abs() <= 2**-8 * high.abs()).all()  # half of the last place, so high is to the nearest
            whole = high.double().cpu() + low.double().cpu()
            assert (whole - right[0]).norm() < 1e-5 * right[0].norm()
            found, again, right = (a[:1] + a[2:] for a in (found, again, right))
        for i, (got, same, exact) in enumerate(zip(found, again, right, strict=True)):
            assert torch.equal(got, same), operator
            if i == len(found) - 1 and operator not in (products.scaled_product, products.gated_product):
                by = 0 if operator is products.carried_product else 1
                got, exact = got.double().sum(by), exact.sum(by)
            assert (got.double().cpu() - exact).norm() < tolerance * exact.norm(), operator


def test_a_gradient_of_the_stream_is_rounded_up_or_down_with_the_right_mean():
    N, C = 4096, 128
    a, weight = torch.randn(N, 64, device="cuda").bfloat16(), torch.randn(64, C, device="cuda").bfloat16()
    grad, y = torch.ones(N, C, device="cuda").bfloat16(), torch.zeros(N, C, device="cuda").bfloat16()
    ones, nothing = torch.ones(C, device="cuda"), torch.zeros(N, device="cuda")
    weight = weight / 4096  # far below half of the last place of 1
    got = products.carried_product(a, weight, grad, ones, y, nothing)[0].double()
    exact = a.double() @ weight.double() + 1
    assert (got == got.bfloat16()).all()
    assert ((got - exact).abs() < 2**-7).all()
    wide = exact.float() != exact.bfloat16().float()
    assert wide.float().mean() > 0.9
    error = (got - exact)[wide]
    assert error.mean().abs() < 4 * error.std() / error.numel() ** 0.5
    lost = error * (exact - 1)[wide]  # and so for what is added: to the nearest, it would be lost
    assert lost.mean().abs() < 4 * lost.std() / lost.numel() ** 0.5
    grad[0, 0] = float("nan")
    got = products.carried_product(a, weight, grad, ones, y, nothing)[0]
    assert got.isnan().nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 6e-4)])
@pytest.mark.parametrize(("N", "K", "M"), [(1, 8, 8), (15, 24, 16), (999, 264, 136), (8192, 1024, 2048)])
def test_a_plain_product_against_float64(N, K, M, dtype, tolerance, transposed):
    poison()
    g = torch.Generator("cuda").manual_seed(N)
    a = torch.randn(N, K, generator=g, device="cuda", dtype=torch.float64).to(dtype)
    b = torch.randn(*((M, K) if transposed else (K, M)), generator=g, device="cuda", dtype=torch.float64).to(dtype)
    b = b.T if transposed else b
    out, right = products.product(a, b), a.double() @ b.double()
    assert out.dtype == dtype
    assert (out.double() - right).norm() < tolerance * right.norm()
    assert torch.equal(out, products.product(a, b))


def test_a_model_trains_with_its_layers_in_products(monkeypatch):
    """The same loss and gradients as without the library."""
    config = config_for("20m", num_hidden_layers=2)
    torch.manual_seed(0)
    model = DogeForCausalLM(config).cuda()
    ids = torch.randint(0, config.vocab_size, (2, 2048), device="cuda")
    found, calls = [], []
    real = products._quack
    monkeypatch.setattr(products, "_quack", lambda name: calls.append(name) or real(name))
    for with_library in (True, False):
        monkeypatch.setattr(products, "HAS_QUACK", with_library)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found.append([loss.detach(), *(x for x in grads if x.ndim == 2), torch.cat([x.flatten() for x in grads])])
    once = ("gated", "gated_backward", "scaled")
    assert sorted(calls) == sorted([*("added", "carried") * 4, *once * 2])  # and none without
    for got, right in zip(*found, strict=True):
        assert (got - right).norm() <= 2e-2 * right.norm()
