"""The SwiGLU's kernels, in Triton's interpreter, against float64."""

import os

import pytest
import torch
import torch.nn.functional as F

from small_doge.ops import swiglu as module
from small_doge.ops.swiglu import swiglu


def reference(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs on the GPU here: see test_on_gpu.py")
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
