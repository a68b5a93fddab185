import itertools
import lzma
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from small_doge.errors import UserError
from small_doge.evaluation.baselines import (
    START,
    NGramModel,
    _discounts,
    ngram_bits_by_smoothing,
    ngram_bits_per_byte,
    xz_bits_per_byte,
)

few_bytes = st.lists(st.sampled_from(b"ab \n\xff\x00"), max_size=40).map(bytes)
texts = st.lists(few_bytes, min_size=1, max_size=4)


class Counted:
    """The formulas of NGramModel again, with dictionaries and one byte at a time."""

    def __init__(self, documents, order):
        self.order = order
        self.counts = [defaultdict(Counter) for _ in range(order + 1)]
        older = [defaultdict(set) for _ in range(order + 1)]
        for document in documents:
            text = bytes([START]) * order + document
            for i, k in itertools.product(range(order, len(text)), range(order + 1)):
                context = text[i - k : i]
                self.counts[k][context][text[i]] += 1
                if k < order:
                    older[k][context, text[i]].add(text[i - k - 1])
        self.kneser_ney = [defaultdict(Counter) for _ in range(order + 1)]
        self.kneser_ney[order] = self.counts[order]
        for k in range(order):
            for (context, byte), before in older[k].items():
                self.kneser_ney[k][context][byte] = len(before)
        self.discounts = [
            _discounts(np.array([c for counter in level.values() for c in counter.values()]))
            for level in self.kneser_ney
        ]

    def probability(self, context, byte, smoothing):
        p = 1 / 256
        for k in range(self.order + 1):
            table = (self.counts if smoothing == "witten-bell" else self.kneser_ney)[k]
            counter = table.get(context[len(context) - k :])
            if counter is None:
                continue
            total = sum(counter.values())
            if smoothing == "witten-bell":
                p = (counter[byte] + len(counter) * p) / (total + len(counter))
            else:
                d = {b: self.discounts[k][min(c, 3)] for b, c in counter.items()}
                p = (counter[byte] - d.get(byte, 0) + sum(d.values()) * p) / total
        return p


@pytest.mark.parametrize("smoothing", ["kneser-ney", "witten-bell"])
@settings(max_examples=60, deadline=None)
@given(training=texts.filter(lambda t: any(t)), held_out=texts.filter(lambda t: any(t)), order=st.integers(0, 7))
def test_ngram_equals_counting_one_byte_at_a_time(training, held_out, order, smoothing):
    counted = Counted(training, order)
    bits = 0.0
    for document in held_out:
        text = bytes([START]) * order + document
        for i in range(order, len(text)):
            bits -= math.log2(counted.probability(text[i - order : i], text[i], smoothing))
    expected = bits / sum(map(len, held_out))
    assert ngram_bits_by_smoothing(training, held_out, order)[smoothing] == pytest.approx(expected, rel=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    training=texts.filter(lambda t: any(t)),
    order=st.integers(0, 7),
    smoothing=st.sampled_from(["kneser-ney", "witten-bell"]),
    data=st.data(),
)
def test_probabilities_of_the_256_bytes_sum_to_one(training, order, smoothing, data):
    context = data.draw(st.one_of(st.binary(min_size=order, max_size=order), few_bytes.map(lambda b: b[:order])))
    context = context.rjust(order, bytes([START]))
    first = int.from_bytes(context + b"\0", "big")
    grams = np.arange(256, dtype=np.uint64) + np.uint64(first)
    p = NGramModel.fit(training, order).probabilities(grams, smoothing)
    assert (p > 0).all()
    assert p.sum() == pytest.approx(1, abs=1e-12)


def test_contexts_do_not_cross_the_start_of_a_document():
    training = [b"abcabcabc", b"hello"]
    apart = [ngram_bits_by_smoothing(training, document) for document in (b"abc", b"hel")]
    for smoothing, bits in ngram_bits_by_smoothing(training, [b"abc", b"hel"]).items():
        assert bits == pytest.approx((apart[0][smoothing] + apart[1][smoothing]) / 2)


def test_ngram_learns_what_repeats_and_is_never_infinite():
    training = [b"def f(x):\n    return x\n"] * 50
    assert ngram_bits_per_byte(training, b"def f(x):\n    return x\n") < 0.2
    unseen = ngram_bits_by_smoothing(training, bytes(range(256)))
    assert all(7 < bits < 20 for bits in unseen.values())


def test_xz_is_the_size_of_the_file_xz_writes():
    text = b"".join(b"line %d\n" % (i * i) for i in range(2000))
    assert xz_bits_per_byte(text) == 8 * len(lzma.compress(text, preset=9)) / len(text)
    # Text that has been seen before costs next to nothing.
    assert xz_bits_per_byte(text, training=text) < xz_bits_per_byte(text) / 10


@pytest.mark.parametrize(
    "call",
    [
        lambda: xz_bits_per_byte(b""),
        lambda: ngram_bits_per_byte(b"", b"a"),
        lambda: ngram_bits_per_byte(b"a", [b"", b""]),
        lambda: ngram_bits_per_byte(b"a", []),
        lambda: ngram_bits_per_byte(b"a", b"a", order=8),
        lambda: ngram_bits_per_byte(b"a", b"a", order=-1),
    ],
)
def test_empty_texts_and_impossible_orders_are_refused(call):
    with pytest.raises(UserError):
        call()
