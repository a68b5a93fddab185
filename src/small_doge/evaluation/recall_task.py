"""Multi-query associative recall, the task: rows of random tokens, and how much of what they show a model finds again.

The task of Zoology (Arora et al. 2023, arXiv:2312.04927). A row of T positions with P pairs is

    k1 v1 k2 v2 … kP vP | then, in steps of two positions, a query or nothing, and every other position filler

and after each query, a key shown before, the model has to predict that key's value. Each row draws its own pairs, so
nothing can be learnt by heart: the answer is in the row, or nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import UserError

IGNORED = -100  # a label that carries no loss
DISTANCES = 8  # equal parts of the length, by which accuracy is split
PADDING = 0  # no key and no value; fills the row if that is asked for
Filler = Literal["random", "padding"]
Split = Literal["train", "test"]


class RecallRows(NamedTuple):
    """Rows of the task.

    Attributes:
        input_ids: (rows, length) int64.
        labels: (rows, length) int64. A query at position t has its value at labels[t + 1], as in transformers, where
            the loss at t is that of the label after it. All others are −100. What stands at input_ids[t + 1] is
            filler: the answer is never shown.
    """

    input_ids: np.ndarray
    labels: np.ndarray


def most_pairs(length: int, vocab_size: int) -> int:
    """How many pairs fit: each takes two positions, its query two more, and each has a key of its own."""
    return max(0, min(length // 4, vocab_size // 2 - 1))


def pairs_at(length: int, pairs: float, vocab_size: int) -> int:
    """The number of pairs at a length: ``pairs`` itself, or below 1 that share of the length, at least one.

    Raises:
        UserError: if they do not fit.
    """
    count = max(1, round(pairs * length)) if 0 < pairs < 1 else int(pairs)
    most = most_pairs(length, vocab_size)
    if not 1 <= count <= most:
        asked = f"{count:,}" if count == pairs else f"{count:,} ({pairs:g} of the length)"
        raise UserError(
            f"{asked} pairs do not fit a length of {length:,} and a vocabulary of {vocab_size:,}: expected 1 to "
            f"{most:,}, as a pair and its query take 4 positions, and half of the vocabulary are keys"
        )
    return count


def tasks(lengths: Sequence[int], pairs: Sequence[float], vocab_size: int) -> list[tuple[int, int]]:
    """Every length with every number of pairs, each once, shortest and fewest first.

    Raises:
        UserError: if some pairs do not fit their length.
    """
    return sorted({(length, pairs_at(length, p, vocab_size)) for length in lengths for p in pairs})


def recall_rows(
    rows: int,
    length: int,
    pairs: int,
    seed: int,
    *,
    vocab_size: int = 8192,
    power_a: float = 0.01,
    filler: Filler = "random",
    split: Split = "train",
    index: int = 0,
) -> RecallRows:
    """Draw rows of the task; the same arguments give the same rows.

    What holds in every row:

    - Positions 0 to 2P − 1 are the pairs: keys from 1 … V/2 − 1, all different, and values from V/2 … V − 1, all
      different, in no order.
    - Every key is asked for exactly once, at position 2P + 2g, where g is drawn without replacement from
      0 … (T − 2P)/2 − 1 with weight (g + 1)^(power_a − 1). At Zoology's 0.01 most queries come soon.
    - All other positions hold tokens that are not among the row's pairs (Zoology draws from the whole vocabulary,
      and so at times repeats a key behind which another token follows), or ``PADDING``, a token like any other.

    Args:
        rows: how many.
        length: positions of a row, T.
        pairs: key-value pairs of a row, P, which are also its queries.
        seed: of the random numbers.
        vocab_size: V; half of it keys, half values.
        power_a: exponent of the gaps, above 0; 1 spreads the queries evenly.
        filler: what fills the rest.
        split: "train" and "test" draw from streams of their own: with enough pairs no row is ever in both.
        index: which batch of the stream.

    Raises:
        UserError: if the pairs do not fit.
    """
    pairs_at(length, pairs, vocab_size)
    stream = (("train", "test").index(split), length, pairs, index)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))
    half, shown = vocab_size // 2, 2 * pairs
    keys = 1 + _distinct(rng, rows, pairs, half - 1)
    values = half + _distinct(rng, rows, pairs, vocab_size - half)
    slots = (length - shown) // 2
    at = shown + 2 * _race(rng, rows, pairs, np.arange(1, slots + 1) ** (power_a - 1.0))

    known = np.stack([keys, values], axis=2).reshape(rows, shown)
    input_ids = np.full((rows, length), PADDING, dtype=np.int64)
    if filler == "random":
        input_ids[:] = _others(rng, known, length, vocab_size)
    input_ids[:, :shown] = known
    np.put_along_axis(input_ids, at, keys, axis=1)
    labels = np.full((rows, length), IGNORED, dtype=np.int64)
    np.put_along_axis(labels, at + 1, values, axis=1)
    return RecallRows(input_ids, labels)


def measure(
    model: Any,
    length: int,
    pairs: int,
    seed: int,
    *,
    rows: int = 256,
    vocab_size: int = 8192,
    power_a: float = 0.01,
    filler: Filler = "random",
    tokens_per_batch: int = 16384,
    device: Any = None,
) -> dict[str, Any]:
    """Accuracy of a model on one length and number of pairs: its likeliest token, of all the vocabulary, is the value.

    Args:
        model: a transformers causal language model (``base_model``, and ``get_output_embeddings()`` as its head); its
            mode is put back afterwards.
        length, pairs, seed, rows, vocab_size, power_a, filler: see :func:`recall_rows`; split "test".
        tokens_per_batch: positions a call of the model sees; changes no figure.
        device: where to run; None leaves the model where it is.

    Returns:
        ``length``, ``pairs``, ``queries``, ``accuracy`` with its ``standard_error`` over the rows, ``loss`` in nats a
        query, and ``by_distance``: accuracy by how far behind the query its value stands, in parts of the length
        (``from`` ≤ distance < ``to``; parts without queries are left out). A window of the last w keys alone holds
        distances below w.

    Raises:
        UserError: if the pairs do not fit, or the model's vocabulary is smaller than the task's.
    """
    import torch
    import torch.nn.functional as F

    if vocab_size > model.config.vocab_size:
        raise UserError(
            f"the task has a vocabulary of {vocab_size:,} and the model one of {model.config.vocab_size:,}, expected "
            "at most the model's"
        )
    task = recall_rows(rows, length, pairs, seed, vocab_size=vocab_size, power_a=power_a, filler=filler, split="test")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    was_training = model.training
    model.to(device).eval()
    right, losses = [], []
    size = max(1, tokens_per_batch // length)
    try:
        with torch.no_grad():
            for start in range(0, rows, size):
                batch = RecallRows(*(x[start : start + size] for x in task))
                hidden, values = at_queries(model, batch, device)
                logits = model.get_output_embeddings()(hidden).float()
                right.append((logits.argmax(1) == values).cpu().numpy())
                losses.append(F.cross_entropy(logits, values, reduction="none").cpu().numpy())
    finally:
        model.train(was_training)
    # Queries of a row in the order of their positions, as the model's output was picked.
    correct, distances = np.concatenate(right).reshape(rows, pairs), _distances(task, pairs)
    parts = []
    for low in (np.arange(DISTANCES) * length) // DISTANCES:
        high = low + length / DISTANCES
        inside = (distances >= low) & (distances < high)
        if inside.any():
            part = {"from": int(low), "to": int(high), "queries": int(inside.sum())}
            parts.append(part | {"accuracy": float(correct[inside].mean())})
    return {
        "length": length,
        "pairs": pairs,
        "queries": correct.size,
        "accuracy": float(correct.mean()),
        "standard_error": float(correct.mean(1).std(ddof=1) / rows**0.5),
        "loss": float(np.concatenate(losses).mean()),
        "by_distance": parts,
    }


def _distances(task: RecallRows, pairs: int) -> np.ndarray:
    """(rows, pairs) positions from each query back to its value, queries in the order of their positions."""
    rows = len(task.labels)
    at = np.nonzero(task.labels != IGNORED)[1].reshape(rows, pairs) - 1
    found = task.labels[:, 1:][task.labels[:, 1:] != IGNORED].reshape(rows, pairs)
    # Where each value stands: those shown, sorted, are those asked for, sorted.
    shown = 2 * np.argsort(task.input_ids[:, 1 : 2 * pairs : 2], axis=1) + 1
    place = np.empty_like(at)
    np.put_along_axis(place, np.argsort(found, axis=1), shown, axis=1)
    return at - place


def at_queries(model: Any, batch: RecallRows, device: Any) -> tuple[Any, Any]:
    """Hidden states (N, C) at the queries of a batch and the values (N,) expected there.

    The head then costs what the queries cost: at an eighth of the length in pairs, an eighth of all logits.
    """
    import torch

    input_ids, labels = (torch.from_numpy(x).to(device, non_blocking=True) for x in batch)
    following = labels[:, 1:]  # the loss at t is that of labels[t + 1]
    asked = following != IGNORED
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden[:, :-1][asked], following[asked]


def _distinct(rng: np.random.Generator, rows: int, count: int, n: int) -> np.ndarray:
    """(rows, count) integers below n, different within a row, every choice and order of them of equal chance.

    What repeats an integer of its row is drawn again until nothing does. No integer is treated differently from
    another, so no outcome is likelier than another; and a row costs ``count`` numbers, not n.
    """
    if 4 * count > n:  # too many would repeat
        return _race(rng, rows, count, np.ones(n))
    drawn = rng.integers(n, size=(rows, count))
    while True:
        order = np.argsort(drawn, axis=1, kind="stable")
        ordered = np.take_along_axis(drawn, order, axis=1)
        again = np.zeros(drawn.shape, dtype=bool)
        np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        if not again.any():
            return drawn
        drawn[again] = rng.integers(n, size=int(again.sum()))


def _race(rng: np.random.Generator, rows: int, count: int, weights: np.ndarray) -> np.ndarray:
    """(rows, count) different indices of (n,) ``weights`` a row, in the order of drawing them one after another.

    Index i arrives after an exponential time of rate weights[i]; the first ones to arrive are distributed as draws
    without replacement. They have to be sorted: argpartition alone leaves them near their old order, and the
    i-th smallest key would tend to have the i-th smallest value.
    """
    times = rng.standard_exponential((rows, len(weights)), dtype=np.float32) / weights.astype(np.float32)
    first = np.argpartition(times, count - 1, axis=1)[:, :count]
    order = np.argsort(np.take_along_axis(times, first, axis=1), axis=1)
    return np.take_along_axis(first, order, axis=1)


def _others(rng: np.random.Generator, known: np.ndarray, length: int, vocab_size: int) -> np.ndarray:
    """(rows, length) tokens, any but ``PADDING`` and those of the row's ``known`` (rows, n), all of equal chance."""
    rows, n = known.shape
    wanted = rng.integers(vocab_size - 1 - n, size=(rows, length))
    # The r-th token that is not known is r plus the known ones before it; of the sorted known ones, the i-th comes
    # before if known[i] − i ≤ r. One search serves all rows, each shifted to numbers of its own.
    shift = vocab_size * np.arange(rows)[:, None]
    before = np.sort(known, axis=1) - 1 - np.arange(n)
    found = np.searchsorted((before + shift).ravel(), (wanted + shift).ravel(), side="right").reshape(rows, length)
    return 1 + wanted + found - n * np.arange(rows)[:, None]
