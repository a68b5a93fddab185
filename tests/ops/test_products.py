"""What surrounds QuACK's products, against float64. They run on a GPU only (test_products_on_gpu.py takes from here):
on a CPU what they give is computed as it is written down."""

import pytest
import torch
import torch.nn.functional as F
from test_heads import case, reference
from tiny import tiny_doge

from small_doge.models import attention, modeling_doge, moe
from small_doge.ops import products
from small_doge.ops.heads import heads_of_stream
from small_doge.ops.residual import Stream, add_product
from small_doge.ops.swiglu import swiglu_into_stream, swiglu_mlp

EPS = 1e-3  # large enough to be seen


@products.scaled_product.register_kernel("cpu")
def _(x, rstd, weight):
    return (rstd[:, None] * (x @ weight.T)).to(x.dtype)


@products.gated_product.register_kernel("cpu")
def _(x, rstd, weight):
    gate_up = products.scaled_product(x, rstd, weight)
    return gate_up, (F.silu(gate_up[:, ::2]) * gate_up[:, 1::2]).contiguous()


@products.gated_product_backward.register_kernel("cpu")
def _(grad, down, gate_up, rstd):
    gate, up, d_hidden = gate_up[:, ::2], gate_up[:, 1::2], grad @ down
    s = gate.sigmoid()
    d_gate, d_up = d_hidden * up * s * (1 + gate * (1 - s)), d_hidden * gate * s
    d_gate_up = torch.stack((d_gate, d_up), 2).flatten(1)
    dots = products._sums_of_rows("gated_backward", grad, down.shape[1]).zero_()
    dots[:, -1] = (d_gate_up * gate_up).sum(1)
    return (rstd[:, None] * d_gate_up).to(grad.dtype), dots


products.product.register_kernel("cpu", lambda a, b: a @ b)


@products.added_product.register_kernel("cpu")
def _(high, low, scale, x, weight):
    z = scale * (high.to(scale.dtype) + low) + x @ weight.T
    squares = products._sums_of_rows("added", z, z.shape[1]).zero_()
    squares[:, -1] = z.square().sum(1)
    rounded = z.to(high.dtype, copy=True)
    return rounded, (z - rounded).to(low.dtype), squares


@products.carried_product.register_kernel("cpu")
def _(a, weight, grad, scale, y, correction):
    sums = products._sums_of_columns("carried", y).zero_()
    sums[-1] = (grad * y).sum(0)
    return (a @ weight + scale * grad + correction[:, None] * y).to(grad.dtype), sums


def random(g, *shape):
    return torch.randn(shape, generator=g, dtype=torch.float64)


def errors(run, exact_run, made, exact, grads):
    """Relative errors to float64 of what ``run`` gives of its leaves, and of their gradients, whose graph is gone
    through twice and gives the same bits."""
    leaves, exact = ([x.requires_grad_() for x in group] for group in (made, exact))
    out, right = run(*leaves), exact_run(*exact)
    found = torch.autograd.grad(out, leaves, grads, retain_graph=True)
    again = torch.autograd.grad(out, leaves, grads)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    found, right = (*out, *found), (*right, *torch.autograd.grad(right, exact, [x.double() for x in grads]))
    assert [x.shape for x in found] == [x.shape for x in right]
    assert [x.dtype for x in found] == [*(x.dtype for x in grads), *(x.dtype for x in leaves)]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True)]


def compare_mlp(rows, C, width, dtype, device="cpu", compiled=False, autocast=False):
    """:func:`swiglu_mlp` and its gradients."""
    torch.compiler.reset()
    g = torch.Generator().manual_seed(C + width)
    made = [random(g, *shape) / shape[-1] ** 0.5 for shape in ((*rows, C), (width, C), (width, C), (C, width))]
    made = [x.to(dtype).to(device, torch.float32 if autocast and i else dtype) for i, x in enumerate(made)]
    run = torch.compile(swiglu_mlp, fullgraph=True) if compiled else swiglu_mlp

    def exact(x, gate, up, down):
        return (F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),)

    with torch.autocast(device, dtype, enabled=autocast):
        return errors(
            lambda *x: (run(*x),), exact, made, [x.double() for x in made], [random(g, *rows, C).to(device, dtype)]
        )


def compare_layer(rows, C, width, dtype, device="cpu", compiled=False):
    """A layer whose norms and stream are left to products, but for attention, which here is what its heads give added
    up: twice normed and added to, with all gradients. rows (B, T), heads of 8 in C, half of them of keys."""
    torch.compiler.reset()
    (B, T), D, H = rows, 8, C // 16 * 2
    (_, qkv, _, *norms, scorer, _), angles, _ = case((B, T, C, H, H // 2, D), torch.float64)
    g = torch.Generator().manual_seed(C + width)
    made = [random(g, B, T, C), *(1 + random(g, C) / 4 for _ in range(4)), qkv / C**0.5, *norms, scorer / 4]
    made += [random(g, C, H * D) / C**0.5, *(random(g, *x) / x[1] ** 0.5 for x in ((width, C), (width, C), (C, width)))]
    made, angles = ([x.to(device, torch.float32) for x in group] for group in (made, angles))

    def joined_heads(q, k, v, scored):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return (q + k + v).transpose(1, 2).flatten(2) * (scored.sum(-1, keepdim=True) / (8 * H)).tanh().to(q.dtype)

    def layer(y, norm_1, scale_1, norm_2, scale_2, qkv, q_norm, k_norm, scorer, o, gate, up, down):
        rest = (q_norm, k_norm), angles, (scorer, None), H, EPS
        *found, stream = heads_of_stream(Stream.of(y, EPS), norm_1, scale_1, qkv, *rest)
        stream = add_product(stream, scale_1, joined_heads(*found), o, EPS)
        stream = swiglu_into_stream(stream, norm_2, scale_2, gate, up, down, EPS)
        return stream.whole(), stream.rstd

    def exact(y, norm_1, scale_1, norm_2, scale_2, qkv, q_norm, k_norm, scorer, o, gate, up, down):
        parts = qkv, None, q_norm, k_norm, scorer, None, [x.double() for x in angles], H, H // 2
        found = reference(F.rms_norm(y, (C,), norm_1, EPS), *parts, eps=EPS)
        y = scale_1 * y + F.linear(joined_heads(*found), o)
        x = F.rms_norm(y, (C,), norm_2, EPS)
        return (scale_2 * y + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),)

    run, rstd = torch.compile(layer, fullgraph=True) if compiled else layer, []

    def first(*leaves):
        y, found = run(*leaves)
        rstd.append((found - (y.square().mean(-1) + EPS).rsqrt()).norm() / found.norm())
        return (y,)

    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        found = errors(first, exact, made, [x.double() for x in made], [random(g, B, T, C).to(device, torch.float32)])
    return [rstd[0].item(), *found]


@pytest.mark.parametrize(("compiled", "autocast"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [((1,), 8, 8), ((3, 5), 16, 24)])
def test_a_swiglu_in_products_around_what_the_library_gives(shape, compiled, autocast):
    dtype = torch.bfloat16 if autocast else torch.float32
    assert max(compare_mlp(*shape, dtype, compiled=compiled, autocast=autocast)) < (2e-2 if autocast else 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize(
    ("shape", "compiled"),
    [(((1, 1), 16, 8), False), (((3, 5), 16, 24), False), (((3, 5), 16, 24), True), (((2, 19), 48, 136), False)],
)
def test_a_layer_whose_norms_and_stream_are_left_to_products(shape, compiled, dtype, tolerance):
    assert max(compare_layer(*shape, dtype, compiled=compiled)) < tolerance


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
    x, weight, down, rstd = (torch.randn(shape) for shape in ((9, 8), (8, 8), (8, 4), (9,)))
    told = ("test_schema", "test_faketensor")
    torch.library.opcheck(products.scaled_product, (x, rstd, weight), test_utils=told)
    torch.library.opcheck(products.gated_product, (x, rstd, weight), test_utils=told)
    torch.library.opcheck(products.gated_product_backward, (x, down, x @ weight.T, rstd), test_utils=told)
    torch.library.opcheck(products.added_product, (x, x / 256, weight[0], x, weight), test_utils=told)
    torch.library.opcheck(products.carried_product, (x, weight, x, weight[0], x, rstd), test_utils=told)
    torch.library.opcheck(products.product, (x, weight.T), test_utils=told)


def leave_to_products(monkeypatch):
    for module in (moe, attention):
        monkeypatch.setattr(module, "better_together", lambda *_: True)
        monkeypatch.setattr(module, "can_multiply", lambda *_: True)
    monkeypatch.setattr(attention, "can_project_heads", lambda *_: True)


def test_who_asks_for_hidden_states_gets_all_their_bits(monkeypatch):
    """Of which layers hand each other two halves."""
    model, ids, positions = tiny_doge()
    leave_to_products(monkeypatch)
    handed, heard = [], []
    real = modeling_doge.whole
    monkeypatch.setattr(modeling_doge, "whole", lambda x, rest: handed.append(x.dtype) or real(x, rest))

    def found():
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=ids, position_ids=positions, use_cache=False, output_hidden_states=True)
        return out.hidden_states[:2]

    first, second = found()
    assert first.dtype == second.dtype == torch.float32
    assert (second != second.bfloat16()).float().mean() > 0.9
    assert handed == [torch.float32, torch.bfloat16, torch.bfloat16]  # before either layer, and at last
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _, args, kwargs: heard.append((*args, kwargs["rest"])), with_kwargs=True)
    assert torch.equal(found()[1], second)
    assert torch.equal(heard[0][0], second)
    assert heard[0][1] is None


@pytest.mark.parametrize("checkpointing", [False, "as PyTorch now has it", "reentrant"])
def test_a_model_is_the_same_when_its_norms_and_stream_are_left_to_products(monkeypatch, checkpointing):
    model, ids, positions = tiny_doge()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})

    def found():
        out = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False, output_hidden_states=True)
        model.zero_grad()
        out.loss.backward()
        return [out.logits, *out.hidden_states, *(parameter.grad for parameter in model.parameters())]

    expected, calls = found(), []
    leave_to_products(monkeypatch)
    monkeypatch.setattr(modeling_doge, "dtype_of_products", lambda _: torch.bfloat16)  # which float32 stands for
    real = products.added_product
    for where in ("swiglu", "residual"):
        monkeypatch.setattr(f"small_doge.ops.{where}.added_product", lambda *x: calls.append(1) or real(*x))
    for got, right in zip(found(), expected, strict=True):
        assert (got - right).norm() <= 1e-4 * right.norm()
    assert len(calls) == (8 if checkpointing else 4)  # twice a layer
    biased = model.model.layers[1].mlp.gate_proj  # a bias is more than the products can do
    biased.bias = torch.nn.Parameter(torch.zeros(biased.out_features))
    calls.clear()
    for got, right in zip(found(), [*expected, torch.zeros(0)], strict=False):
        assert got.shape != right.shape or (got - right).norm() <= 1e-4 * right.norm()
    assert len(calls) == (4 if checkpointing else 2)
    biased.bias = None
    layer, heard = model.model.layers[0], []
    layer.mlp.register_forward_hook(lambda *x: heard.append(x[2]))  # what a hook hears is what the SwiGLU gives
    calls.clear()
    found()
    assert len(calls) == (4 if checkpointing else 2)
    assert all(update.norm() < 0.9 * expected[0].norm() for update in heard)
