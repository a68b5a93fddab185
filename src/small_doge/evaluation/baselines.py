"""What a language model has to beat: a general compressor, and counting.

Both read the same bytes as the model. Neither pays for saying where a document ends, as the model does with ``eos``.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UserError

# Contexts that reach before a document's start are filled with this byte, which UTF-8 never uses. It is only ever part
# of a context, so probabilities still sum to 1 over the 256 bytes, also for text that does contain it.
START = 0xFF
MAX_ORDER = 7  # an order-7 gram is 8 bytes, one 64-bit key

Smoothing = Literal["kneser-ney", "witten-bell"]
Documents = bytes | Iterable[bytes]


def xz_bits_per_byte(held_out: bytes, training: bytes | None = None) -> float:
    """Bits of ``xz -9`` per byte of ``held_out``.

    Without ``training``: 8 · len(xz(held_out)) / len(held_out). With it, the bits that the held-out text adds behind
    the training text, which xz can then copy from as far back as its dictionary of 64 MiB reaches:
    8 · (len(xz(training + held_out)) - len(xz(training))) / len(held_out).

    Takes about 0.7 GB of memory, whatever the size of the text.

    Raises:
        UserError: if ``held_out`` is empty.
    """
    if not held_out:
        raise UserError("nothing to compress: the held-out text has 0 bytes")
    if training is None:
        return 8 * _xz_size(held_out) / len(held_out)
    return 8 * (_xz_size(training + held_out) - _xz_size(training)) / len(held_out)


def _xz_size(data: bytes) -> int:
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9))


def ngram_bits_per_byte(training: Documents, held_out: Documents, order: int = 5) -> float:
    """Bits per byte of an order-n byte model: each byte predicted from the ``order`` bytes before it.

    The counts come from ``training`` alone and stay as they are. The figure is that of the better of two smoothings,
    see :func:`ngram_bits_by_smoothing`.
    """
    return min(ngram_bits_by_smoothing(training, held_out, order).values())


def ngram_bits_by_smoothing(training: Documents, held_out: Documents, order: int = 5) -> dict[Smoothing, float]:
    """Bits per byte of ``held_out`` under an order-``order`` model of ``training``, for each smoothing.

    Args:
        training, held_out: one document, or several. Contexts end at a document's start, which they can see.
        order: length of the longest context in bytes, 0 to 7.

    Raises:
        UserError: if either text is empty or the order is out of range.
    """
    model = NGramModel.fit(training, order)
    grams = _grams(_listed(held_out), order)
    if len(grams) == 0:
        raise UserError("nothing to predict: the held-out text has 0 bytes")
    smoothings: tuple[Smoothing, ...] = ("kneser-ney", "witten-bell")
    return {s: float(-np.log2(model.probabilities(grams, s)).mean()) for s in smoothings}


@dataclass(frozen=True)
class _Level:
    """Counts of all grams of k context bytes and one more byte.

    A gram is one number, oldest byte first, so grams sorted as numbers have those of one context side by side.

    Attributes:
        grams: (n,) uint64, sorted, each once.
        counts: (n,) int64, how often the gram occurs.
        continuations: (n,) int64, before how many different bytes it occurs; equal to ``counts`` at the highest level.
        contexts: (m,) uint64, sorted, the first k bytes of the grams, each once.
        starts: (m,) int64, where each context begins in ``grams``.
    """

    grams: np.ndarray
    counts: np.ndarray
    continuations: np.ndarray
    contexts: np.ndarray
    starts: np.ndarray


class NGramModel:
    """A byte model that mixes contexts of length 0 to ``order``, with p of the empty mixture 1/256.

    Interpolated Witten-Bell, for context c of length k, c' = c without its oldest byte, N(c) its count and T(c) the
    number of different bytes seen after it:

        p_k(x | c) = (count(c x) + T(c) · p_{k-1}(x | c')) / (N(c) + T(c))

    Interpolated modified Kneser-Ney (Chen and Goodman, 1999), with continuation counts below the highest level and
    three discounts D(1), D(2), D(3 and more) a level:

        p_k(x | c) = (count(c x) - D(count(c x)) + (sum of D over the grams of c) · p_{k-1}(x | c')) / N(c)

    A context never seen leaves p_{k-1} as it is.
    """

    def __init__(self, levels: list[_Level]):
        self.levels = levels

    @property
    def order(self) -> int:
        """Length of the longest context, in bytes."""
        return len(self.levels) - 1

    @classmethod
    def fit(cls, training: Documents, order: int = 5) -> NGramModel:
        """Count the grams of ``training``; about 20 bytes of memory for each of its bytes at the peak."""
        if not 0 <= order <= MAX_ORDER:
            raise UserError(f"the order of the n-gram model is {order}, expected 0 to {MAX_ORDER}")
        grams = _grams(_listed(training), order)
        if len(grams) == 0:
            raise UserError("nothing to count: the training text has 0 bytes")
        grams.sort()
        starts = _run_starts(grams)
        counts = np.diff(starts, append=len(grams))
        grams = grams[starts]
        levels = [_level(grams, counts, counts)]
        for k in range(order - 1, -1, -1):
            # A gram of the level below is this one's without the oldest byte. As contexts are filled up before a
            # document's start, every occurrence has an older byte, and nothing is lost on the way down.
            shorter = grams & np.uint64((1 << 8 * (k + 1)) - 1)
            by_gram = np.argsort(shorter, kind="stable")
            shorter = shorter[by_gram]
            starts = _run_starts(shorter)
            continuations = np.diff(starts, append=len(shorter))
            counts = np.add.reduceat(counts[by_gram], starts)
            grams = shorter[starts]
            levels.append(_level(grams, counts, continuations))
        return cls(levels[::-1])

    def probabilities(self, grams: np.ndarray, smoothing: Smoothing) -> np.ndarray:
        """Probability of the last byte of each gram, given its others.

        Args:
            grams: (n,) uint64, ``order`` context bytes, oldest first, then the byte to predict.
            smoothing: which of the two formulas.

        Returns:
            (n,) float64, above 0; over the 256 last bytes of one context they sum to 1.
        """
        p = np.full(len(grams), 1 / 256)
        for k, level in enumerate(self.levels):
            wanted = grams & np.uint64((1 << 8 * (k + 1)) - 1)
            counts = level.counts if smoothing == "witten-bell" else level.continuations
            discounts = _discounts(counts) if smoothing == "kneser-ney" else np.zeros(4)
            discount = discounts[np.minimum(counts, 3)]

            # What a context holds back for the level below: T(c), or the sum of its discounts.
            total = np.add.reduceat(counts, level.starts)
            if smoothing == "witten-bell":
                held_back = np.diff(level.starts, append=len(counts)).astype(np.float64)
                total = total + held_back
            else:
                held_back = np.add.reduceat(discount, level.starts)

            gram, gram_known = _find(level.grams, wanted)
            context, context_known = _find(level.contexts, wanted >> np.uint64(8))
            seen = np.where(gram_known, counts[gram] - discount[gram], 0.0)
            mixed = (seen + held_back[context] * p) / total[context]
            p = np.where(context_known, mixed, p)
        return p


def _level(grams: np.ndarray, counts: np.ndarray, continuations: np.ndarray) -> _Level:
    contexts = grams >> np.uint64(8)
    starts = _run_starts(contexts)
    return _Level(grams, counts, continuations, contexts[starts], starts)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts for a count of 0, 1, 2 and at least 3, by Chen and Goodman's estimate from the counts of counts.

    Where too few grams occur once to four times for the estimate (as with single bytes), half of the count is held
    back, at most 0.75.
    """
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == c)) for c in (1, 2, 3, 4))
    fallback = np.array([0.0, 0.5, 0.75, 0.75])
    if not (n1 and n2 and n3):
        return fallback
    y = n1 / (n1 + 2 * n2)
    found = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # A discount of 0 would leave nothing for bytes not seen yet.
    return np.where((found > 0.05) & (found <= [0, 1, 2, 3]), found, fallback)


def _run_starts(ordered: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins in a sorted, non-empty array."""
    return np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))


def _find(ordered: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each wanted value an index into the sorted array, and whether the value is there."""
    at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return at, ordered[at] == wanted


def _listed(documents: Documents) -> list[bytes]:
    return [documents] if isinstance(documents, (bytes, bytearray)) else list(documents)


def _grams(documents: list[bytes], order: int) -> np.ndarray:
    """Every byte behind the ``order`` bytes before it, START where its document has none: (n,) uint64."""
    fill = bytes([START]) * order
    text = np.frombuffer(fill + fill.join(documents), dtype=np.uint8)
    grams = np.zeros(len(text) - order, dtype=np.uint64)
    for back in range(order, -1, -1):
        grams <<= np.uint64(8)
        grams |= text[order - back : len(text) - back]
    # The bytes of document i stand at its offset plus i fills; the fills themselves are not predicted.
    lengths = np.array([len(d) for d in documents], dtype=np.int64)
    predicted = np.ones(len(grams), dtype=bool)
    ends = np.cumsum(lengths + order)[:-1] - order
    predicted[(ends[:, None] + np.arange(order)).ravel()] = False
    return grams[predicted]
