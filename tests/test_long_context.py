"""The study of long contexts: what its rows hold, and its losses by position against a direct computation."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from small_doge.models import DogeForCausalLM, config_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import long_context
import needles

VOCABULARY = 1024
SIZE = needles.SIZE


def row_of(lengths, padding=0):
    """A row of documents of these lengths as PackedTokens gives it; the first goes on from a row before."""
    total = sum(lengths) + padding
    starts = np.cumsum(lengths)
    starts = starts[starts < total]
    input_ids = torch.from_numpy(np.random.default_rng(0).integers(16, 700, total))
    labels = input_ids.clone()
    labels[starts] = long_context.IGNORED
    labels[total - padding :] = long_context.IGNORED
    return {"input_ids": input_ids, "labels": labels}, np.searchsorted(starts, np.arange(total), side="right")


def sown(lengths, padding=0, seed=1, pairs=16):
    row, documents = row_of(lengths, padding)
    starts, made = needles.sow(row, np.random.default_rng(seed), pairs, VOCABULARY)
    return row, documents, starts, made


@pytest.mark.parametrize(("lengths", "padding"), [([2048], 0), ([700, 40, 900], 408), ([1, 2000], 47)])
def test_needles_stand_where_it_says_and_nothing_else_changes(lengths, padding):
    row, documents, starts, made = sown(lengths, padding)
    before, _ = row_of(lengths, padding)
    assert 4 <= len(starts) == len(made) <= 16
    where = starts[:, :, None] + np.arange(SIZE)
    assert len(np.unique(where)) == where.size, "needles overlap"
    for name in ("input_ids", "labels"):
        assert (row[name].numpy()[where] == made[:, None]).all()
        elsewhere = np.delete(np.arange(sum(lengths) + padding), where)
        assert torch.equal(row[name][elsewhere], before[name][elsewhere])
    assert (starts[:, 0] < starts[:, 1]).all()
    assert (documents[where] == documents[where[:, :1, :1]]).all(), "a pair lies in two documents"


def test_rows_of_one_document_get_all_pairs_and_no_key_twice():
    _, _, starts, made = sown([4096])
    assert len(starts) == 16
    assert (made[:, 0] == made[0, 0]).all()
    assert len(np.unique(made[:, 1:])) == made[:, 1:].size
    assert made.max() < VOCABULARY
    with pytest.raises(ValueError, match="65 needles need 130 tokens"):
        sown([4096], pairs=65)


def test_a_row_is_the_same_for_the_same_seed():
    for name in ("input_ids", "labels"):
        assert torch.equal(sown([2048])[0][name], sown([2048])[0][name])
    assert not torch.equal(sown([2048])[0]["input_ids"], sown([2048], seed=2)[0]["input_ids"])


class Data(list):
    """Rows as PackedTokens gives them, alike but for the first token; each goes on from a row before."""

    row_length, manifest = 2048, {"vocab_size": VOCABULARY}

    def __init__(self, count):
        row, documents = row_of([700, 40, 900], 408)
        position = np.arange(2048) - np.searchsorted(documents, documents) + 300 * (documents == 0)
        row["position_ids"] = torch.from_numpy(position)
        super().__init__({name: x.clone() for name, x in row.items()} for _ in range(count))
        for i, one in enumerate(self):
            one["input_ids"][0] = i


def test_short_texts_come_first_and_begin_anew():
    data = Data(3)
    rows = needles.Sown(data, seed=1, count=8, pairs=8, stages=[(64, 2), (512, 1)], density=32)
    assert len(rows) == 8
    assert [tuple(rows[i]["input_ids"].shape) for i in (0, 1, 2, 3, 7)] == [(32, 64)] * 2 + [(4, 512)] + [(1, 2048)] * 2
    order = [int(rows[i]["input_ids"][0, 0]) for i in range(6)]
    assert sorted(order[:3]) == sorted(order[3:]) == [0, 1, 2]
    short, before = rows[0], data[order[0]]
    for name in short:
        assert torch.equal(short[name], rows[0][name]), "a row is the same each time"
    positions, was = short["position_ids"], before["position_ids"].view(32, 64)
    assert (positions[:, 0] == 0).all()
    assert torch.equal(positions.diff(dim=-1) == 1, was.diff(dim=-1) == 1), "documents begin where they began"
    begun = positions == torch.arange(64)
    assert torch.equal(torch.where(begun, positions, was), positions)
    changed = (short["input_ids"] != before["input_ids"].view(32, 64)).sum(-1)
    assert (changed[:11] > 0).all(), "each text has needles of its own"
    assert torch.equal(before["input_ids"], Data(3)[order[0]]["input_ids"]), "the row itself was written to"
    with pytest.raises(ValueError, match="rows of 2,048 are cut into texts of 100"):
        needles.Sown(data, seed=1, count=8, pairs=8, stages=[(100, 2)], density=32)


def test_distances_are_spread_over_all_scales():
    starts = np.concatenate([sown([8192], seed=seed)[2] for seed in range(20)])
    distance = starts[:, 1] - starts[:, 0]
    shares = np.histogram(np.log2(distance), [2, 5, 7, 9, 11, 13])[0] / len(distance)
    assert (shares > 0.1).all(), shares
    assert len(np.unique(distance % needles.SLOT)) == needles.SLOT


def test_a_haystack_asks_for_the_needle_of_each_depth():
    row = np.arange(2000) % 700
    ids, asked = needles.haystack(row, 512, np.random.default_rng(3), VOCABULARY)
    assert len(ids) == 512
    assert sorted(asked) == list(range(512 - 6 * SIZE, 512, SIZE))
    for depth, at in zip(needles.DEPTHS, asked, strict=True):
        needle = ids[at : at + SIZE]
        first = int(np.flatnonzero((ids[:-2] == needle[0]) & (ids[1:-1] == needle[1]) & (ids[2:] == needle[2]))[0])
        assert (ids[first : first + SIZE] == needle).all()
        assert abs(first - (1 - depth) * (512 - 7 * SIZE)) <= 0.5
    assert row.max() == 699, "the row itself was written to"


def tiny():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return DogeForCausalLM(config_for("tiny", vocab_size=VOCABULARY, keep_window_size=40, **sizes)).eval()


@torch.no_grad()
def test_losses_by_position_are_those_of_all_logits():
    model, ids = tiny(), torch.randint(VOCABULARY, (3, 96), generator=torch.Generator().manual_seed(1))
    edges = [1, 8, 64, 96]
    found = long_context.loss_by_position(model, iter([ids[:2], ids[2:]]), edges)
    log_p = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    nats = -log_p[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    expected = [nats[:, low - 1 : high - 1].mean().item() for low, high in pairwise(edges)]
    assert found == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_recall_is_read_at_the_value_and_only_there():
    model = tiny()
    made = [needles.haystack(np.arange(300), 128, np.random.default_rng(i), VOCABULARY) for i in range(2)]
    ids, asked = (torch.from_numpy(np.stack(x)) for x in zip(*made, strict=True))
    log_p = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    right, nats = needles.recalled(model, ids, asked)
    for b, n in np.ndindex(2, len(needles.DEPTHS)):
        at = int(asked[b, n])
        wanted = [-log_p[b, at + i, ids[b, at + i + 1]].item() for i in (2, 3)]
        assert nats[b, n].item() == pytest.approx(sum(wanted) / 2, abs=1e-5)
        greedy = [int(log_p[b, at + i].argmax()) == int(ids[b, at + i + 1]) for i in (2, 3)]
        assert bool(right[b, n]) == all(greedy)
