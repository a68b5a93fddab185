"""The CPU engine gives what the model gives: every variant, past the window, whatever the pieces it is fed in."""

import gc
import os
import sys
import threading

import numpy as np
import pytest
import torch

from small_doge.models import DogeForCausalLM, DynamicMaskCache, config_for

pytest.importorskip("numba")

from small_doge.errors import UserError
from small_doge.inference.engine import Engine, Sampling, Unsupported
from small_doge.inference.engine import pack as packing
from small_doge.inference.engine import threads as crew
from small_doge.inference.engine import weights as opening
from small_doge.inference.engine.crew import open_next, wait
from small_doge.inference.engine.layout import TOKENS_AT_ONCE
from small_doge.inference.engine.numbers import aged_place, exp, grid, route, to_integers
from small_doge.inference.engine.pack import PRECISIONS, decode, encode
from small_doge.inference.engine.weights import open_weights, pack_model

VOCABULARY, WINDOW = 307, 24
VARIANTS = {
    "dense": {},
    "no q and k norm": {"qk_norm": False},
    "a score for each query head": {"mask_heads": 4, "qk_norm": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "a head of its own": {"tie_word_embeddings": False},
    "local window": {"local_window": 7},
    "scores that age": {"score_lifetime": 9.0},
    "scores that age, local window": {"score_lifetime": 9.0, "local_window": 7},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 34},
    "experts": {"is_moe": True, "num_experts": 49, "num_experts_per_tok": 5},
    "all experts": {"is_moe": True, "num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": True},
    "scaled RoPE": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
}


def make(**changed):
    """A tiny model with odd sizes, scores that differ, and no two layers' weights alike."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 72, "intermediate_size": 90, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "keep_window_size": WINDOW, "initializer_range": 0.2, "eos_token_id": 0}
    model = DogeForCausalLM(config_for("tiny", vocab_size=VOCABULARY, **sizes | changed)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".A"):
            torch.nn.init.uniform_(parameter, -1, 1)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0, 0.1)
        elif parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.7, 1.3)
    return model


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def engine(model):
    return Engine(pack_model("", "float32", model), threads=1)


def some_ids(n, seed=1):
    return torch.randint(1, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def difference(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_the_models(name, threads):
    model = make(**VARIANTS[name])
    engine, ids = Engine(pack_model("", "float32", model), threads=threads), some_ids(5 * WINDOW)
    want = expected(model, ids)
    assert difference(engine.logits(ids), want) < 1e-4
    session = engine.session()
    assert difference(np.stack([session.feed([i]) for i in ids]), want) < 1e-4


def test_512_greedy_tokens_are_the_models(model, engine):
    ids = some_ids(40)
    cache, out = DynamicMaskCache(model.config), []
    with torch.no_grad():
        logits = model(torch.tensor([ids]), past_key_values=cache).logits[0, -1]
        for _ in range(512):
            out.append(int(logits.argmax()))
            logits = model(torch.tensor([[out[-1]]]), past_key_values=cache).logits[0, -1]
    assert list(engine.generate(ids, max_new_tokens=512, stop=())) == out


@pytest.mark.parametrize("pieces", [(1, 200), (23, 2, 175, 1), (100, 101), (WINDOW,) * 8 + (9,)])
def test_pieces_of_a_text_are_the_text(engine, pieces):
    ids, session, first = some_ids(sum(pieces)), engine.session(), 0
    whole = engine.logits(ids)
    for n in pieces:
        last = session.feed(ids[first : first + n])
        first += n
        assert difference(last, whole[first - 1]) < 1e-5
    assert session.seen == len(ids)


def test_texts_in_turn_are_each_alone(engine):
    prompts = [some_ids(n, n) for n in (1, 3, WINDOW, 61, 150)]
    alone = [list(engine.generate(ids, max_new_tokens=40, stop=())) for ids in prompts]
    turns = [engine.generate(ids, max_new_tokens=40, stop=()) for ids in prompts]
    assert [list(tokens) for tokens in zip(*turns, strict=True)] == [list(t) for t in zip(*alone, strict=True)]


def test_texts_of_several_threads_are_each_alone(model):
    engine = Engine(pack_model("", "float32", model), threads=2)
    prompts = [some_ids(n, n) for n in (5, 40, 90)]
    alone, found = [list(engine.generate(ids, max_new_tokens=60, stop=())) for ids in prompts], {}

    def run(i):
        found[i] = list(engine.generate(prompts[i], max_new_tokens=60, stop=()))

    workers = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[i] for i in range(3)] == alone


@pytest.mark.parametrize("local_window", [0, 5])
def test_ties_go_to_the_newer_key(local_window):
    """A text of few words: in the first layer the same word always has the same score, and A = 0 makes all alike."""
    model = make(local_window=local_window)
    with torch.no_grad():
        model.model.layers[1].self_attn.A.zero_()
    ids = (some_ids(3) * 60)[:150]
    engine, want = Engine(pack_model("", "float32", model), threads=1), expected(model, ids)
    assert difference(engine.logits(ids), want) < 1e-4
    session = engine.session()
    assert difference(np.stack([session.feed([i]) for i in ids]), want) < 1e-4


def test_compiling_is_announced_before_anything_else(model, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path)
    Engine.open(tmp_path).warm()
    capsys.readouterr()
    Engine.open(tmp_path)
    assert not capsys.readouterr().err
    # A function of its own has the same signature, and nothing on disk.
    monkeypatch.setattr(crew.lead, "_cache", None)
    monkeypatch.setattr(crew.lead, "overloads", type(crew.lead.overloads)())
    Engine.open(tmp_path)
    assert capsys.readouterr().err == "compiling the engine for this processor, once: about half a minute\n"


def test_memory_does_not_grow(engine):
    session = engine.session()
    before = session.nbytes
    addresses = [x.ctypes.data for x in session.slots]
    session.feed(some_ids(10 * WINDOW))
    assert session.nbytes == before
    assert [x.ctypes.data for x in session.slots] == addresses


def test_it_stops(engine):
    ids = some_ids(20)
    tokens = list(engine.generate(ids, max_new_tokens=30, stop=()))
    end = tokens[7]
    first = tokens.index(end)
    assert list(engine.generate(ids, max_new_tokens=30, stop=(end,))) == tokens[: first + 1]
    answers = iter([False, False, True])
    assert list(engine.generate(ids, max_new_tokens=30, stop=(), stopped=lambda: next(answers))) == tokens[:2]
    assert engine.eos == [0]


def test_a_text_goes_on_after_it_was_generated(engine):
    ids, session = some_ids(20), engine.session()
    reply = list(session.generate(ids, max_new_tokens=10, stop=()))
    more = list(session.generate([reply[-1], *some_ids(5)], max_new_tokens=10, stop=()))
    assert more == list(engine.generate([*ids, *reply, *some_ids(5)], max_new_tokens=10, stop=()))


@pytest.mark.parametrize(
    ("precision", "logits", "weights"), [("bf16", 0.05, 2**-8), ("int8", 0.1, 1 / 250), ("int4", 1.0, 1 / 6)]
)
def test_rounded_weights_are_near(model, precision, logits, weights):
    packed, plain = pack_model("", precision, model), pack_model("", "float32", model)
    for name, entry in plain.header["tensors"].items():
        if len(entry["shape"]) == 2:
            assert difference(packed.matrix(name), plain.matrix(name)) < weights
    # Within the window: beyond it, a rounding decides which of two near keys stays.
    ids = some_ids(WINDOW)
    assert difference(Engine(packed, threads=1).logits(ids), expected(model, ids)) < logits


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounded_weights_are_what_the_engine_computes_with(precision):
    """The model with the weights that the packed file decodes to gives the engine's logits, keys in bf16 apart."""
    model = make(**VARIANTS["experts"], tie_word_embeddings=False)
    packed = pack_model("", precision, model)
    engine, ids = Engine(packed, threads=2, cache_precision="float32"), some_ids(WINDOW)
    with torch.no_grad():
        H, G, _, D = model.config.heads
        for i, layer in enumerate(model.model.layers):
            at, mlp = layer.self_attn, layer.mlp
            qkv = torch.from_numpy(packed.matrix(f"{i}.qkv").copy())
            for linear, part in zip((at.q_proj, at.k_proj, at.v_proj), qkv.split((H * D, G * D, G * D)), strict=True):
                linear.weight.copy_(part)
            pair = torch.from_numpy(packed.matrix(f"{i}.gate_up").copy())
            mlp.gate_proj.weight.copy_(pair[::2])
            mlp.up_proj.weight.copy_(pair[1::2])
            for module, name in ((at.o_proj, "out"), (mlp.down_proj, "down"), (mlp.router_gate, "router")):
                module.weight.copy_(torch.from_numpy(packed.matrix(f"{i}.{name}").copy()))
            mlp.down_embed.weight.copy_(torch.from_numpy(packed.matrix(f"{i}.expert_in").copy()))
            mlp.up_embed.weight.copy_(torch.from_numpy(packed.matrix(f"{i}.expert_out").copy()))
        model.model.embed_tokens.weight.copy_(torch.from_numpy(packed.matrix("embed").copy()))
        model.lm_head.weight.copy_(torch.from_numpy(packed.matrix("head").copy()))
    # Weights of 8 and 4 bits meet activations of 16.
    assert difference(engine.logits(ids), expected(model, ids)) < (1e-4 if PRECISIONS[precision] < 2 else 1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_is_to_the_nearest(precision):
    kind = PRECISIONS[precision]
    x = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
    x[2] = 0
    x[3, :64] = np.arange(64) - 32
    again = decode(*encode(x, kind), kind, 5)
    assert (again[2] == 0).all()
    if precision == "float32":
        assert (again == x).all()
    if precision == "bf16":
        assert (again == torch.from_numpy(x).bfloat16().float().numpy()).all()
    if precision == "int8":
        step = np.abs(x.reshape(5, 2, 64)).max(-1, keepdims=True) / 127
        assert (np.abs((again - x).reshape(5, 2, 64)) <= step * 0.5001).all()
    if precision == "int4":  # no worse than the plain rule: the largest of a group becomes -8
        groups = x.reshape(-1, 32)
        top = np.take_along_axis(groups, np.abs(groups).argmax(-1)[:, None], -1)
        step = np.where(top == 0, 1, top / -8)
        plain = (groups / step).round().clip(-8, 7) * step
        assert (((again.reshape(-1, 32) - groups) ** 2).sum(-1) <= ((plain - groups) ** 2).sum(-1) * 1.02 + 1e-9).all()


def test_numbers():
    x = np.linspace(-100, 20, 4001, dtype=np.float32)
    found = np.array([exp(v) for v in x])
    true = np.where(x < -87, 0, np.exp(x.astype(np.float64)))
    assert (np.abs(found - true) <= 3e-7 * true).all()
    assert exp(np.float32(-np.inf)) == 0
    from small_doge.ops.dynamic_mask.window import grid as theirs

    s = torch.cat([torch.randn(500).exp(), torch.tensor([0.0, -0.0, 1.0, -1.5, 1e-30])])
    assert [grid(np.float32(v)) for v in s.numpy()] == theirs(s).tolist()
    from small_doge.ops.dynamic_mask.window import places

    s = torch.cat([torch.randn(300).exp() * 10, torch.rand(300) * 3, torch.tensor([0.0, 1e-30, 1e30, 3.4e38, np.inf])])
    arrivals = torch.arange(len(s)) * 7919
    for lifetime in (1e-3, 1.0, 7.3, 4096.0, 1e30):
        got = [aged_place(v, np.float32(lifetime), j) for v, j in zip(s.numpy(), arrivals.tolist(), strict=True)]
        assert got == places(s, arrivals, lifetime).tolist()
    out = np.zeros(9, np.int16)
    y = np.array([0, 1, -2, 0.5, 3, -3, 1e-9, 2.9, 1], np.float32)
    factor = to_integers(y, 9, out)
    assert np.abs(out * factor - y).max() <= factor * 0.51
    assert out[4] == 32767 == -out[5]


@pytest.mark.parametrize(("K", "k"), [(1, 1), (2, 4), (7, 5), (16, 32), (128, 32)])
def test_routes_are_those_of_the_operation(K, k):
    from small_doge.ops.product_key import route as theirs

    generator = torch.Generator().manual_seed(K)
    for logits in (torch.randn(2 * K, generator=generator), torch.randint(3, (2 * K,), generator=generator).float()):
        shares, chosen = theirs(logits[None], k)
        got, by = np.zeros(k, np.int64), np.zeros(k, np.float32)
        route(logits.numpy(), k, got, by)
        assert got.tolist() == chosen[0].tolist()
        assert np.abs(by - shares[0].numpy()).max() < 1e-6


def test_helpers_are_never_needed(model, monkeypatch):
    """Whether helpers come late, sleep at once or are not asked at all, the same bits come out."""
    ids = some_ids(60)
    want = Engine(pack_model("", "float32", model), threads=1).logits(ids)
    for spin, naps in ((0, 0), (1, 3), (10_000_000, 10)):
        monkeypatch.setattr(crew, "SPIN", spin)
        monkeypatch.setattr(crew, "NAPS", naps)
        engine = Engine(pack_model("", "float32", model), threads=4)
        session = engine.session()
        got = np.stack([session.feed([i]) for i in ids])
        assert difference(got, want) < 1e-5
        engine._crew.control[crew.ALONE] = 1000
        assert difference(engine.logits(ids), want) < 1e-5
        engine.close()
        assert difference(engine.logits(ids), want) < 1e-5


def test_a_thread_sleeps_only_when_another_is_long_gone():
    """A chunk of a large matrix takes some ten microseconds: a leader that slept so soon gave up its helpers."""
    region = np.zeros(16, np.int64)
    at = region.ctypes.data
    open_next(at, 1)
    assert wait(at, 1, 0) == 0
    for generation, spin in ((2, 30_000_000_000), (3, 0)):
        opens = threading.Timer(0.05, open_next, (at, generation))
        opens.start()
        beyond = wait(at, generation, spin)
        opens.join()
        assert (beyond == 0) == (spin > 0)
    assert crew.SPIN >= 100_000


def test_helpers_are_given_up_for_what_they_cost():
    control = np.zeros(160, np.int64)
    control[crew.PATIENCE] = crew.FEWEST_ALONE
    # Asleep for a hundredth of a step, as often as it may be in a long one: nothing lost.
    crew.judge(control, 100_000, 10_000_000)
    assert (control[crew.ALONE], control[crew.PATIENCE]) == (0, crew.FEWEST_ALONE)
    for i in range(12):
        crew.judge(control, 5_000_000, 10_000_000)
        assert control[crew.ALONE] == min(crew.FEWEST_ALONE << i, crew.MOST_ALONE)
    # One good step between two times that the core is taken away does not bring the short waits back.
    control[crew.ALONE] = 0
    crew.judge(control, 0, 10_000_000)
    assert (control[crew.ALONE], control[crew.PATIENCE]) == (0, crew.MOST_ALONE - 1)
    for _ in range(crew.MOST_ALONE):
        crew.judge(control, 0, 10_000_000)
    assert control[crew.PATIENCE] == crew.FEWEST_ALONE


def test_no_helper_is_on_the_leaders_core(model):
    """Linux may wake a helper on it though others are idle, and leave it there: two threads were as slow as one."""
    assert crew.shares({0, 1}, 1, 1) == [{0}]
    assert crew.shares({0, 1}, 0, 3) == [{1}, {1}, {1}]
    assert crew.shares(set(range(8)), 3, 1) == [{0, 1, 2, 4, 5, 6, 7}]
    assert crew.shares(set(range(8)), 0, 3) == [{1, 4, 7}, {2, 5}, {3, 6}]
    assert crew.shares({5}, 5, 1) == []
    cores = os.sched_getaffinity(0) if sys.platform == "linux" else set()
    if len(cores) < 2:
        return
    engine = Engine(pack_model("", "float32", model), threads=3)
    engine.logits([1, 2])
    mine = engine._crew
    assert mine._leaders_core in cores
    found = [os.sched_getaffinity(helper.native_id) for helper in mine._helpers]
    assert found == crew.shares(cores, mine._leaders_core, 2)
    assert os.sched_getaffinity(0) == cores


def test_threads_go_with_their_engine(model):
    before = set(threading.enumerate())  # of other engines too, which may end meanwhile
    engine = Engine(pack_model("", "float32", model), threads=3)
    helpers = [t for t in threading.enumerate() if t not in before and t.name.startswith("doge-engine")]
    assert len(helpers) == 2
    engine.logits([1, 2])
    del engine
    gc.collect()
    for helper in helpers:
        helper.join(30)
        assert not helper.is_alive()


def test_nearly_cold_is_the_likeliest_token(engine):
    engine.warm()
    ids = some_ids(9)
    likeliest = list(engine.generate(ids, max_new_tokens=12, stop=()))
    for temperature in (1e-300, 1e-4):
        assert list(engine.generate(ids, max_new_tokens=12, stop=(), sampling=Sampling(temperature))) == likeliest


def test_bad_tokens(engine):
    for ids in ([VOCABULARY], [1, -1]):
        with pytest.raises(UserError, match=rf"found token {ids[-1]}, expected a list of token ids from 0 to 306"):
            engine.logits(ids)
    with pytest.raises(UserError, match="found no tokens"):
        engine.session().feed([])
    with pytest.raises(UserError, match="found no tokens"):
        list(engine.session().generate())


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_weights_are_packed_once(folder, monkeypatch):
    packed = open_weights(folder, "int8")
    assert packed.source.startswith(str(folder / ".packed"))
    monkeypatch.setattr(opening, "pack_model", None)
    assert open_weights(folder, "int8").source == packed.source
    assert not packed.data.flags.writeable


def test_other_weights_are_packed_anew(folder):
    first = open_weights(folder, "float32")
    other = make(initializer_range=0.3)
    other.save_pretrained(folder)
    second = open_weights(folder, "float32")
    assert second.source != first.source
    assert len(list((folder / ".packed").iterdir())) == 1
    ids = some_ids(10)
    assert difference(Engine(second, threads=1).logits(ids), expected(other, ids)) < 1e-4


def test_a_folder_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (folder / ".packed").write_text("a file in its place")  # root may write anywhere, so no permission would stop it
    monkeypatch.setattr(opening, "_user_cache", lambda: tmp_path / "cache" / "packed")
    assert open_weights(folder, "bf16").source.startswith(str(tmp_path / "cache"))
    (tmp_path / "other").write_text("")
    monkeypatch.setattr(opening, "_user_cache", lambda: tmp_path / "other" / "packed")
    packed = open_weights(folder, "bf16")
    assert packed.source == "memory"
    assert difference(Engine(packed, threads=1).logits([1, 2, 3]), Engine(packed, threads=2).logits([1, 2, 3])) < 1e-5


def test_auto_is_as_stored(folder, model, tmp_path):
    assert open_weights(folder).precision == "float32"
    DogeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    packed = open_weights(tmp_path / "bf16")
    assert packed.precision == "bf16"
    want = model.model.embed_tokens.weight.detach().bfloat16().float().numpy()
    assert (packed.matrix("embed") == want).all()


def test_round_trip(model, tmp_path):
    packed = pack_model("", "int4", model)
    packing.write(packed, tmp_path / "w.doge")
    again = packing.read(tmp_path / "w.doge")
    assert again.header == packed.header
    assert (again.data == packed.data).all()
    assert [path.name for path in tmp_path.iterdir()] == ["w.doge"]


def test_a_packed_file_of_before_scores_aged(model, engine, tmp_path):
    packed = pack_model("", "float32", model)
    assert packed.header["model"].pop("lifetime") == 0.0
    packing.write(packed, tmp_path / "w.doge")
    ids = some_ids(3 * WINDOW)
    assert (Engine(packing.read(tmp_path / "w.doge"), threads=1).logits(ids) == engine.logits(ids)).all()


@pytest.mark.parametrize("at", [0, 9, 40, -1])
def test_a_damaged_file(model, tmp_path, at):
    path = tmp_path / "w.doge"
    packing.write(pack_model("", "int8", model), path)
    whole = bytearray(path.read_bytes())
    whole[at] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"w\.doge (begin|have|are) .*, expected a file that `doge quantize` wrote"):
        packing.read(path)


@pytest.mark.parametrize("length", [0, 12, 100, 5000, -1])
def test_a_file_cut_short(model, tmp_path, length):
    path = tmp_path / "w.doge"
    packing.write(pack_model("", "bf16", model), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"w\.doge (begin|have|are) .*, expected a file that `doge quantize` wrote"):
        packing.read(path)


def test_a_damaged_copy_is_made_anew(folder):
    first = open_weights(folder, "int8")
    path = type(folder)(first.source)
    path.write_bytes(path.read_bytes()[:-100])
    again = open_weights(folder, "int8")
    assert again.header == first.header
    assert len(again.data) == first.header["data_bytes"]


def test_what_it_does_not_run(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(UserError, match="precision is 'int3', expected auto, float32, bf16, int8, int4"):
        open_weights(folder, "int3")
    with pytest.raises(UserError, match="threads is 0"):
        Engine(open_weights(folder), threads=0)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(Unsupported, match="type 'llama', expected 'doge'"):
        open_weights(tmp_path / "llama")
    grows = make(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    grows.save_pretrained(tmp_path / "grows")
    with pytest.raises(Unsupported, match="RoPE is of type dynamic"):
        open_weights(tmp_path / "grows")
    (folder / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match="cut short or damaged"):
        open_weights(folder)


def test_a_step_takes_so_many_tokens_of_a_prompt_at_once():
    assert TOKENS_AT_ONCE % 4 == 0  # `multiply_rows` takes four at a time
