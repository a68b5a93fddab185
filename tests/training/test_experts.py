"""Experts in training: what they cost, the same on two processes as on one, and that growing a model pays."""

import json

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from small_doge import recipe
from small_doge.errors import UserError
from small_doge.models import DogeForCausalLM, config_for, load_model, upcycle
from small_doge.ops.product_key import FORCE
from small_doge.training.estimates import flops_per_token, training_bytes
from small_doge.training.pretrain import PretrainArguments, pretrain

EXPERTS = {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 2}
ROWS, T, STEPS = 4, 16, 6


def config(**options):
    return config_for("tiny", **{"vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, **options})


@pytest.mark.parametrize(("N", "k"), [(64, 2), (256, 16)])
def test_flops_are_those_that_torch_counts(monkeypatch, N, k):
    """Of the model with experts less those of the dense one: torch counts all pairs in attention, not the causal ones.

    The path `gathered` computes experts with matrix products, which the counter sees.
    """
    monkeypatch.setenv(FORCE, "gathered")
    ids, counted, estimated = torch.randint(3, 300, (ROWS, T)), [], []
    for options in ({}, {"is_moe": True, "num_experts": N, "num_experts_per_tok": k}):
        model = DogeForCausalLM(config(**options)).train()
        with FlopCounterMode(display=False) as counter:
            model(ids, labels=ids).loss.backward()
        counted.append(counter.get_total_flops())
        estimated.append(flops_per_token(model.config, T) * ROWS * T)
    assert counted[1] - counted[0] == estimated[1] - estimated[0]
    # by hand, of a layer: the router 2K · C, two rows of C an expert, and K · K of the balance loss; 6 a weight
    K, C = int(N**0.5), 48
    assert estimated[1] - estimated[0] == 6 * 2 * ROWS * T * (2 * K * C + k * 2 * C + K * K)


def bytes_kept(options, bf16):
    """Bytes of the tensors that forward keeps for backward, parameters aside."""
    model, kept = DogeForCausalLM(config(**options)).train(), {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no other takes its place
        return x

    ids = torch.randint(3, 300, (16, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=bf16):
        model(ids, labels=ids, skip_logits=True)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("N", "k"), [(64, 2), (1024, 8), (1024, 32)])
def test_memory_of_experts_is_what_autograd_keeps(bf16, N, k):
    experts = {"is_moe": True, "num_experts": N, "num_experts_per_tok": k}
    dense, grown = (training_bytes(config(**options), 0, 16, 64, bf16) for options in ({}, experts))
    assert grown - dense == pytest.approx(bytes_kept(experts, bf16) - bytes_kept({}, bf16), rel=0.1)


def test_every_parameter_counts_with_gradient_and_moments():
    model = DogeForCausalLM(config(**EXPERTS))
    parameters = sum(p.numel() for p in model.parameters())
    assert training_bytes(model.config, parameters, 0, T, True) >= 16 * parameters
    model.train()(torch.zeros(1, 8, dtype=torch.long), labels=torch.zeros(1, 8, dtype=torch.long)).loss.backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    for p in model.parameters():
        held = (p, p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])
        assert all(x.shape == p.shape and x.dtype == torch.float32 and not x.is_sparse for x in held)


# Two processes. Everything below runs in each of them, and must be importable there.

KINDS = ("one", "micro-batches", "ddp", "fsdp")
COEFFICIENTS = (0.0, 0.001)


def train(kind, coefficient, rank=0):
    """A few steps on the same global batches; losses of all steps and the parameters after them."""
    torch.manual_seed(0)
    module = DogeForCausalLM(config(**EXPERTS, router_aux_loss_coef=coefficient)).train()
    model = module
    if kind == "ddp":
        model = DistributedDataParallel(module)  # which waits for ever, or complains, where a gradient is missing
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for layer in module.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        rows = torch.randint(3, 300, (ROWS, T), generator=generator)
        split = kind != "one"
        batches = list(rows.chunk(2)) if split else [rows]
        if kind in ("ddp", "fsdp"):
            batches = [batches[rank]]
        loss = torch.zeros(())
        for batch in batches:
            part = model(batch, labels=batch, skip_logits=True).loss / len(batches)
            part.backward()
            loss += part.detach()
        if kind in ("ddp", "fsdp"):
            dist.all_reduce(loss)
            loss /= 2
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    full = {name: p.full_tensor() if kind == "fsdp" else p for name, p in module.named_parameters()}
    return losses, {name: p.detach().clone() for name, p in full.items()}


def test_experts_without_a_token_have_a_gradient_too():
    """Dense, of zeros: DDP waits for every parameter, and here most rows of a table see no token."""
    torch.manual_seed(0)
    model = DogeForCausalLM(config(**EXPERTS)).train()
    batch = torch.randint(3, 300, (1, 4))
    model(batch, labels=batch).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        if name.endswith(("down_embed.weight", "up_embed.weight")):
            assert 1 <= p.grad.any(-1).sum() <= 4 * 2
            assert not p.grad.is_sparse


def fields(prepared, model, out, **overrides):
    """Of a short run of `doge pretrain` with one row of 32 tokens at a time."""
    common = {"model": str(model), "data": str(prepared / "data"), "tokenizer": str(prepared / "tokenizer")}
    common |= {"output_dir": str(out), "max_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-3, "eval_rows": 2}
    common |= {"per_device_train_batch_size": 1, "use_cpu": True, "report_to": "none", "router_aux_loss_coef": 0.1}
    return {**common, **overrides}


def worker(rank, folder, prepared):
    """One of two processes: train in all ways, and the first leaves what came out."""
    found = {(kind, c): train(kind, c, rank) for kind in ("ddp", "fsdp") for c in COEFFICIENTS}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    pretrain(recipe.build(PretrainArguments, fields(prepared, folder / "model", folder / "two")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prepared):
    """What two processes leave, and the runs of one."""
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    DogeForCausalLM(config(**EXPERTS)).save_pretrained(folder / "model")
    together(worker, folder, prepared)
    pretrain(
        recipe.build(PretrainArguments, fields(prepared, folder / "model", folder / "micro", tokens_per_step=2 * 32))
    )
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    found = torch.load(folder / "found.pt")
    torch.manual_seed(0)
    start = {name: p.detach() for name, p in DogeForCausalLM(config(**EXPERTS)).named_parameters()}
    return found | {(kind, c): train(kind, c) for kind in KINDS[:2] for c in COEFFICIENTS} | {"start": start}


def differences(a, b):
    """The largest difference of losses, and of parameters."""
    losses = max(abs(x - y) for x, y in zip(a[0], b[0], strict=True))
    return losses, max((p - b[1][name]).abs().max().item() for name, p in a[1].items())


@pytest.mark.parametrize("kind", ["micro-batches", "ddp", "fsdp"])
def test_two_processes_equal_one_without_the_balance_loss(trained, kind):
    losses, parameters = differences(trained["one", 0.0], trained[kind, 0.0])
    assert losses < 1e-5
    assert parameters < 1e-5


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_two_micro_batches_of_one_with_it(trained, kind):
    """The balance loss is not linear in the batch, but a micro-batch and a process's share are the same batch."""
    losses, parameters = differences(trained["micro-batches", 0.001], trained[kind, 0.001])
    assert losses < 1e-5
    assert parameters < 1e-5
    before, after = trained["one", 0.0], trained["one", 0.001]
    assert before[0] != after[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_with_the_balance_loss_two_processes_are_close_to_one_batch(trained, kind):
    """Each balances its own half of the batch; 32 tokens a half for 64 experts is as unlike as halves will ever be."""
    losses, _ = differences(trained["one", 0.001], trained[kind, 0.001])
    one, two, start = trained["one", 0.001][1], trained[kind, 0.001][1], trained["start"]
    apart, moved = (sum((one[n] - x[n]).square().sum() for n in one) ** 0.5 for x in (two, start))
    assert losses < 1e-3
    assert apart < 0.05 * moved


def test_pretrain_on_two_processes_equals_one_with_two_micro_batches(folder):
    losses, tensors = [], []
    for run in ("micro", "two"):
        history = json.loads((folder / run / "trainer_state.json").read_text())["log_history"]
        losses.append([row["loss"] for row in history if "loss" in row])
        tensors.append(load_model(folder / run).state_dict())
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    worst = max((tensors[0][name] - x).abs().max() for name, x in tensors[1].items())
    assert worst < 1e-5


def test_the_recipe_says_what_the_balance_loss_counts(prepared, folder, tmp_path):
    grown = load_model(folder / "two")
    assert grown.config.router_aux_loss_coef == 0.1
    words = fields(prepared, "tiny", tmp_path / "dense")
    with pytest.raises(UserError, match=r"router_aux_loss_coef is 0.1, and tiny has no experts"):
        pretrain(recipe.build(PretrainArguments, words))
    with pytest.raises(UserError, match=r"`router_aux_loss_coef` is -1.0, expected 0 or more"):
        recipe.build(PretrainArguments, words | {"router_aux_loss_coef": -1.0})
    assert not (tmp_path / "dense").exists()


def test_a_grown_model_goes_on_where_the_dense_one_was(prepared, tmp_path):
    """Whether it then learns more is for experiments/upcycle.py: 200 steps are too few to tell at this size."""
    common = {"per_device_train_batch_size": 4, "router_aux_loss_coef": None, "learning_rate": 3e-3}
    before = pretrain(recipe.build(PretrainArguments, fields(prepared, "tiny", tmp_path / "dense", **common)))
    upcycle(before, tmp_path / "grown", num_experts=64)
    losses = []
    for model, coefficient in ((before, None), (tmp_path / "grown", 0.0)):
        own = common | {"router_aux_loss_coef": coefficient, "warmup_steps": 0, "max_steps": 12}
        out = pretrain(recipe.build(PretrainArguments, fields(prepared, model, tmp_path / f"{model.name}-on", **own)))
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        losses.append([row["loss"] for row in history if "loss" in row])
    assert losses[0][0] == losses[1][0]
    assert losses[0][1:] != losses[1][1:]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    assert all(layer.mlp.up_embed.weight.any() for layer in load_model(out).model.layers)
