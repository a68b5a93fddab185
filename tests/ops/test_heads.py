"""q, k and v from one product, normed and rotated by kernels in Triton's interpreter, against float64."""

import os

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_doge

from small_doge.models import DogeConfig, attention
from small_doge.models.rotary import rotary_angles, rotate
from small_doge.ops import heads as module
from small_doge.ops.heads import projected_heads

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="needs Triton, which is there on Linux only")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="test_on_gpu.py takes from here")
EPS = 1e-3  # large enough to be seen


class Interpreter(interpreter.InterpreterBuilder):
    """With products of bfloat16, which Triton's takes for integers; they are exact in float32."""

    def create_dot(self, a, b, d, *options):
        kinds = interpreter.tl.bfloat16, interpreter.tl.float32
        a, b = (self.cast_impl(x, kinds[1]) if x.dtype.scalar == kinds[0] else x for x in (a, b))
        return super().create_dot(a, b, d, *options)


interpreter.interpreter_builder.__class__ = Interpreter


def case(shape, dtype, bias=False, rows_differ=True):
    """Leaves x, weight, bias, norms and the layer of v in ``dtype``, cos and sin, and cotangents of the outputs."""
    B, T, C, H, G, D = shape
    M = 1 if G == 1 else H  # score heads
    g = torch.Generator().manual_seed(T)

    def random(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    leaves = [random(B, T, C), random((H + 2 * G) * D, C) / 2, random((H + 2 * G) * D) if bias else None]
    leaves += [1 + random(D) / 4, 1 + random(D) / 4, random(M, G * D) / 2, random(M) if bias else None]
    positions = torch.randint(50, (B if rows_differ else 1, T), generator=g)
    config = DogeConfig(hidden_size=H * D, num_attention_heads=H, num_key_value_heads=G)
    angles = rotary_angles(config, positions, torch.float32, None)
    cotangents = [random(B, n, T, D).to(dtype) for n in (H, G, G)] + [random(B, M, T).to(dtype).transpose(1, 2)]
    return [x if x is None else x.to(dtype) for x in leaves], angles, cotangents


def reference(x, weight, bias, q_norm, k_norm, scorer, scorer_bias, angles, H, G, eps=EPS):
    D = q_norm.shape[0]
    parts = F.linear(x, weight, bias).split([H * D, G * D, G * D], -1)
    q, k, v = (y.unflatten(-1, (-1, D)) for y in parts)
    q, k = (F.rms_norm(y, (D,), w, eps) for y, w in ((q, q_norm), (k, k_norm)))
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return rotate(q, angles), rotate(k, angles), v, F.linear(parts[2], scorer, scorer_bias)


def compare(run, shape, dtype, tolerance, device="cpu", **options):
    leaves, angles, cotangents = case(shape, dtype, **options)
    leaves, angles, cotangents = (
        [x if x is None else x.to(device) for x in group] for group in (leaves, angles, cotangents)
    )
    H, G = shape[3:5]
    exact = [None if x is None else x.double().requires_grad_() for x in leaves]
    leaves = [None if x is None else x.requires_grad_() for x in leaves]
    out = run(*leaves[:3], tuple(leaves[3:5]), tuple(angles), tuple(leaves[5:]), H, EPS)
    expected = reference(*exact, tuple(x.double() for x in angles), H, G)
    there = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(out, there, cotangents)
    expected_grads = torch.autograd.grad(
        expected, [x for x in exact if x is not None], [x.double() for x in cotangents]
    )
    for got, right in zip((*out, *grads), (*expected, *expected_grads), strict=True):
        assert got.dtype == dtype
        assert got.shape == right.shape
        assert (got.double() - right).norm() < tolerance * right.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 1, 1, 2), (2, 37, 20, 4, 2, 16), (3, 19, 24, 6, 3, 12), (1, 33, 8, 3, 1, 130)], ids=str
)
@pytest.mark.parametrize("rows_differ", [True, False])
def test_the_kernels_against_float64(shape, dtype, tolerance, rows_differ):
    """Tokens that are not a multiple of a program's, one position for all rows, heads that are no power of two."""
    compare(projected_heads, shape, dtype, tolerance, rows_differ=rows_differ)


def test_with_a_bias():
    compare(projected_heads, (2, 37, 20, 4, 2, 16), torch.float32, 3e-6, bias=True)


@pytest.mark.parametrize("bias", [False, True])
def test_compiled_without_a_break(bias):
    torch.compiler.reset()
    run = torch.compile(projected_heads, fullgraph=True)
    compare(run, (2, 37, 20, 4, 2, 16), torch.float32, 3e-6, bias=bias)


def test_frozen_weights_get_no_gradient_and_autocast_decides_the_dtype():
    (x, weight, _, *norms, scorer, _), angles, cotangents = case((2, 37, 20, 4, 2, 16), torch.float32)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = projected_heads(x, weight, None, tuple(norms), angles, (scorer, None), 4, EPS)
    assert [y.dtype for y in out] == [torch.bfloat16] * 4
    (got,) = torch.autograd.grad(out, x, [y.bfloat16() for y in cotangents])
    exact = x.detach().double().requires_grad_()
    weights = (weight.double(), None, *(y.double() for y in (*norms, scorer)), None)
    parts = (exact, *weights, tuple(y.double() for y in angles), 4, 2)
    (expected,) = torch.autograd.grad(reference(*parts), exact, [y.double() for y in cotangents])
    assert got.dtype == torch.float32
    assert (got - expected).norm() < 2e-2 * expected.norm()


def test_the_operators_are_what_torch_compile_is_told():
    (x, weight, _, *norms, scorer, _), angles, cotangents = case((2, 5, 20, 4, 2, 16), torch.float32)
    told = ("test_schema", "test_faketensor")
    qkv = F.linear(x, weight)
    torch.library.opcheck(module._forward, (qkv, *norms, *angles, scorer, 4, EPS), test_utils=told)
    torch.library.opcheck(module._backward, (*cotangents, qkv, *norms, *angles, scorer, None, EPS), test_utils=told)
    rstd = torch.rand(x.shape[:2])
    torch.library.opcheck(module._backward, (*cotangents, qkv, *norms, *angles, scorer, rstd, EPS), test_utils=told)


@pytest.mark.parametrize("cached", [False, True])
def test_a_model_is_the_same_with_them(monkeypatch, cached):
    """Two documents in a row that another does not have, so that angles differ; prefilled, or with all gradients."""
    model, ids, positions = tiny_doge()

    def found():
        if cached:
            with torch.no_grad():
                return [model(input_ids=ids, use_cache=True).logits]
        out = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False)
        return [out.logits, *torch.autograd.grad(out.loss, list(model.parameters()))]

    expected, calls = found(), []
    monkeypatch.setattr(attention, "can_project_heads", lambda x, head_dim: True)
    monkeypatch.setattr(attention, "better_together", lambda x, *layers: calls.append(1) or True)
    got = found()
    assert len(calls) == 2, "one for each layer"
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
    heard: list[int] = []  # a norm that somebody listens to is called
    model.model.layers[0].self_attn.q_norm.register_forward_hook(lambda *_: heard.append(0))
    model.model.layers[1].self_attn.k_norm.register_forward_hook(lambda *_: heard.append(1))
    monkeypatch.setattr(attention, "projected_heads", None)
    found()
    assert heard == [0, 1]
