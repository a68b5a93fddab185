import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from small_doge.errors import UserError
from small_doge.evaluation import bits_per_byte as module
from small_doge.evaluation.bits_per_byte import bits_per_byte, windows_of

VOCAB = 50


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).double().eval()


def documents_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).astype(np.uint16) for n in lengths]


@torch.no_grad()
def one_token_at_a_time(model, documents, context_length):
    """Nats, with a call of the model for every token: its context begins where its window does."""
    nats = 0.0
    stride = max(1, context_length // 2)
    for document in documents:
        ids = torch.from_numpy(document.astype(np.int64))
        for target in range(1, len(ids)):
            beyond = max(0, target - context_length)
            begin = math.ceil(beyond / stride) * stride
            logits = model(input_ids=ids[None, begin:target]).logits[0, -1]
            nats -= logits.log_softmax(-1)[ids[target]].item()
    return nats


@pytest.mark.parametrize(("context_length", "batch_size"), [(1, 3), (5, 4), (8, 1), (16, 3), (64, 8)])
def test_equals_one_call_a_token(model, context_length, batch_size):
    documents = documents_of([2, 3, 17, 40, 9, 16])
    found = bits_per_byte(model, documents, 321, context_length, batch_size)
    expected = one_token_at_a_time(model, documents, context_length)
    assert found.nats == pytest.approx(expected, rel=1e-6)
    assert found.tokens == sum(len(d) - 1 for d in documents)
    assert found.bytes == 321
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / 321, rel=1e-6)


def test_chunks_and_smaller_batches_change_nothing(model, monkeypatch):
    documents = documents_of([30, 4, 21, 21, 2])
    whole = bits_per_byte(model, documents, 100, 16, 8)
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 3 * VOCAB)
    monkeypatch.setattr(module, "MAX_LOGITS", 33 * VOCAB)
    assert bits_per_byte(model, documents, 100, 16, 8).nats == pytest.approx(whole.nats, rel=1e-9)


@given(length=st.integers(2, 200), context_length=st.integers(1, 50))
def test_every_input_is_scored_once_and_sees_half_a_context(length, context_length):
    scored = []
    for w in windows_of(0, length, context_length):
        assert 0 <= w.begin <= w.scored < w.end <= length - 1
        assert w.end - w.begin <= context_length
        for i in range(w.scored, w.end):
            assert i - w.begin + 1 >= min(i + 1, context_length // 2)
        scored += range(w.scored, w.end)
    assert scored == list(range(length - 1))


def test_the_models_mode_comes_back_and_progress_ends_at_all(model):
    seen = []
    model.train()
    try:
        bits_per_byte(
            model, iter(documents_of([9, 20])), 10, 8, 2, progress=lambda done, total: seen.append((done, total))
        )
        assert model.training
    finally:
        model.eval()
    assert seen[-1] == (27, 27)


def test_nothing_to_measure_is_refused(model):
    with pytest.raises(UserError):
        bits_per_byte(model, [], 10, 8)
    with pytest.raises(UserError):
        bits_per_byte(model, documents_of([4]), 0, 8)
    with pytest.raises(ValueError, match="at least 2"):
        bits_per_byte(model, documents_of([4, 1]), 10, 8)
    with pytest.raises(ValueError, match="context_length"):
        bits_per_byte(model, documents_of([4]), 10, 0)
