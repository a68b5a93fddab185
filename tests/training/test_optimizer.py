"""Muon and AdamW in one, against PyTorch's own of each."""

import pytest
import torch
from torch import nn

from small_doge.models import DogeForCausalLM, config_for
from small_doge.training.optimizer import MuonAdamW, decayed_parameters, orthogonalize, parameter_groups

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


@pytest.mark.parametrize("experts", [{}, {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}])
def test_groups_hold_every_parameter_once(experts):
    model = DogeForCausalLM(config_for("tiny", vocab_size=300, attention_bias=True, **experts))
    groups = parameter_groups(model, 0.1, 1e-3, 1e-2)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)].rsplit(".", 2)[-2] for p in groups[0]["params"]}
    assert muon == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    decayed = {
        names[id(p)].replace("model.", "", 1).split(".mlp.")[-1].split(".self_attn.")[-1] for p in groups[1]["params"]
    }
    tables = {"down_embed.weight", "up_embed.weight", "router_gate.weight"} if experts else set()
    assert decayed == {"embed_tokens.weight", "dt_proj.weight"} | tables


def test_experts_decay_and_a_row_moves_by_its_own_gradient():
    """AdamW of a table is AdamW of each row; Muon would move the rows without a gradient too."""
    model = DogeForCausalLM(config_for("tiny", vocab_size=300, is_moe=True, num_experts=16, num_experts_per_tok=2))
    names = decayed_parameters(model)
    assert {"model.layers.0.mlp.down_embed.weight", "model.layers.0.mlp.up_embed.weight"} <= set(names)
    optimizer = MuonAdamW(parameter_groups(model, 0.0, 1e-3, 1e-2))
    table = model.model.layers[0].mlp.up_embed.weight
    before, touched = table.detach().clone(), torch.tensor([3, 7])
    table.grad = torch.zeros_like(table)
    table.grad[touched] = torch.randn(2, table.shape[1], generator=torch.Generator().manual_seed(0))
    optimizer.step()
    moved = (table != before).any(dim=-1)
    assert moved.nonzero().flatten().tolist() == touched.tolist()
    # A later step without a gradient still moves them, by their momentum: what skipping rows would change.
    after = table.detach().clone()
    table.grad = torch.zeros_like(table)
    optimizer.step()
    assert ((table != after).any(dim=-1) == moved).all()
