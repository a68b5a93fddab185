"""RMSNorm and a scaled residual stream, their backward kernel in Triton's interpreter, against float64."""

import os

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_doge

from small_doge.models import modeling_doge
from small_doge.ops import residual as module
from small_doge.ops.residual import add_update, norm_and_carry

pytest.importorskip("triton", reason="needs Triton, which is there on Linux only")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="test_on_gpu.py takes from here")
EPS = 1e-3  # large enough to be seen


def reference(x, update, weight, scale):
    y = x if update is None else x + update
    return F.rms_norm(y, weight.shape, weight, EPS), scale * y


def compare_norms(run, shape, dtype, update_dtype, tolerance, device="cpu", autocast=False):
    """Outputs and gradients of ``run`` and :func:`reference`; the update in ``update_dtype``, None for none."""
    g = torch.Generator().manual_seed(sum(shape))
    C = shape[-1]

    def leaf(shape, dtype, scale=1.0, offset=0.0):
        return (offset + scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(device, dtype)

    leaves = [leaf(shape, dtype), leaf(shape, update_dtype) if update_dtype else None]
    leaves += [leaf((C,), dtype, 0.25, 1.0), leaf((C,), dtype, 0.25, 1.0)]
    normed_dtype = torch.bfloat16 if autocast else dtype
    cotangents = [leaf(shape, normed_dtype), leaf(shape, dtype)]
    exact = [x if x is None else x.double().requires_grad_() for x in leaves]
    leaves = [x if x is None else x.requires_grad_() for x in leaves]
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        out = run(*leaves, EPS)
    expected = reference(*exact)
    there = [(x, y) for x, y in zip(leaves, exact, strict=True) if x is not None]
    grads = torch.autograd.grad(out, [x for x, _ in there], cotangents)
    right = torch.autograd.grad(expected, [y for _, y in there], [x.double() for x in cotangents])
    dtypes = [normed_dtype, dtype, *(x.dtype for x, _ in there)]
    for i, (got, wanted, expected_dtype) in enumerate(zip((*out, *grads), (*expected, *right), dtypes, strict=True)):
        assert got.dtype == expected_dtype
        in_16_bits = got.dtype == torch.bfloat16 or (autocast and i > 1)  # gradients are, on their way
        bound = max(tolerance, 8e-3 if in_16_bits else 0)
        assert (got.double() - wanted).norm() < bound * wanted.norm()


CASES = [
    ((1, 1), torch.float32, None, 1e-6),
    ((3, 5, 130), torch.float32, torch.bfloat16, 1e-6),
    ((2, 37, 64), torch.float32, torch.float32, 1e-6),
    ((700, 3), torch.float32, torch.bfloat16, 1e-6),
    ((2, 37, 65), torch.bfloat16, torch.bfloat16, 1.6e-2),
]


@pytest.mark.parametrize(("shape", "dtype", "update", "tolerance"), CASES, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_kernel_against_float64(shape, dtype, update, tolerance, autocast):
    """Widths that are no power of two, more rows than programs, an update of another dtype, of the same, and none."""
    compare_norms(norm_and_carry, shape, dtype, update, tolerance, autocast=autocast)


@pytest.mark.parametrize("update", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_without_a_break(update, autocast):
    torch.compiler.reset()
    run = torch.compile(norm_and_carry, fullgraph=True)
    compare_norms(run, (2, 37, 20), torch.float32, update, 1e-6, autocast=autocast)


def test_the_operator_is_what_torch_compile_is_told():
    told = ("test_schema", "test_faketensor")
    normed, carried, y = torch.randn(3, 2, 5, 20)
    for dtype in (torch.float32, torch.bfloat16):
        parts = (normed.to(dtype), carried.to(dtype), y, *torch.randn(2, 20), EPS)
        torch.library.opcheck(module._backward, parts, test_utils=told)


def test_16_bit_gradients_are_right_on_average_and_the_same_every_time():
    """1 + 2⁻¹⁰ is an eighth of the way from 1 to the next number of bfloat16."""
    y, weight = torch.randn(100, 160), torch.ones(160)
    normed, carried = torch.zeros(100, 160).bfloat16(), torch.ones(100, 160).bfloat16()
    carried[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    dy, _ = module._backward(normed, carried, y, weight, (1 + 2**-10) * weight, EPS)
    assert dy.dtype == torch.bfloat16
    assert dy[0, 0].isnan()
    assert dy[0, 1:3].tolist() == [torch.inf, -torch.inf]
    assert set(dy[1:].unique().tolist()) == {1.0, 1 + 2**-7}
    assert abs(dy[1:].double().mean() - (1 + 2**-10)) < 1e-4  # five standard deviations; to the nearest: 1e-3
    again, _ = module._backward(normed, carried, y, weight, (1 + 2**-10) * weight, EPS)
    assert torch.equal(dy[1:], again[1:])


def test_an_update_is_added_and_the_gradient_has_its_dtype():
    x = torch.randn(5, 7, requires_grad=True)
    for update in (torch.randn(5, 7).bfloat16().requires_grad_(), torch.randn(5, 7, requires_grad=True)):
        total = add_update(x, update)
        assert torch.equal(total, x + update)
        grad = torch.randn(5, 7)
        dx, d_update = torch.autograd.grad(total, (x, update), grad)
        assert (dx.dtype, d_update.dtype) == (torch.float32, update.dtype)
        assert torch.equal(dx, grad.to(update.dtype).float())
        assert torch.equal(d_update, grad.to(update.dtype))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_is_the_same_with_it(monkeypatch, autocast):
    model, ids, _ = tiny_doge()

    def found():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(input_ids=ids, labels=ids, use_cache=False)
        grads = torch.autograd.grad(out.loss, list(model.parameters()))
        return [out.logits, torch.cat([g.flatten() for g in grads])] if autocast else [out.logits, *grads]

    expected, calls = found(), []
    monkeypatch.setattr(modeling_doge, "can_norm_and_carry", lambda x, *weights: calls.append(1) or True)
    got = found()
    assert len(calls) == 6, "three for each layer"
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= (3e-2 if autocast else 1e-4) * b.norm()
    heard: list[int] = []  # a norm that somebody listens to is called
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: heard.append(0))
    model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda *_: heard.append(1))
    found()
    assert heard == [0, 1]
