"""The chunked loss against a matrix product and F.cross_entropy in float64, values and gradients."""

import os

import pytest
import torch
import torch.nn.functional as F

from small_doge.ops import linear_cross_entropy as module
from small_doge.ops.linear_cross_entropy import linear_cross_entropy


def inputs(N, C, V, dtype):
    g = torch.Generator().manual_seed(N * 31 + V)
    hidden = torch.randn(N, C, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=g)
    labels[::3] = -100
    return hidden, weight, labels


@pytest.mark.parametrize(("N", "C", "V"), [(2, 3, 5), (17, 8, 11), (100, 24, 301)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("chunk", [1, 1 << 10, 1 << 30])
def test_equals_the_full_logits(monkeypatch, N, C, V, dtype, tolerance, chunk):
    monkeypatch.setattr(module, "_CPU_LOGITS", chunk)  # rows a chunk: 16, some, all
    hidden, weight, labels = inputs(N, C, V, dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].T, labels, ignore_index=-100, reduction="sum") / 7
    got = linear_cross_entropy(hidden, weight, labels, 7)
    (3 * got).backward()
    (3 * expected).backward()
    assert abs(got.item() - expected.item()) < tolerance * abs(expected.item())
    for ours, reference in zip((hidden, weight), exact, strict=True):
        assert (ours.grad.double() - reference.grad).norm() < tolerance * reference.grad.norm()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs on the GPU here: see test_on_gpu.py")
@pytest.mark.parametrize(("N", "C", "V"), [(2, 16, 5), (17, 8, 64), (40, 24, 301)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("block", [1 << 12, 64])
def test_the_kernel_equals_the_full_logits(monkeypatch, N, C, V, dtype, tolerance, block):
    pytest.importorskip("triton", reason="needs Triton, which is there on Linux only")
    monkeypatch.setattr(module, "_BLOCK", block)  # a row in one piece, or in several
    monkeypatch.setattr(module, "_CPU_LOGITS", 16 * V)  # rows a chunk: 16
    hidden, weight, labels = inputs(N, C, V, dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].T, labels, ignore_index=-100, reduction="sum") / 7
    expected.backward()
    loss, *gradients = module._in_kernels(hidden, weight, labels, torch.tensor(7.0), True)
    assert abs(loss.item() - expected.item()) < tolerance * abs(expected.item())
    for ours, reference in zip(gradients, exact, strict=True):
        assert (ours.double() - reference.grad).norm() < tolerance * reference.grad.norm()
    only_loss = module._in_kernels(hidden, weight, labels, torch.tensor(7.0), False)
    assert only_loss[0] == loss
    assert only_loss[1].numel() == only_loss[2].numel() == 0


def test_rows_without_a_label_carry_no_gradient():
    hidden, weight, labels = inputs(30, 8, 11, torch.float64)
    linear_cross_entropy(hidden, weight, labels, 1.0).backward()
    assert (hidden.grad[labels == -100] == 0).all()
    assert (hidden.grad[labels != -100] != 0).any(dim=1).all()


def test_without_gradients_it_keeps_nothing():
    hidden, weight, labels = inputs(30, 8, 11, torch.float64)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, 20)
    assert not loss.requires_grad
    assert torch.allclose(loss, linear_cross_entropy(hidden, weight, labels, 20))


def test_the_model_gives_the_same_loss_with_and_without_logits():
    from small_doge.models import DogeForCausalLM, config_for

    torch.manual_seed(0)
    model = DogeForCausalLM(config_for("tiny", vocab_size=300)).double()
    ids = torch.randint(0, 300, (3, 40))
    labels = ids.masked_fill(torch.rand(3, 40) < 0.2, -100)
    for options in ({}, {"num_items_in_batch": torch.tensor(50)}):
        gradients = []
        for skip in (False, True):
            model.zero_grad()
            out = model(ids, labels=labels, skip_logits=skip, **options)
            assert (out.logits is None) == skip
            out.loss.backward()
            gradients.append([out.loss.detach()] + [p.grad.clone() for p in model.parameters()])
        for a, b in zip(*gradients, strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-7)  # theirs is in float32
