"""Muon and AdamW in one, against PyTorch's own of each."""

import pytest
import torch
from torch import nn

from small_doge.models import DogeForCausalLM, config_for
from small_doge.training.optimizer import MuonAdamW, orthogonalize, parameter_groups

OPTIONS = {"lr": 0.02, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 5, 17), (2, 40, 8)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalize(x))
    assert ((singular > 0.3) & (singular < 1.3)).all()
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    direction = (orthogonalize(x) * (u @ v)).sum((-2, -1)) / orthogonalize(x).norm(dim=(-2, -1))
    assert (direction > 0.9 * min(shape[1:]) ** 0.5).all()


def test_matrices_move_as_with_the_muon_of_torch():
    """Theirs iterates in bfloat16, so the two agree to its precision."""
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=g) for s in ((24, 16), (16, 24), (24, 16))]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    a = MuonAdamW([{"params": ours, "muon": True, **OPTIONS}])
    b = torch.optim.Muon(theirs, momentum=0.95, adjust_lr_fn="match_rms_adamw", **OPTIONS)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, x in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < 2e-2 * (q - x).norm()


def test_the_rest_moves_exactly_as_with_adamw():
    g = torch.Generator().manual_seed(0)
    start = torch.randn(10, generator=g)
    p, q, matrix = nn.Parameter(start.clone()), nn.Parameter(start.clone()), nn.Parameter(torch.eye(4))
    a = MuonAdamW([{"params": [matrix], "muon": True, **OPTIONS}, {"params": [p], **OPTIONS}], betas=(0.9, 0.95))
    b = torch.optim.AdamW([q], betas=(0.9, 0.95), **OPTIONS)
    for _ in range(4):
        p.grad = torch.randn(10, generator=g)
        q.grad, matrix.grad = p.grad.clone(), torch.eye(4)
        a.step()
        b.step()
    assert torch.equal(p, q)
    assert set(a.state[matrix]) == {"step", "momentum_buffer"}


def test_groups_hold_every_parameter_once():
    model = DogeForCausalLM(config_for("tiny", vocab_size=300, attention_bias=True))
    groups = parameter_groups(model, 0.1, 1e-3, 1e-2)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)].rsplit(".", 2)[-2] for p in groups[0]["params"]}
    assert muon == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert [names[id(p)] for p in groups[1]["params"] if "dt_proj" not in names[id(p)]] == ["model.embed_tokens.weight"]
