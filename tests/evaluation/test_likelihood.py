"""Our harness model against lm-evaluation-harness's own HFLM, request by request."""

import itertools
import random

import numpy as np
import pytest
import torch
import transformers

from small_doge.data.tokenizer import TokenizerRecipe, load_tokenizer, train_tokenizer
from small_doge.evaluation import likelihood_plan
from small_doge.evaluation.likelihood_plan import Row, Sequence, plan, sequences_of
from small_doge.models import DogeConfig, DogeForCausalLM

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from small_doge.evaluation.likelihood import HarnessModel

SIZES = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1}
SIZES |= {"pad_token_id": 2}
WORDS = "the a one old red small river house bird stone runs sees finds gives under over with and then slowly".split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    text = sentence(random.Random(1), 6000)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    recipe = TokenizerRecipe(str(folder / "made"), str(folder / "text.txt"), vocab_size=320, validation_fraction=0)
    return load_tokenizer(train_tokenizer(recipe))


def sentence(rng, words):
    return " ".join(rng.choice(WORDS) + rng.choice(["", "", "", "", ".", ",\n"]) for _ in range(words))


def model_of(kind, tokenizer, **options):
    """A small model whose every part does something."""
    vocab = {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    if kind == "doge":
        model = DogeForCausalLM(DogeConfig(**{**SIZES, "tie_word_embeddings": True, **vocab, **options}))
    else:
        config = transformers.AutoConfig.for_model(kind, **{**SIZES, **vocab, **options})
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".A"):
                p.uniform_(-1, 1)
            elif "dt_proj" in name:
                p.normal_(std=0.4)
            elif p.dim() == 2:
                p.normal_(std=0.15)  # far from uniform, so that a wrong mask shows
    return model.eval()


def instances(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def pairs():
    """Contexts and continuations of every kind, in no order."""
    rng = random.Random(0)
    found = []
    for words in (3, 10, 25, 26, 27, 60, 70):  # like HellaSwag: endings of one context
        context = sentence(rng, words)
        found += [(context, " " + sentence(rng, rng.randint(1, 9))) for _ in range(4)]
    examples = sentence(rng, 70)  # like MMLU: questions behind the same examples, one-token answers
    for i in range(14):
        context = f"{examples}\n\n{sentence(rng, 4 + i)}\nAnswer:"
        found += [(context, f" {letter}") for letter in "ABCD"]
    before, after = sentence(rng, 30), " " + sentence(rng, 6)  # like Winogrande: options in the context
    found += [(f"{before} {name}", after) for name in ("bird", "stone", "the old river")]
    found += [("", sentence(rng, 5)), ("", "bird"), ("", "<|begin_of_text|>" + sentence(rng, 3))]
    found += [("a bird ", "runs"), ("a bird \n", " runs"), ("a", "bird"), ("<|begin_of_text|>a bird", " sees the")]
    long = sentence(rng, 200)  # longer than max_length
    found += [(long, " " + sentence(rng, n)) for n in (2, 2, 5)] + [("a", " " + sentence(rng, 60))]
    context = sentence(rng, 20)  # a continuation that begins as another ends, and twins
    found += [(context, " the bird sees"), (context, " the bird"), (context, " the")]
    found += found[3:60:9]
    rng.shuffle(found)
    return found


KINDS = {
    "doge": ("doge", {}, True),
    "doge, window of 40": ("doge", {"keep_window_size": 40}, True),
    "doge, local window": ("doge", {"keep_window_size": 64, "local_window": 8, "num_key_value_heads": 1}, True),
    "doge, dynamic angles": (
        "doge",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4, "rope_theta": 1e4}},
        False,
    ),
    "llama": ("llama", {}, True),
    "llama, eager": ("llama", {"attn_implementation": "eager"}, True),
    "mistral, sliding window": ("mistral", {"sliding_window": 48}, True),
    "gpt2": ("gpt2", {}, True),
    "gemma2, capped logits": ("gemma2", {"head_dim": 16, "sliding_window": 48, "final_logit_softcapping": 3.0}, True),
    "mamba": ("mamba", {}, False),
}


def hflm(model, tokenizer, **options):
    return HFLM(model, tokenizer=tokenizer, **{"max_length": 128, **options})


def ours(model, tokenizer, **options):
    return HarnessModel(model, tokenizer, **{"max_length": 128, "tokens_per_batch": 600, "progress": False, **options})


def assert_equal(found, expected, requests):
    for request, (nats, greedy), (other, other_greedy) in zip(requests, found, expected, strict=True):
        assert nats == pytest.approx(other, abs=1e-4), request
        assert greedy == other_greedy, request


@pytest.mark.parametrize("kind", KINDS)
def test_loglikelihood_equals_hflm(tokenizer, kind):
    name, options, shares = KINDS[kind]
    model = model_of(name, tokenizer, **options)
    requests = instances("loglikelihood", pairs())
    lm = ours(model, tokenizer)
    assert lm.scorer.shares == shares
    assert lm.scorer.splits_head == (name != "gemma2")
    assert_equal(
        lm.loglikelihood(requests), hflm(model, tokenizer).loglikelihood(requests, disable_tqdm=True), requests
    )


@pytest.mark.parametrize("kind", ["doge", "llama"])
def test_greedy_continuations_are_found(tokenizer, kind):
    model = model_of(kind, tokenizer)
    rng = np.random.default_rng(0)
    tokens = []
    for length in (1, 5, 5, 40, 126, 140):
        context = rng.integers(3, len(tokenizer), length).tolist()
        ids = torch.tensor([context[-125:]])
        greedy = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, -4:].tolist()
        for continuation in (greedy, greedy[:1], [*greedy[:3], greedy[3] ^ 1], [greedy[0] ^ 1, *greedy[1:]]):
            tokens.append((("", ""), context, continuation))
    expected = hflm(model, tokenizer)._loglikelihood_tokens(tokens, disable_tqdm=True)
    assert_equal(ours(model, tokenizer)._loglikelihood_tokens(tokens), expected, tokens)
    assert [greedy for _, greedy in expected[:16]] == [True, True, False, False] * 4  # those that were not cut


def test_the_same_text_split_elsewhere(tokenizer):
    model = model_of("llama", tokenizer)
    requests = instances(
        "loglikelihood", [("a bird sees", " the river"), ("a bird", " sees the river"), ("a", " bird")]
    )
    # With its cache of logits, HFLM takes the second's from the wrong places.
    expected = hflm(model, tokenizer, logits_cache=False).loglikelihood(requests, disable_tqdm=True)
    assert_equal(ours(model, tokenizer).loglikelihood(requests), expected, requests)


@pytest.mark.parametrize("kind", ["doge", "doge, window of 40", "llama"])
def test_rolling_loglikelihood_equals_hflm(tokenizer, kind):
    name, options, _ = KINDS[kind]
    model, rng = model_of(name, tokenizer, **options), random.Random(0)
    texts = [sentence(rng, words) for words in (1, 5, 40, 41, 200)]
    requests = instances("loglikelihood_rolling", [(text,) for text in (*texts, "", "bird", texts[1])])
    expected = hflm(model, tokenizer, max_length=32, batch_size=4).loglikelihood_rolling(requests, disable_tqdm=True)
    found = ours(model, tokenizer, max_length=32).loglikelihood_rolling(requests)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("kind", ["doge", "doge, window of 40", "llama", "gpt2"])
def test_generated_texts_equal_hflm(tokenizer, kind):
    name, options, _ = KINDS[kind]
    model, rng = model_of(name, tokenizer, **options), random.Random(0)
    contexts = [
        *(sentence(rng, words) for words in (1, 3, 8, 8, 12, 120)),
        "<|begin_of_text|>a bird",
        "a bird",
        "a bird",
    ]
    until = {"until": ["\n", ".", " bird"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 40}
    arguments = [(context, dict(until)) for context in contexts]
    arguments += [(context, {"until": [], "max_gen_toks": 20}) for context in contexts[:4]]
    arguments += [(contexts[2], {"until": "e", "max_gen_toks": 7, "num_beams": 2})]
    rng.shuffle(arguments)
    requests = instances("generate_until", arguments)
    expected = hflm(model, tokenizer, max_length=100).generate_until(requests, disable_tqdm=True)
    lm = ours(model, tokenizer, max_length=100, tokens_per_batch=150)
    assert lm.generate_until(requests) == expected
    assert len(set(map(len, expected))) > 4  # some end early
    assert lm.truncated == 1


def test_a_text_ends_with_the_models_own_end_token(tokenizer):
    model = model_of("doge", tokenizer)
    context = "a bird sees"
    ids = tokenizer(context, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    ending = next(i for i in range(1, 30) if written[i] not in written[:i] and written[i] > 16)
    model.generation_config.eos_token_id = [1, written[ending]]
    expected = tokenizer.decode(written[: ending + 1], skip_special_tokens=True)
    requests = instances("generate_until", [(context, {"until": ["~"], "max_gen_toks": 30})] * 2)
    assert ours(model, tokenizer).generate_until(requests) == [expected] * 2


def test_results_are_told_as_they_come_and_stand_in_the_order_of_requests(tokenizer):
    told, arguments = {}, pairs()[:40]
    lm = ours(model_of("doge", tokenizer), tokenizer, on_result=lambda i, request, x: told.__setitem__(i, (request, x)))
    for method, args in (
        ("loglikelihood", arguments),
        ("loglikelihood_rolling", [(text,) for _, text in arguments[:9]]),
        ("generate_until", [(text, {"until": ["\n"], "max_gen_toks": 4}) for _, text in arguments[:9]]),
    ):
        requests = instances(method, args)
        told.clear()
        found = getattr(lm, method)(requests)
        assert [told[i][1] for i in range(len(args))] == found
        assert all(told[i][0] is request for i, request in enumerate(requests))


def test_what_was_cut_is_counted(tokenizer):
    lm = ours(model_of("llama", tokenizer), tokenizer, max_length=16)
    requests = [("a bird", " sees"), ("a bird sees " * 12, " the"), ("a bird sees " * 6, " the")]
    lm.loglikelihood(instances("loglikelihood", requests))
    assert lm.truncated == 2
    assert lm.longest == max(len(tokenizer(context + text)["input_ids"]) for context, text in requests)
    lm.generate_until(
        instances("generate_until", [("a bird sees " * 8, {"max_gen_toks": 4}), ("a", {"max_gen_toks": 4})])
    )
    assert lm.truncated == 3


def test_mistakes_are_named(tokenizer):
    model = model_of("llama", tokenizer)
    with pytest.raises(ValueError, match="max_length is 0, expected at least 1"):
        ours(model, tokenizer, max_length=0)
    lm = ours(model, tokenizer, max_length=16)
    with pytest.raises(ValueError, match="request 1 has .* of continuation, expected .* at most max_length = 16"):
        lm.loglikelihood(instances("loglikelihood", [("a", " bird"), ("a", " bird" * 40)]))
    with pytest.raises(ValueError, match="request 0 has .* 0 of continuation"):
        lm.loglikelihood(instances("loglikelihood", [("a bird", "")]))
    with pytest.raises(ValueError, match="expected max_gen_toks below the model's 16 tokens"):
        lm.generate_until(instances("generate_until", [("a", {"until": ["."]})]))


def test_autocast_is_close(tokenizer):
    model = model_of("doge", tokenizer)
    requests = instances("loglikelihood", pairs())
    exact = ours(model, tokenizer).loglikelihood(requests)
    lm = ours(model, tokenizer, autocast=torch.bfloat16)
    assert lm.scorer.shares
    rounded = lm.loglikelihood(requests)
    differences = np.abs(np.array([a[0] for a in exact]) - [b[0] for b in rounded])
    assert 1e-5 < differences.max() < 0.05 * max(-a[0] for a in exact)
    (text,) = ours(model, tokenizer, autocast=torch.bfloat16).generate_until(
        instances("generate_until", [("a bird", {"until": ["."], "max_gen_toks": 8})])
    )
    assert text


def test_the_harness_finds_the_tokenizer_and_its_template(tokenizer):
    model, messages = model_of("llama", tokenizer), [{"role": "user", "content": "a bird"}]
    theirs, lm = hflm(model, tokenizer), ours(model, tokenizer)
    for name in ("eot_token_id", "prefix_token_id", "tokenizer_name", "max_length", "device", "rank", "world_size"):
        assert getattr(lm, name) == getattr(theirs, name), name
    assert lm.chat_template(True) == theirs.chat_template(True)
    assert lm.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    for text in ("a bird", "", "<|begin_of_text|>a bird"):
        for special in (None, True, False):
            assert lm.tok_encode(text, special) == theirs.tok_encode(text, special)
    assert HarnessModel(model, tokenizer).max_length == HFLM(model, tokenizer=tokenizer).max_length == 256


def random_pairs(seed):
    """Token pairs with much in common, of every shape."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 3, n) for n in (40, 300, 7)]
    found = []
    for _ in range(60):
        text = texts[rng.integers(3)]
        context = np.concatenate([text[: rng.integers(1, len(text) + 1)], rng.integers(0, 3, rng.integers(0, 9))])
        found.append((context.tolist(), rng.integers(0, 3, rng.integers(1, 9)).tolist()))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_holds_every_request_once_and_shares_what_is_the_same(seed, monkeypatch):
    monkeypatch.setattr(likelihood_plan, "SAVED_TOKENS", 64)
    asked, max_length = random_pairs(seed), 200
    sequences = sequences_of(asked, max_length)
    groups = plan(sequences, tokens_per_batch=900, share_up_to=(None, 100, 0)[seed % 3])
    seen = []
    for group in groups:
        p = len(group.prefix)
        for batch in group.batches:
            trunk, tails = max(row.trunk for row in batch) - p, max(row.tails for row in batch)
            assert len(batch) == 1 or len(batch) * (trunk + tails) <= 900
            for row in batch:
                assert row.trunk > p
                assert row.first >= p
                for sequence in row.branches:
                    assert sequence.ids[: row.trunk].tolist() == row.branches[0].ids[: row.trunk].tolist()
                    assert sequence.ids[:p].tolist() == group.prefix.tolist()
                    for request, continuation in sequence.asks:
                        context, expected = asked[request]
                        assert continuation.tolist() == expected
                        assert sequence.ids.tolist() == (context + expected)[-max_length - 1 :][:-1]
                        seen.append(request)
                if seed % 3 == 2 or (seed % 3 == 1 and row.trunk > 100):
                    assert len(row.branches) == 1
    assert sorted(seen) == list(range(len(asked)))
    if seed % 3 != 2:
        assert any(len(row.branches) > 1 for group in groups for batch in group.batches for row in batch)


def test_a_plan_for_endings_and_one_for_questions_behind_examples():
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 9, 100).tolist() for _ in range(5)]
    endings = [(context, rng.integers(0, 9, 9).tolist()) for context in contexts for _ in range(4)]
    (group,) = plan(sequences_of(endings, 2048), 2048, None)
    rows = list(itertools.chain(*group.batches))
    assert not len(group.prefix)
    # The endings of some context may begin alike by chance.
    assert [len(row.branches) for row in rows] == [4] * 5
    assert all(100 <= row.trunk < 104 for row in rows)

    examples = rng.integers(0, 9, 300).tolist()
    questions = [[*examples, 9, i, *rng.integers(0, 9, 20 + i).tolist()] for i in range(20)]
    (group,) = plan(sequences_of([(q, [letter]) for q in questions for letter in range(4)], 2048), 2048, None)
    rows = list(itertools.chain(*group.batches))
    assert group.prefix.tolist() == [*examples, 9]
    assert sorted(len(row.branches[0].asks) for row in rows) == [4] * 20
    assert all(len(row.branches) == 1 for row in rows)


def test_rows_of_unequal_length_do_not_meet_where_angles_depend_on_it():
    rows = [Sequence(np.arange(1000 * i, 1000 * i + n), [(i, np.zeros(1))]) for i, n in enumerate((50, 50, 40, 9, 8))]
    (group,) = plan(rows, 4096, share_up_to=30, equal_beyond=30)
    assert [[row.trunk for row in batch] for batch in group.batches] == [[50, 50], [40], [9, 8]]
    assert isinstance(group.batches[0][0], Row)
