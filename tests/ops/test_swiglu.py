"""The SwiGLU's kernels, in Triton's interpreter, against float64."""

import os

import pytest
import torch
import torch.nn.functional as F

from small_doge.ops import swiglu as module
from small_doge.ops.swiglu import swiglu, swiglu_linear


def reference(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="see test_on_gpu.py")


@interpreted
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 14), (2, 37, 130)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_kernels_against_float64(monkeypatch, shape, dtype, tolerance, transposed):
    pytest.importorskip("triton", reason="needs Triton, which is there on Linux only")
    monkeypatch.setattr(module, "usable", lambda x: True)
    g = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(shape, generator=g, dtype=torch.float64) * 3).to(dtype)
    x = x.mT.contiguous().mT if transposed else x
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    cotangent = torch.randn(*shape[:-1], shape[-1] // 2, generator=g, dtype=torch.float64)
    out, expected = swiglu(x), reference(exact)
    (gradient,) = torch.autograd.grad(out, x, cotangent.to(dtype))
    (expected_gradient,) = torch.autograd.grad(expected, exact, cotangent.to(dtype).double())
    for got, right in ((out, expected), (gradient, expected_gradient)):
        assert got.dtype == dtype
        assert (got.double() - right).norm() < tolerance * right.norm()


def test_without_kernels_it_is_the_formula():
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.equal(swiglu(x), reference(x))


def linear_case(dtype, rows=(3, 5), width=7, out=4):
    """gate_up, weight and the gradient of what comes out, and the same in float64."""
    g = torch.Generator().manual_seed(width)
    shapes = ((*rows, 2 * width), (out, width), (*rows, out))
    made = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    return made, [x.double() for x in made]


@interpreted
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    ("shape", "backend"),
    [(((1,), 1, 1), None), (((3, 5), 7, 4), None), (((2, 37), 130, 65), None), (((3, 5), 7, 4), "inductor")],
    ids=str,
)
def test_a_linear_layer_behind_it_keeps_gate_and_up_alone(monkeypatch, shape, dtype, tolerance, backend):
    """Twice over the same graph: what waits for the backward pass must not have been written to."""
    pytest.importorskip("triton", reason="needs Triton, which is there on Linux only")
    monkeypatch.setattr(module, "usable", lambda x: True)
    torch.compiler.reset()
    run = swiglu_linear if backend is None else torch.compile(swiglu_linear, backend=backend, fullgraph=True)
    (gate_up, weight, do), (exact, exact_weight, exact_do) = linear_case(dtype, *shape)
    leaves = [gate_up.requires_grad_(), weight.requires_grad_()]
    exact_leaves = [exact.requires_grad_(), exact_weight.requires_grad_()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        out = run(*leaves)
    assert sorted(set(kept)) == sorted({tuple(gate_up.shape), tuple(weight.shape)})
    expected = F.linear(reference(exact), exact_weight)
    found = [out, *torch.autograd.grad(out, leaves, do, retain_graph=True)]
    again = torch.autograd.grad(out, leaves, do)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], again, strict=True))
    for got, right in zip(found, (expected, *torch.autograd.grad(expected, exact_leaves, exact_do)), strict=True):
        assert got.dtype == dtype
        assert (got.double() - right).norm() < tolerance * right.norm()


@interpreted
def test_the_operators_are_what_torch_compile_is_told(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton, which is there on Linux only")
    (gate_up, weight, do), _ = linear_case(torch.float32)
    told = ("test_schema", "test_faketensor")
    torch.library.opcheck(module._forward, (gate_up.clone().requires_grad_(),), test_utils=told)
    torch.library.opcheck(module._backward, (gate_up, do @ weight), test_utils=told)
    torch.library.opcheck(module._backward_in_place, (gate_up, do @ weight), test_utils=told)
    monkeypatch.setattr(module, "usable", lambda x: True)
    frozen = swiglu_linear(gate_up.requires_grad_(), weight)
    (got,) = torch.autograd.grad(frozen, gate_up, do)
    monkeypatch.undo()
    (expected,) = torch.autograd.grad(swiglu_linear(gate_up, weight), gate_up, do)
    assert (got - expected).norm() < 1e-6 * expected.norm()
