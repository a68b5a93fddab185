"""Growing: the same logits before and after, all else of the folder kept, and nothing written by a mistake."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import small_doge
from small_doge import cli
from small_doge.errors import UserError
from small_doge.models import load_model, upcycle
from small_doge.ops.product_key import balance, retrieve

EXPERTS = {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 2}


def ids(seed=0):
    return torch.randint(3, 400, (3, 41), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(make_model, tmp_path):
    """A dense model as pretraining leaves it."""
    folder = tmp_path / "dense"
    make_model().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "NOTICE"):
        (folder / name).write_text(name)
    for name in ("stage.json", "run.json", "trainer_state.json", "training_args.bin", "samples.jsonl"):
        (folder / name).write_text("{}")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "model.safetensors").write_text("")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"qk_norm": False, "mask_heads": 4}, {"tie_word_embeddings": False}])
def test_a_dense_model_keeps_its_logits_to_the_bit(make_model, dtype, options):
    dense = make_model(dtype, **options)
    grown = upcycle(dense, num_experts=64, num_experts_per_tok=3)
    assert torch.equal(grown(ids()).logits, dense(ids()).logits)
    assert {p.dtype for p in grown.parameters()} == {dtype}
    assert (grown.config.num_experts, grown.config.num_experts_per_tok) == (64, 3)
    assert not dense.config.is_moe


def test_new_experts_are_spread_over_the_tokens_and_learn(make_model):
    grown = upcycle(make_model(), num_experts=64).train()
    assert grown.config.num_experts_per_tok == 2  # √64 / 4
    out = grown(ids(), labels=ids(), output_router_logits=True)
    out.loss.backward()
    for layer, logits in zip(grown.model.layers, out.router_logits, strict=True):
        usage = balance(logits, retrieve(logits, 2)[1])[1]
        assert (usage > 0).float().mean() > 0.5
        learning = layer.mlp.up_embed.weight.grad.abs().sum(-1) > 0
        assert torch.equal(learning, usage > 0)


@torch.no_grad()
def test_a_folder_grows_with_all_that_is_in_it(folder, tmp_path, capsys):
    state = torch.random.get_rng_state()
    out = tmp_path / "moe"
    assert cli.main(["upcycle", str(folder), str(out), "--num_experts", "64", "--num_experts_per_tok", "4"]) == 0
    said = capsys.readouterr().out
    assert f"wrote {out}: " in said
    assert "64 experts a layer, 4 a token" in said
    assert "at most 0 from those before" in said
    assert torch.equal(torch.random.get_rng_state(), state)
    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "NOTICE"}
    written = {"config.json", "generation_config.json", "model.safetensors", "stage.json"}
    assert {p.name for p in out.iterdir()} == kept | written
    assert (out / "NOTICE").read_text() == "NOTICE"
    record = json.loads((out / "stage.json").read_text())
    assert (record["stage"], record["settings"]["num_experts"]) == ("upcycle", 64)
    dense, opened = load_model(folder), AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.equal(opened(ids()).logits, dense(ids()).logits)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    new = {name.split("mlp.")[1] for name in after.keys() - before.keys()}
    assert new == {"router_gate.weight", "down_embed.weight", "up_embed.weight"}
    written_at = (out / "model.safetensors").stat().st_mtime_ns
    assert cli.main(["upcycle", str(folder), str(out), "--num_experts", "64", "--num_experts_per_tok", "4"]) == 0
    assert f"found {out}: " in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == written_at


@torch.no_grad()
def test_the_same_seed_grows_the_same_model(make_model):
    dense = make_model()
    one, same, other = (upcycle(dense, num_experts=16, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(same[name], tensor) for name, tensor in one.items())
    assert not all(torch.equal(other[name], tensor) for name, tensor in one.items())


def places(grown, K):
    """The (K, K) block of a layer's table where the old experts are."""
    return [
        {n: getattr(layer.mlp, n).weight.view(grown.config.num_keys, grown.config.num_keys, -1)[:K, :K] for n in names}
        for layer in grown.model.layers
        for names in [("down_embed", "up_embed")]
    ]


@torch.no_grad()
@pytest.mark.parametrize(
    ("N", "k", "times"), [(256, 8, 4), (256, 4, 2), (256, None, 2), (256, 2, 1), (100, None, 1), (576, 18, 9)]
)
def test_more_experts_keep_the_logits_and_the_old_ones(make_model, N, k, times):
    small = make_model(torch.float64, **EXPERTS)
    grown = upcycle(small, num_experts=N, num_experts_per_tok=k)
    assert grown.config.num_experts_per_tok == (k or 2 * times)
    assert (grown(ids()).logits - small(ids()).logits).abs().max() < 1e-9
    for old, new in zip(places(small, 8), places(grown, 8), strict=True):
        assert torch.equal(old["down_embed"], new["down_embed"])
        assert torch.equal(old["up_embed"] * times, new["up_embed"])
    for layer in grown.model.layers:
        assert layer.mlp.up_embed.weight.any(-1).sum() == 64
        rows = layer.mlp.router_gate.weight.unflatten(0, (2, -1))
        assert rows.any(-1).all()


@torch.no_grad()
def test_other_choices_change_the_logits_a_little(make_model):
    """With k' of no such ratio experts are chosen that were not before: close, not equal, and said so."""
    small = make_model(torch.float64, **EXPERTS)
    before, after = (m(ids()).logits for m in (small, upcycle(small, num_experts=256, num_experts_per_tok=3)))
    assert 1e-6 < (after - before).norm() / before.norm() < 0.2


@torch.no_grad()
def test_grown_twice(make_model):
    dense = make_model(torch.float64)
    grown = upcycle(upcycle(upcycle(dense, num_experts=16), num_experts=64), num_experts=256)
    assert torch.equal(grown(ids()).logits, dense(ids()).logits)
    assert (grown.config.num_experts, grown.config.num_experts_per_tok) == (256, 4)


def test_twins_part_when_they_learn(make_model):
    small = make_model(torch.float64, **EXPERTS)
    grown = upcycle(small, num_experts=256, num_experts_per_tok=8).train()
    grown(ids(), labels=ids()).loss.backward()
    for layer in grown.model.layers:
        first, second = layer.mlp.router_gate.weight.grad.unflatten(0, (2, 2, 8)).unbind(1)
        assert ((first - second).abs().sum(-1) > 0).float().mean() > 0.8
        used = layer.mlp.up_embed.weight.grad.abs().sum(-1) > 0
        assert used.view(16, 16)[8:].any()


def chosen(model, rows):
    """Which of the experts (layers, L, L) any token is sent to."""
    L, k = model.config.num_keys, model.config.num_experts_per_tok
    logits = model(rows, output_router_logits=True).router_logits
    return torch.stack([torch.bincount(retrieve(r, k)[1].flatten(), minlength=L * L).view(L, L) > 0 for r in logits])


def test_dormant_experts_wake(make_model):
    """With k' = k no new expert is chosen at first; the balance loss lifts them, Adam makes its small steps count."""
    grown = upcycle(make_model(**EXPERTS), num_experts=256, num_experts_per_tok=2).train()
    optimizer = torch.optim.AdamW(grown.parameters(), lr=3e-3, weight_decay=0.0)
    assert not chosen(grown, ids())[:, 8:].any()
    for step in range(60):
        loss = grown(ids(step), labels=ids(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert chosen(grown, ids())[:, 8:].any(-1).any(-1).all()
    assert chosen(grown, ids())[:, :, 8:].any(-1).any(-1).all()


MISTAKES = {
    "not a square": (["--num_experts", "60"], "num_experts is 60, expected a perfect square such as 49 or 64"),
    "negative": (["--num_experts", "-4"], "num_experts is -4, expected a perfect square"),
    "too many a token": (["--num_experts", "4", "--num_experts_per_tok", "5"], "is 5, expected 1 to 4"),
    "none a token": (["--num_experts_per_tok", "0"], "num_experts_per_tok is 0, expected 1 to 1024"),
    "no such folder": (["--model", "nowhere"], "model nowhere does not exist, expected the folder of a Doge model"),
    "no model": (["--model", "empty"], "is a folder without a config.json"),
    "another model": (["--model", "llama"], "is of type 'llama', expected 'doge'"),
    "taken": (["--output_dir", "llama"], "output folder llama holds files that are not of this run; choose another"),
    "another one": (["--output_dir", "moe", "--num_experts", "16"], "`model` is None there and 'dense' here"),
    "a file": (["--output_dir", "file"], "output folder file is a file"),
    "fewer": (["--model", "moe", "--num_experts", "4"], "num_experts is 4, expected more than the 16 that"),
    "as many": (["--model", "moe", "--num_experts", "16"], "num_experts is 16, expected more than the 16 that"),
    "a third word": (["word"], "found 'word', expected `--field value`"),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    desk = tmp_path_factory.mktemp("desk")
    options = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = small_doge.DogeConfig(**options, intermediate_size=16)
    dense = small_doge.DogeForCausalLM(config)
    dense.save_pretrained(desk / "dense")
    upcycle(dense, desk / "moe", num_experts=16)
    (desk / "empty").mkdir()
    (desk / "llama").mkdir()
    (desk / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (desk / "file").write_text("")
    return desk


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(desk, mistake, monkeypatch, capsys):
    words, expected = MISTAKES[mistake]
    monkeypatch.chdir(desk)
    before = sorted(desk.rglob("*"))
    assert cli.main(["upcycle", "dense", "out", *words]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert expected in said[0]
    assert sorted(desk.rglob("*")) == before


def test_in_python_mistakes_are_errors_of_ours(desk):
    dense = load_model(desk / "dense")
    with pytest.raises(UserError, match="holds a model already, expected an empty folder"):
        upcycle(dense, desk / "moe", num_experts=16)
    with pytest.raises(UserError, match="perfect square"):
        small_doge.upcycle(desk / "dense", num_experts=60)
