"""What surrounds QuACK's products, against float64. They run on a GPU only (test_on_gpu.py takes from here): on a CPU
what they give is computed as it is written down."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_doge

from small_doge.models import modeling_doge, moe
from small_doge.ops import products
from small_doge.ops.residual import add_product, norm_and_carry
from small_doge.ops.swiglu import swiglu_mlp


@products.gated_product.register_kernel("cpu")
def _(x, weight):
    gate_up = x @ weight.T
    return gate_up, (F.silu(gate_up[:, ::2]) * gate_up[:, 1::2]).contiguous()


@products.gated_product_backward.register_kernel("cpu")
def _(grad, down, gate_up):
    gate, up, d_hidden = gate_up[:, ::2], gate_up[:, 1::2], grad @ down
    s = gate.sigmoid()
    d_gate, d_up = d_hidden * up * s * (1 + gate * (1 - s)), d_hidden * gate * s
    return torch.stack((d_gate, d_up), 2).flatten(1), (gate * s * up).contiguous()


products.product.register_kernel("cpu", lambda a, b: a @ b)


@products.added_product.register_kernel("cpu")
def _(y, scale, x, weight):
    return scale * y + (x @ weight.T).to(y.dtype)


def compare_mlp(rows, C, width, dtype, device="cpu", compiled=False, autocast=False, added=False):
    """:func:`swiglu_mlp`, added to a stream or not, and its gradients, twice over the same graph; relative errors to
    float64. The stream is one that :func:`norm_and_carry` holds, which gives its scale a gradient."""
    torch.compiler.reset()
    g = torch.Generator().manual_seed(C + width)
    shapes = ((*rows, C), (width, C), (width, C), (C, width))
    made = [torch.randn(shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5 for shape in shapes]
    own = torch.float32 if autocast else dtype
    made = [x.to(dtype).to(device, own if i else dtype) for i, x in enumerate(made)]
    if added:
        stream = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((*rows, C), (C,)))
        made += [x.to(device, torch.float32) for x in stream]
    grad = (
        torch.randn(*rows, C, generator=g, dtype=torch.float64).to(dtype).to(device, torch.float32 if added else dtype)
    )
    exact = [x.double().requires_grad_() for x in made]
    leaves = [x.requires_grad_() for x in made]
    run = torch.compile(swiglu_mlp, backend="inductor", fullgraph=True) if compiled else swiglu_mlp
    with torch.autocast(device, dtype, enabled=autocast):
        out = run(*leaves)
    x, gate, up, down, *stream = exact
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    if added:  # the gradient of ``held`` is that of scale · held, and the scale's is not here
        expected = expected + stream[0] + (stream[1] * stream[0] - stream[0]).detach()
        leaves, exact = leaves[:5], exact[:5]
    found = [out, *torch.autograd.grad(out, leaves, grad, retain_graph=True)]
    again = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], again, strict=True))
    right = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    assert [x.dtype for x in found] == [grad.dtype, *(x.dtype for x in leaves)]
    assert [x.shape for x in found] == [x.shape for x in right]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True)]


def compare_added(rows, C, width, dtype, device="cpu", compiled=False):
    """A stream that is normed, held and added to, as in a layer: all gradients, the scale's too, against float64."""
    torch.compiler.reset()
    g = torch.Generator().manual_seed(C + width)
    shapes = ((*rows, C), (C,), (C,), (*rows, width), (C, width))
    made = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    made = [
        (x / width**0.5).to(dtype) if i == 4 else x.to(dtype if i == 3 else torch.float32) for i, x in enumerate(made)
    ]
    grads = [torch.randn(*rows, C, generator=g, dtype=torch.float64).float().to(device) for _ in range(2)]
    made = [x.to(device) for x in made]
    exact = [x.double().requires_grad_() for x in made]
    leaves = [x.requires_grad_() for x in made]

    def step(y, weight, scale, x, product):
        normed, held = norm_and_carry(y, None, weight, scale, 1e-3, hold=True)
        return normed, add_product(held, scale, x, product)

    found = (torch.compile(step, fullgraph=True) if compiled else step)(*leaves)
    y, weight, scale, x, product = exact
    right = F.rms_norm(y, weight.shape, weight, 1e-3), scale * y + F.linear(x, product)
    found += torch.autograd.grad(found, leaves, grads)
    right += torch.autograd.grad(right, exact, [x.double() for x in grads])
    assert [x.dtype for x in found] == [torch.float32, torch.float32, *(x.dtype for x in leaves)]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True)]


@pytest.mark.parametrize(("compiled", "autocast"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [((1,), 8, 8), ((3, 5), 16, 24)])
@pytest.mark.parametrize("added", [False, True])
def test_a_swiglu_in_products_around_what_the_library_gives(shape, compiled, autocast, added):
    dtype = torch.bfloat16 if autocast else torch.float32
    errors = compare_mlp(*shape, dtype, compiled=compiled, autocast=autocast, added=added)
    assert max(errors) < (2e-2 if autocast else 1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_a_stream_that_is_held_and_added_to(monkeypatch, compiled, dtype, tolerance):
    monkeypatch.setattr("small_doge.ops.residual._backward", residual_backward)
    assert max(compare_added((3, 5), 16, 24, dtype, compiled=compiled)) < tolerance


def residual_backward(d_normed, d_carried, y, weight, scale, eps):
    """What the kernel of :func:`norm_and_carry` is to give (test_residual.py)."""
    inverse = (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    hat, g = y * inverse, d_normed * weight
    dy = (g - hat * (g * hat).mean(-1, keepdim=True)) * inverse + d_carried * scale
    return dy, torch.stack(((d_normed * hat).flatten(0, -2).sum(0), (d_carried * y).flatten(0, -2).sum(0)))


def test_a_frozen_swiglu_gets_no_gradient_and_asks_for_none():
    x, gate, up, down = (torch.randn(8, 8, dtype=torch.float64) for _ in range(4))
    out = swiglu_mlp(x.requires_grad_(), gate, up, down)
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    for got, right in zip(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x), strict=True):
        assert torch.allclose(got, right, rtol=1e-12)
    out = swiglu_mlp(x.detach(), gate, up, down.requires_grad_())
    assert torch.allclose(
        torch.autograd.grad(out.sum(), down)[0], (F.silu(x @ gate.T) * (x @ up.T)).sum(0).expand(8, 8)
    )


def test_the_products_are_what_torch_compile_is_told():
    x, weight, down = (torch.randn(8, 8) for _ in range(3))
    told = ("test_schema", "test_faketensor")
    torch.library.opcheck(products.gated_product, (x, weight), test_utils=told)
    torch.library.opcheck(products.gated_product_backward, (x, down[:, :4], x @ weight.T), test_utils=told)
    torch.library.opcheck(products.added_product, (x, weight[0], x, weight), test_utils=told)
    torch.library.opcheck(products.product, (x, weight.T), test_utils=told)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_is_the_same_when_products_add_to_its_stream(monkeypatch, checkpointing):
    model, ids, positions = tiny_doge()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def found():
        out = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False)
        return [out.logits, *torch.autograd.grad(out.loss, list(model.parameters()))]

    expected, calls = found(), []
    monkeypatch.setattr(moe, "better_together", lambda *_: True)
    for module in (moe, modeling_doge):
        monkeypatch.setattr(module, "can_multiply", lambda *_: True)
    monkeypatch.setattr(modeling_doge, "can_norm_and_carry", lambda *_: True)
    monkeypatch.setattr("small_doge.ops.residual._backward", residual_backward)
    real = products.added_product
    for where in ("swiglu", "residual"):
        monkeypatch.setattr(f"small_doge.ops.{where}.added_product", lambda *x: calls.append(1) or real(*x))
    for got, right in zip(found(), expected, strict=True):
        assert (got - right).norm() <= 1e-4 * right.norm()
    assert len(calls) == (8 if checkpointing else 4)  # twice a layer
    biased = model.model.layers[1].mlp.gate_proj  # a bias is more than the products can do
    biased.bias = torch.nn.Parameter(torch.zeros(biased.out_features))
    calls.clear()
    found()
    assert len(calls) == (4 if checkpointing else 2)
    biased.bias = None
    layer, heard = model.model.layers[0], []
    layer.mlp.register_forward_hook(lambda *x: heard.append(x[2]))  # what a hook hears is what the SwiGLU gives
    calls.clear()
    found()
    assert len(calls) == (4 if checkpointing else 2)
    assert all(update.norm() < 0.9 * expected[0].norm() for update in heard)
