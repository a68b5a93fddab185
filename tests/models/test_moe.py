"""Experts in the model: each token routed by its own scores, used evenly from the start, and the balance loss."""

import json
import logging
import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import DogeForCausalLM as TheirDoge

from small_doge.models import DogeConfig, DogeForCausalLM, DogeForSequenceClassification, load_model
from small_doge.models.moe import DogeCDMoE
from small_doge.ops.product_key import balance, reference, retrieve

EXPERTS = {"is_moe": True, "num_experts": 25, "num_experts_per_tok": 3}
IDS = torch.tensor([[5, 9, 7, 5, 9, 30, 7, 5, 5, 5, 11, 9]])


@pytest.fixture
def model(make_model):
    return make_model(torch.float64, **EXPERTS)


def routed_to(model, ids, **options):
    """The experts of every token in every layer: (layers, tokens, k)."""
    logits = model(ids, output_router_logits=True, **options).router_logits
    return torch.stack([retrieve(r, model.config.num_experts_per_tok)[1].sort().values for r in logits])


@torch.no_grad()
def test_a_layer_is_the_formula(model):
    layer, x = model.model.layers[0].mlp, torch.randn(3, 7, 48, dtype=torch.float64)
    out, logits, loss = layer(x)
    swiglu = layer.down_proj(torch.nn.functional.silu(layer.gate_proj(x)) * layer.up_proj(x))
    r = x @ layer.router_gate.weight.T
    routed, _, _ = reference(x, r, layer.down_embed.weight, layer.up_embed.weight, 3)
    assert torch.allclose(out, swiglu + routed, atol=1e-10)
    assert torch.allclose(logits, r.flatten(0, 1), atol=1e-10)
    assert loss is None


@pytest.mark.parametrize(
    ("chunk", "compiled"), [(1, False), (8, False), (20, False), (21, False), (64, False), (8, True), (64, True)]
)
def test_tokens_in_chunks_are_the_same_and_keep_nothing_of_the_swiglu(make_model, chunk, compiled):
    """21 tokens in chunks of 8 leave one of 5. Nothing as wide as the SwiGLU waits for the backward pass."""
    whole = make_model(torch.float64, **EXPERTS).model.layers[0].mlp.train()
    parts = make_model(torch.float64, **EXPERTS, chunk_size_feed_forward=chunk).model.layers[0].mlp.train()
    x = torch.randn(3, 7, 48, dtype=torch.float64, requires_grad=True)
    do = torch.randn(3, 7, 48, dtype=torch.float64)
    found, kept = [], []
    for layer in (whole, parts):
        widths = []
        torch.compiler.reset()
        run = torch.compile(layer, backend="aot_eager") if compiled and layer is parts else layer
        seen = lambda t, widths=widths: widths.append(t.shape) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
            out = run(x, balanced=True)[0]
        found.append((out, *torch.autograd.grad(out, [x, *layer.parameters()], do)))
        kept.append(any(shape[:-1].numel() > 1 and shape[-1] in (64, 128) and 48 not in shape for shape in widths))
        with torch.no_grad():
            assert torch.allclose(layer(x)[0], out, rtol=1e-12, atol=1e-12)
    for got, expected in zip(*found, strict=True):
        assert (got - expected).norm() <= 1e-12 * expected.norm()
    assert kept == [True, chunk >= 21]


@pytest.mark.parametrize("mlp_bias", [False, True])
def test_gates_and_ups_of_one_product(make_model, monkeypatch, mlp_bias):
    """As on a GPU; and a down projection that something listens to is called, not passed by."""
    layer = make_model(torch.float64, mlp_bias=mlp_bias).model.layers[0].mlp
    leaves = [torch.randn(3, 7, 48, dtype=torch.float64, requires_grad=True), *layer.parameters()]
    do, heard = torch.randn(3, 7, 48, dtype=torch.float64), []

    def together(x, *layers):
        bias = torch.cat([one.bias for one in layers]) if mlp_bias else None
        return torch.nn.functional.linear(x, torch.cat([one.weight for one in layers]), bias)

    found = []
    for one_product, listens in ((False, False), (True, False), (True, True)):
        if one_product:
            monkeypatch.setattr("small_doge.models.moe.project_together", together)
        if listens:
            layer.down_proj.register_forward_hook(lambda *called: heard.append(called))
        out = layer(leaves[0])
        found.append([out, *torch.autograd.grad(out, leaves, do)])
    assert len(heard) == 1
    for other in found[1:]:
        for got, expected in zip(other, found[0], strict=True):
            assert (got - expected).norm() <= 1e-12 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("B", [1, 3])
def test_a_single_token_gives_the_logits_of_transformers(model, tmp_path, B):
    """There r.view(2, tokens, K) is what it should be. With B rows it is not, so those are asked one by one."""
    model.save_pretrained(tmp_path)
    theirs = TheirDoge.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float64).eval()
    ids = torch.arange(5, 5 + B)[:, None]
    for ours, published in zip(model.model.layers, theirs.model.layers, strict=True):
        x = torch.randn(B, 1, 48, dtype=torch.float64)
        expected = torch.cat([published.mlp(token[None])[0] for token in x])
        assert (ours.mlp(x)[0] - expected).abs().max() < 1e-10
    expected = torch.cat([theirs(row[None]).logits for row in ids])
    assert (model(ids).logits - expected).abs().max() < 1e-6  # their norms are float32


@torch.no_grad()
def test_text_differs_from_transformers_whose_routing_mixes_tokens(model, tmp_path):
    """The published bug itself, so that this file would tell if it came to us: a later token routes earlier ones."""
    model.save_pretrained(tmp_path)
    theirs = TheirDoge.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float64).eval()
    edited = IDS.clone()
    edited[0, -1] = 50
    ours_moved, theirs_moved = ((m(IDS).logits - m(edited).logits)[0, :-1].abs().max() for m in (model, theirs))
    assert ours_moved == 0
    assert theirs_moved > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 2, 3, 11])
def test_a_tokens_experts_depend_on_nothing_beside_and_after_it(model, T):
    """Published code routed token t by tokens ⌊t/2⌋ and ⌊(T + t)/2⌋ of the flattened batch."""
    ids = torch.randint(3, 400, (4, T), generator=torch.Generator().manual_seed(T))
    together = routed_to(model, ids).unflatten(1, (4, T))
    logits = model(ids).logits
    for row in range(4):
        assert torch.equal(together[:, row], routed_to(model, ids[row : row + 1]))
        assert (logits[row] - model(ids[row : row + 1]).logits[0]).abs().max() < 1e-9
    for t in range(T):
        assert torch.equal(together[:, :, : t + 1].flatten(1, 2), routed_to(model, ids[:, : t + 1]))


@torch.no_grad()
@pytest.mark.parametrize(("N", "k"), [(64, 4), (1024, 8)])
def test_every_expert_is_within_reach_at_the_start(N, k):
    """At the first release all tokens were sent to the same 8 of 1,024 experts."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = DogeForCausalLM(DogeConfig(**sizes, is_moe=True, num_experts=N, num_experts_per_tok=k)).eval()
    tokens = torch.randint(4096, (16, 512))
    out = model(tokens, output_router_logits=True)
    for logits in out.router_logits:
        usage = balance(logits, retrieve(logits, k)[1])[1]
        assert (usage > 0).float().mean() > 0.95
        assert usage.max() < 20 / N
    assert 0.99 < out.aux_loss < 1.2


def balance_by_hand(model, ids, counted=None):
    """E · Σ f·P with all tokens × E probabilities, mean over layers."""
    losses, k, N = [], model.config.num_experts_per_tok, model.config.num_experts
    K = math.isqrt(N)
    for r in model(ids, output_router_logits=True, attention_mask=counted).router_logits:
        scores = (r[:, :K, None] + r[:, None, K:]).flatten(1)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0)
        rows = slice(None) if counted is None else counted.flatten().bool()
        losses.append(N * (chosen[rows].mean(0) / k * scores.softmax(-1)[rows].mean(0)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("skip_logits", [False, True])
def test_the_balance_loss_counts_in_training_and_only_there(model, skip_logits):
    pure = model(IDS, labels=IDS, skip_logits=skip_logits)
    assert pure.aux_loss is None
    asked = model(IDS, labels=IDS, skip_logits=skip_logits, output_router_logits=True)
    assert asked.loss == pure.loss
    expected = balance_by_hand(model, IDS)
    assert torch.allclose(asked.aux_loss, expected)
    model.train()
    out = model(IDS, labels=IDS, skip_logits=skip_logits)
    assert torch.allclose(out.loss.double(), pure.loss + 0.001 * expected, atol=1e-6)
    assert out.router_logits is None
    assert model.config.router_aux_loss_coef == 0.001
    (router,) = torch.autograd.grad(out.aux_loss, model.model.layers[0].mlp.router_gate.weight)
    assert router.abs().sum() > 0


@pytest.mark.parametrize("skip_logits", [False, True])
def test_micro_batches_weigh_in_by_their_labels(model, skip_logits):
    """As the Trainer has it: the losses of micro-batches, each over all items of the step, add up to the step's."""
    model.config.router_aux_loss_coef = 0.5
    model.train()
    total, expected = 0.0, 0.0
    for first, labelled in ((0, 11), (7, 5)):
        labels = torch.randint(3, 400, (1, 12))
        ids = labels.clone()
        labels[:, :first] = -100
        total += model(ids, labels=labels, num_items_in_batch=torch.tensor(16), skip_logits=skip_logits).loss
        expected += model(ids, labels=labels).loss * labelled / 16
    assert torch.allclose(total, expected)


def test_padding_does_not_count(model):
    padded, mask = torch.full((2, 12), 2), torch.zeros(2, 12, dtype=torch.long)
    padded[0, 3:], mask[0, 3:] = IDS[0, :9], 1
    padded[1], mask[1] = IDS[0], 1
    out = model(padded, attention_mask=mask, output_router_logits=True)
    assert torch.allclose(out.aux_loss, balance_by_hand(model, padded, mask))
    assert not torch.allclose(out.aux_loss, balance_by_hand(model, padded), rtol=1e-3)
    cached = model(padded[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
    rest = model(padded[:, 8:], attention_mask=mask, past_key_values=cached, output_router_logits=True)
    assert rest.aux_loss.isfinite()


def test_balance_alone_spreads_what_was_lopsided(make_model):
    """Training on nothing else: the router learns to use more experts."""
    model = make_model(num_hidden_layers=1, is_moe=True, num_experts=64, num_experts_per_tok=2).train()
    router = model.model.layers[0].mlp.router_gate
    with torch.no_grad():
        router.weight[:3] *= 8
    ids, optimizer = torch.randint(3, 400, (8, 32)), torch.optim.Adam(router.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        losses.append(model.model(ids).aux_loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def opened_with_warnings(open_model, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        opened = open_model()
    return opened, [record.message for record in caplog.records if "routing per token" in record.message]


@torch.no_grad()
def test_a_folder_round_trips_and_says_how_it_routes(model, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["router_per_token"] is True
    for open_model in (load_model, AutoModelForCausalLM.from_pretrained):
        again, warnings = opened_with_warnings(lambda f=open_model: f(tmp_path / "ours"), caplog)
        assert warnings == []
        assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("open_model", [load_model, AutoModelForCausalLM.from_pretrained])
def test_a_published_folder_opens_with_one_warning(model, tmp_path, caplog, monkeypatch, open_model):
    """transformers writes no word on routing: what it trained was routed by mixed tokens."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    for name in ("router_per_token", "qk_norm", "mask_heads", "local_window"):
        config.pop(name)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    TheirDoge.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert "router_per_token" not in json.loads((tmp_path / "theirs" / "config.json").read_text())
    again, warnings = opened_with_warnings(lambda: open_model(tmp_path / "theirs"), caplog)
    assert len(warnings) == 1
    assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)
    assert opened_with_warnings(lambda: open_model(tmp_path / "theirs"), caplog)[1] == []
    again.save_pretrained(tmp_path / "again")
    assert opened_with_warnings(lambda: open_model(tmp_path / "again"), caplog)[1] == []


def test_outputs_of_a_dense_model_are_as_they_were(make_model):
    out = make_model()(IDS, labels=IDS, output_router_logits=True)
    assert type(out).__name__ == "CausalLMOutputWithPast"
    assert "router_logits" not in out


def test_bfloat16_and_autocast(make_model):
    model = make_model(**EXPERTS).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    half = model.to(torch.bfloat16)
    assert half(IDS, labels=IDS).loss.isfinite()
    assert isinstance(half.model.layers[0].mlp, DogeCDMoE)


def test_sequence_classification(make_model):
    model = DogeForSequenceClassification(make_model(num_labels=3, **EXPERTS).config)
    model(IDS, labels=torch.tensor([1])).loss.backward()
    assert all(layer.mlp.up_embed.weight.grad.any() for layer in model.model.layers)
