"""torch.compile takes a training step whole on every path that a CPU has; gradient checkpointing changes nothing."""

import pytest
import torch


def step(model, run, **inputs):
    model.zero_grad()
    loss = run(labels=inputs["input_ids"], use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


EXPERTS = {"is_moe": True, "num_experts": 25, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.1}
KINDS = {"folded": {"keep_window_size": 64}, "chunked": {"keep_window_size": 7}}
KINDS["experts"] = KINDS["folded"] | EXPERTS


@pytest.fixture(params=KINDS)
def model(request, make_model):
    return make_model(torch.float64, **KINDS[request.param]).train()


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_compiles_without_graph_breaks(model, packed):
    inputs = {"input_ids": torch.randint(3, 400, (2, 30))}
    if packed:
        inputs["position_ids"] = torch.cat([torch.arange(12), torch.arange(18)]).expand(2, -1).contiguous()
    expected, gradients = step(model, model, **inputs)
    torch._dynamo.reset()
    # Inductor's own graphs, run without its compiler, which not every machine has.
    run = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition", dynamic=False)
    got, compiled = step(model, run, **inputs)
    assert abs(got - expected) < 1e-5  # the loss itself is a float32
    for a, b in zip(compiled, gradients, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(model, reentrant):
    ids = torch.randint(3, 400, (2, 30))
    expected, gradients = step(model, model, input_ids=ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got, again = step(model, model, input_ids=ids)
    assert got == expected
    for a, b in zip(again, gradients, strict=True):
        assert torch.equal(a, b)
