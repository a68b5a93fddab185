"""Which token sequences are computed together, so that what they have in common is computed once.

Requests of an evaluation have much in common. The endings of one question stand behind the same context: they go into
one **row**, the *trunk* that they share once, and side by side behind it the *tails* in which they differ. The
questions of one subject stand behind the same examples: such rows form a **group**, whose *prefix* is computed once.
Both are read from the tokens alone: sort the sequences, and whatever begins alike stands together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

# Tails cost attention to each other that a mask throws away again, so they may not outgrow what sharing saves: together
# at most so many tokens, or as many as the trunk if that is longer.
TAILS = 256
# A group pays if it saves so many tokens and this share of what its rows hold: it costs a pass of its own, and splits
# batches.
SAVED_TOKENS, SAVED_SHARE = 512, 0.2
# Rows of a batch that share a prefix hold it once each. They may hold this times the tokens that they compute.
HELD_PER_COMPUTED = 4


@dataclass
class Sequence:
    """Input tokens, and what is asked about them.

    Attributes:
        ids: (n,) int32, n ≥ 1.
        asks: pairs (request, continuation), continuation (m,) int32 being what inputs n − m … n − 1 should predict.
            Continuations that differ in the last token only (" A", " B") have the same inputs.
    """

    ids: np.ndarray
    asks: list[tuple[int, np.ndarray]] = field(default_factory=list)

    @property
    def first(self) -> int:
        """The first input whose prediction is asked for."""
        return len(self.ids) - max(len(continuation) for _, continuation in self.asks)


@dataclass
class Row:
    """Sequences whose first ``trunk`` tokens are the same; a single one is all trunk."""

    trunk: int
    branches: list[Sequence]

    @property
    def tails(self) -> int:
        """Tokens behind the trunk."""
        return sum(len(sequence.ids) - self.trunk for sequence in self.branches)

    @property
    def first(self) -> int:
        """The first position whose prediction is asked for."""
        return min(sequence.first for sequence in self.branches)


@dataclass
class Group:
    """Rows that begin with the same ``prefix`` (p,) int32, which may be empty, in the batches they are computed in.

    p is at most the first position that any of the rows is asked about, so the prefix itself predicts nothing.
    """

    prefix: np.ndarray
    batches: list[list[Row]]


def sequences_of(pairs: Iterable[tuple[ArrayLike, ArrayLike]], max_length: int) -> list[Sequence]:
    """Pairs (context, continuation) of token ids → the different sequences of inputs among them, in sorted order.

    Inputs are context and continuation less the last token, cut on the left to ``max_length``. A request's number is
    its place in ``pairs``.

    Raises:
        ValueError: for an empty context or continuation, or a continuation longer than ``max_length``.
    """
    found: dict[bytes, Sequence] = {}
    for request, pair in enumerate(pairs):
        context, continuation = (np.asarray(ids, dtype=np.int32) for ids in pair)
        if not len(context) or not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"request {request} has {len(context)} tokens of context and {len(continuation)} of continuation, "
                f"expected at least one of each and a continuation of at most max_length = {max_length}"
            )
        tokens = np.concatenate([context, continuation])[-(max_length + 1) :]
        # Big-endian bytes sort as the numbers do.
        key = tokens[:-1].astype(">i4").tobytes()
        sequence = found.get(key)
        if sequence is None:
            sequence = found[key] = Sequence(tokens[:-1])
        sequence.asks.append((request, tokens[-len(continuation) :]))
    return [found[key] for key in sorted(found)]


def plan(
    sequences: list[Sequence], tokens_per_batch: int, share_up_to: int | None, equal_beyond: float = math.inf
) -> list[Group]:
    """What to compute in which order: the longest first, so that the time left is not underestimated.

    Args:
        sequences: as :func:`sequences_of` gives them.
        tokens_per_batch: input tokens of a batch with its padding, at most, unless a single row is longer.
        share_up_to: sequences longer than this are computed alone, one a row; 0 for all of them.
        equal_beyond: rows longer than this share a batch with rows of the same length only.
    """
    sharing = [s for s in sequences if share_up_to is None or len(s.ids) <= share_up_to]
    alone = [Row(len(s.ids), [s]) for s in sequences if share_up_to is not None and len(s.ids) > share_up_to]
    rows = list(_rows(sharing))
    groups = []
    for depth, left, right in _groups(rows):
        members = rows[left : right + 1]
        if depth:
            prefix = members[0].branches[0].ids[:depth]
            groups.append(Group(prefix, _batches(members, depth, tokens_per_batch, equal_beyond)))
        else:
            alone += members
    if alone:
        groups.append(Group(np.zeros(0, dtype=np.int32), _batches(alone, 0, tokens_per_batch, equal_beyond)))
    return sorted(groups, key=lambda group: -max(row.trunk for row in group.batches[0]))


def _rows(sequences: list[Sequence]) -> Iterator[Row]:
    """Sorted sequences → the largest sets of neighbours for which sharing a trunk pays, in the same order."""
    lengths = np.array([len(s.ids) for s in sequences], dtype=np.int64)
    total = np.concatenate([[0], lengths.cumsum()])
    end_of = {i: (i, len(s.ids)) for i, s in enumerate(sequences)}  # first of a row → last, trunk
    for depth, left, right in _alike([s.ids for s in sequences]):
        count = right - left + 1
        tails = int(total[right + 1] - total[left]) - count * depth
        saved = (count - 1) * depth
        if tails <= max(TAILS, depth) and 4 * saved >= tails:
            end_of[left] = right, depth  # a larger set comes after all that it holds
    left = 0
    while left < len(sequences):
        right, trunk = end_of[left]
        yield Row(trunk, sequences[left : right + 1])
        left = right + 1


def _groups(rows: list[Row]) -> list[tuple[int, int, int]]:
    """Sorted rows → disjoint (prefix length, first, last) that cover them, with the most tokens saved."""
    held = np.concatenate([[0], np.cumsum([row.trunk + row.tails for row in rows], dtype=np.int64)])
    first = [min(row.first, row.trunk - 1) for row in rows]
    # What was found so far, from left to right: (first, last, tokens saved, groups inside).
    done: list[tuple[int, int, int, list[tuple[int, int, int]]]] = []
    for depth, left, right in _alike([row.branches[0].ids[: row.trunk] for row in rows]):
        inside: list[tuple[int, int, int]] = []
        saved_inside = 0
        while done and done[-1][0] >= left:
            _, _, saved, groups = done.pop()
            saved_inside += saved
            inside = groups + inside
        depth = min(depth, *first[left : right + 1])
        saved = depth * (right - left)
        pays = saved >= SAVED_TOKENS and saved >= SAVED_SHARE * (held[right + 1] - held[left])
        if pays and saved > saved_inside:
            inside, saved_inside = [(depth, left, right)], saved
        done.append((left, right, saved_inside, inside))
    groups = [group for _, _, _, inside in done for group in inside]
    free, covered = 0, []
    for depth, left, right in [*groups, (0, len(rows), len(rows))]:
        if free < left:
            covered.append((0, free, left - 1))
        if left < len(rows):
            covered.append((depth, left, right))
        free = right + 1
    return covered


def _alike(sequences: list[np.ndarray]) -> Iterator[tuple[int, int, int]]:
    """Sorted sequences → (length, first, last) of all maximal runs that begin alike, the inner before the outer."""
    open_runs: list[tuple[int, int]] = []  # (length, first), ever longer
    for i in range(1, len(sequences) + 1):
        length = common_length(sequences[i - 1], sequences[i]) if i < len(sequences) else -1
        left = i - 1
        while open_runs and open_runs[-1][0] > length:
            depth, left = open_runs.pop()
            yield depth, left, i - 1
        if length > 0 and (not open_runs or open_runs[-1][0] < length):
            open_runs.append((length, left))


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    shorter = min(len(a), len(b))
    differing = a[:shorter] != b[:shorter]
    return int(differing.argmax()) if differing.any() else shorter


def _batches(rows: list[Row], prefix: int, tokens_per_batch: int, equal_beyond: float) -> list[list[Row]]:
    """Rows in batches of little padding, the longest first."""

    def order(row: Row) -> tuple[int, int, int]:
        longest = max(len(s.ids) for s in row.branches)
        if longest > equal_beyond:
            return -(1 << 40), -longest, 0
        # Trunks that differ by less than 5 % may stand in the order of their tails, which are padded on their own.
        return -int(16 * math.log2(row.trunk)), -row.tails, -row.trunk

    batches: list[list[Row]] = []
    trunk = tails = longest = 0
    for row in sorted(rows, key=order):
        size = len(batches[-1]) + 1 if batches else 1
        own = max(len(s.ids) for s in row.branches)
        more_trunk, more_tails = max(trunk, row.trunk - prefix), max(tails, row.tails)
        computed = size * (more_trunk + more_tails)
        fits = computed <= tokens_per_batch and (
            not prefix or size * (prefix + more_trunk + more_tails) <= HELD_PER_COMPUTED * tokens_per_batch
        )
        if not batches or not fits or (max(longest, own) > equal_beyond and own != longest):
            batches.append([])
            trunk = tails = longest = 0
            more_trunk, more_tails = row.trunk - prefix, row.tails
        batches[-1].append(row)
        trunk, tails, longest = more_trunk, more_tails, max(longest, own)
    return batches
