"""Needles in a haystack: a key and its value, hidden in a text and asked for further on.

A small model does not know from books what it is asked, so training rows are sown with needles: five tokens in place of
five of the text, a marker, a key of two and a value of two, and the same five again further on, where the value can be
recalled from the key. Distances are log-uniform. Keys and values are drawn from the last ids of the vocabulary, the
rarest of a byte-pair encoding, which are read as ordinary tokens. A test hides a needle at each of six depths in
held-out text and asks for all at its end.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from small_doge.data.packing import IGNORED, PackedTokens

SIZE = 5  # of a needle: marker, two of the key, two of the value
SLOT = 2 * SIZE  # a needle of a training row stands anywhere within one of these, so that distances take all values
POOL = 512  # tokens that keys are made of, and as many for values
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # from the question back to the needle, in parts of the length


def needles(rng: np.random.Generator, count: int, vocab_size: int) -> np.ndarray:
    """(count, SIZE) token ids. No token of a key or a value is in two of them, so that each tells what comes next."""
    pool = min(POOL, vocab_size // 8)
    if 2 * count > pool:
        raise ValueError(f"{count} needles need {2 * count} tokens for keys, expected at most {pool} of {vocab_size:,}")
    keys = vocab_size - 2 * pool
    marker = np.full((count, 1), keys - 1)
    parts = [first + rng.permutation(pool)[: 2 * count].reshape(count, 2) for first in (keys, keys + pool)]
    return np.concatenate([marker, *parts], axis=1)


def sow(
    row: dict[str, torch.Tensor], rng: np.random.Generator, pairs: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Overwrite up to ``pairs`` needles and their questions in a row of :class:`PackedTokens`.

    Returns:
        Where needles and questions start (n, 2), both of a pair in one document, and what they are (n, SIZE).
    """
    input_ids, labels = (row[name].numpy() for name in ("input_ids", "labels"))  # the memory of the tensors
    slots = len(input_ids) // SLOT
    # More than are wanted, as some fall on one another or into two documents.
    distance = np.exp(rng.uniform(0, math.log(slots), 4 * pairs)).astype(np.int64)
    asked = rng.integers(distance, slots)
    slot = np.stack([asked - distance, asked], axis=1)
    starts = slot * SLOT + rng.integers(SLOT - SIZE + 1, size=slot.shape)
    first = np.zeros(slot.size, dtype=bool)
    first[np.unique(slot, return_index=True)[1]] = True
    # Every document and the padding begin with an ignored label: without one in between, all is of one document.
    ignored = np.concatenate([[0], np.cumsum(labels == IGNORED)])
    together = ignored[starts[:, 0]] == ignored[starts[:, 1] + SIZE]
    starts = starts[first.reshape(slot.shape).all(axis=1) & together][:pairs]
    made = needles(rng, pairs, vocab_size)[: len(starts)]
    where = starts[:, :, None] + np.arange(SIZE)
    input_ids[where] = labels[where] = made[:, None]
    return starts, made


class Sown:
    """Rows with needles, the first of them cut into short texts of which each has its own; a row is always the same.

    Without texts of 64 tokens at first nobody learnt what a needle is in two thousand steps, full attention included.

    Args:
        data: rows of T tokens.
        count: how many, in a random order that follows from the seed.
        pairs: needles and questions of a whole row.
        stages: tokens of a short text, T / short of them in a row, and rows that are cut so, one after the other.
        density: tokens of a short text for each needle with its question, ten of them.
    """

    def __init__(
        self, data: PackedTokens, seed: int, count: int, pairs: int, stages: list[tuple[int, int]], density: int
    ):
        for length, _ in stages:
            if data.row_length % length:
                raise ValueError(f"rows of {data.row_length:,} are cut into texts of {length:,}, expected a divisor")
        orders = [np.random.default_rng([seed, i]).permutation(len(data)) for i in range(-(-count // len(data)))]
        self.data, self.seed, self.order = data, seed, np.concatenate(orders)[:count]
        of_stages = [(length, max(1, length // density)) for length, rows in stages for _ in range(rows)]
        self.texts = of_stages + [(data.row_length, pairs)] * (count - len(of_stages))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """(1, T), or (T / short, short)."""
        row, rng = self.data[int(self.order[index])], np.random.default_rng([self.seed, index])
        length, pairs = self.texts[index]
        texts = {name: x.view(-1, length).clone() for name, x in row.items()}
        positions = texts["position_ids"]
        begun = (positions == torch.arange(length) + positions[:, :1]).cumprod(-1).bool()
        texts["position_ids"] = torch.where(begun, torch.arange(length), positions)  # what is cut off begins anew
        for i in range(len(positions)):
            sow({name: x[i] for name, x in texts.items()}, rng, pairs, self.data.manifest["vocab_size"])
        return texts


def haystack(row: np.ndarray, length: int, rng: np.random.Generator, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """A cut of a row, a needle at each depth and all questions at its end: ids (length,), where the questions start."""
    offset = rng.integers(len(row) - length + 1)
    ids, made = row[offset : offset + length].copy(), needles(rng, len(DEPTHS), vocab_size)
    end = length - len(DEPTHS) * SIZE
    starts = np.round((1 - np.array(DEPTHS)) * (end - SIZE)).astype(np.int64)
    asked = end + SIZE * rng.permutation(len(DEPTHS))
    for where in (starts, asked):
        ids[where[:, None] + np.arange(SIZE)] = made
    return ids, asked


def recalled(model: Any, ids: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of haystacks (B, T) and starts of questions (B, N): whether the greedy value is right, and nats a token of it.

    The second token is predicted behind the right first one, which is what greedy decoding has there if it was right.
    """
    at = (asked[:, :, None] + torch.arange(2, SIZE - 1, device=ids.device)).flatten(1)  # (B, 2 N)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    picked = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
    logits, wanted = model.lm_head(picked).float(), ids.gather(1, at + 1)
    nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(*asked.shape, 2)
    return (logits.argmax(-1) == wanted).view(*asked.shape, 2).all(-1), nats.mean(-1)
