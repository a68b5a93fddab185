"""Eviction times against a heap that reads the keys one by one, and against the mask of the reference."""

import heapq
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small_doge.ops.dynamic_mask import eviction_times, ranks, visible_keys
from small_doge.ops.dynamic_mask.reference import kept_keys


def heap_times(order, window):
    """The definition: keep the ``window`` best of what has come; whoever is pushed out at i has eviction time i."""
    times, kept = [len(order)] * len(order), []
    for i, rank in enumerate(order):
        heapq.heappush(kept, (rank, i))
        if len(kept) > window:
            times[heapq.heappop(kept)[1]] = i
    return times


def expected_times(scores, window, key_mask=None, documents=None, local_window=0):
    """(T,) scores → list of T, one document after the other, padding left out of the heap."""
    T = len(scores)
    order = ranks(scores).tolist()
    documents = [0] * T if documents is None else documents.tolist()
    real = [True] * T if key_mask is None else key_mask.tolist()
    times = [j + 1 for j in range(T)]
    for _, group in itertools.groupby(range(T), key=lambda j: documents[j]):
        places = list(group)
        keys = [j for j in places if real[j]]
        for j, step in zip(keys, heap_times([order[j] for j in keys], window), strict=True):
            end = keys[step] if step < len(keys) else places[-1] + 1
            times[j] = min(max(end, j + local_window), places[-1] + 1)
    return times


LEVELS = [0.0, 0.5, 1.0, 1.00001, 1.01, 2.0, 50.0, 1e4, float("-inf")]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_eviction_times_are_those_of_a_heap(data):
    T = data.draw(st.integers(1, 90))
    scores = torch.tensor(data.draw(st.lists(st.sampled_from(LEVELS), min_size=T, max_size=T)), dtype=torch.float64)
    window, local_window = data.draw(st.integers(1, T + 2)), data.draw(st.sampled_from([0, 0, 1, 5]))
    key_mask = documents = None
    if data.draw(st.booleans()):
        key_mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=T, max_size=T)))
    if data.draw(st.booleans()):
        starts = torch.tensor(data.draw(st.lists(st.sampled_from([0, 0, 0, 0, 1]), min_size=T, max_size=T)))
        documents = starts.cumsum(0)
    got = eviction_times(
        scores[None, None],
        window,
        key_mask=None if key_mask is None else key_mask[None],
        documents=None if documents is None else documents[None],
        local_window=local_window,
    )
    assert got.dtype == torch.int32
    assert got[0, 0].tolist() == expected_times(scores, window, key_mask, documents, local_window)


SHAPES_OF_SCORES = {
    "random": lambda T, g: torch.rand(T, generator=g),
    "tied": lambda T, g: torch.ones(T),
    "rising": lambda T, g: torch.linspace(1, 2, T),
    "falling": lambda T, g: torch.linspace(2, 1, T),
    "few levels": lambda T, g: torch.randint(0, 4, (T,), generator=g).float(),
    "one huge key": lambda T, g: torch.rand(T, generator=g).index_fill(0, torch.tensor([T // 3]), 1e30),
    "minus infinity": lambda T, g: torch.where(torch.rand(T, generator=g) < 0.9, -torch.inf, 1.0),
    "equal in bfloat16": lambda T, g: 1 + torch.rand(T, generator=g) * 2**-9,
    "negative": lambda T, g: torch.randn(T, generator=g),
}


@pytest.mark.parametrize("kind", SHAPES_OF_SCORES)
@pytest.mark.parametrize(("T", "window"), [(63, 7), (64, 64), (65, 64), (1000, 1), (1000, 128), (4097, 1024)])
def test_eviction_times_over_many_blocks_and_rows(kind, T, window):
    g = torch.Generator().manual_seed(T)
    s = torch.stack([SHAPES_OF_SCORES[kind](T, g) for _ in range(4)]).view(2, 2, T)
    got = eviction_times(s, window)
    for b, m in itertools.product(range(2), range(2)):
        assert got[b, m].tolist() == heap_times(ranks(s[b, m]).tolist(), window)


@pytest.mark.parametrize("window", [1, 5, 40, 41, 100])
def test_the_interval_is_the_mask_of_the_reference(window):
    """j ≤ i < e_j is exactly W(i), with padding and documents, for every query that is not padding itself."""
    T = 100
    g = torch.Generator().manual_seed(window)
    s = torch.randint(0, 30, (2, 3, T), generator=g) / 7
    key_mask = torch.rand(2, T, generator=g) > 0.2
    documents = (torch.rand(2, T, generator=g) < 0.03).cumsum(-1)
    e = eviction_times(s, window, key_mask=key_mask, documents=documents)
    i = torch.arange(T)[:, None]
    interval = (i >= i.T) & (i < e[:, :, None, :])
    kept = kept_keys(s, visible_keys(T, T, s.device, key_mask, documents), window)
    real = key_mask[:, None, :, None]
    assert torch.equal(interval & real, kept & real)


def test_nothing_leaves_a_window_as_long_as_the_text():
    s = torch.rand(1, 2, 50)
    assert (eviction_times(s, 50) == 50).all()
    assert (eviction_times(s, 49) < 50).sum() == 2  # one key a head leaves, at the last query
