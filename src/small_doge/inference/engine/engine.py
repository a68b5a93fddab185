"""The engine: a packed model, the threads that run it, and texts in progress."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ...errors import UserError
from .jit import is_compiled
from .layout import (
    COLUMNS,
    DOWN,
    EMBED,
    EXPERT_IN,
    EXPERT_OUT,
    GATE_UP,
    HEAD,
    MATRICES,
    NORM,
    OUT,
    PARTS,
    QKV,
    ROUTER,
    ROWS,
    TOKENS_AT_ONCE,
    Shape,
    Slots,
    Work,
    padded,
)
from .pack import BFLOAT16, FLOAT32, PRECISIONS, Packed
from .sampling import GREEDY, Sampling, choose
from .step import REGIONS
from .threads import Crew, available_cores, lead
from .weights import open_weights

_COLDEST = 1e-3  # a temperature
_MATRIX_NAMES = {
    "qkv": QKV,
    "out": OUT,
    "gate_up": GATE_UP,
    "down": DOWN,
    "router": ROUTER,
    "expert_in": EXPERT_IN,
    "expert_out": EXPERT_OUT,
}
_VECTOR_NAMES = "norm q_norm k_norm A dt dt_bias qkv_bias out_bias keep norm_2 gate_up_bias down_bias keep_2".split()


class Engine:
    """Runs one Doge model on a CPU, in jitted code. Several threads may use one engine; its steps come one at a time.

    Args:
        packed: its weights.
        threads: that compute together; by default as many as this process has cores, 8 at most.
        cache_precision: of keys and values: ``float32``, or ``bf16``, which is the default for any weights but float32.
    """

    def __init__(self, packed: Packed, threads: int | None = None, cache_precision: str | None = None):
        if threads is not None and threads < 1:
            raise UserError(f"threads is {threads}, expected at least 1")
        self.packed, self.model = packed, packed.header["model"]
        self.precision = packed.precision
        self.threads = threads or min(available_cores(), 8)
        wide = (cache_precision or ("float32" if self.precision == "float32" else "bf16")) == "float32"
        integers = PRECISIONS[self.precision] > BFLOAT16
        kinds = {"cache_kind": FLOAT32 if wide else BFLOAT16, "integers": int(integers)}
        self.shape = _shape(self.model, **kinds)
        self.eos: list[int] = self.model["eos"]
        self._frequencies = np.array(self.model["frequencies"], np.float32)
        self._table = _table(packed, self.shape)
        floats = packed.data.view(np.float32)
        self._work = _work_space(self.shape, self.threads)
        self._crew = Crew(self.threads, (self.shape, self._table, floats), self._work)
        self._lock = threading.Lock()
        self._texts = 0
        weakref.finalize(self, self._crew.close)

    @classmethod
    def open(cls, folder: str | os.PathLike, precision: str = "auto", threads: int | None = None) -> Engine:
        """The engine of a model folder, or of one that ``doge quantize`` wrote.

        Where it has not been compiled for this processor yet, that is done now, and a line on stderr says so.

        Args:
            folder: as for :func:`small_doge.inference.engine.weights.open_weights`, which says what is refused.
            precision: float32, bf16, int8, int4, or auto: as the weights are stored.
        """
        engine = cls(open_weights(folder, precision), threads)
        if not is_compiled(lead):
            print("compiling the engine for this processor, once: about half a minute", file=sys.stderr, flush=True)
            engine.warm()
        return engine

    def session(self) -> Session:
        """A new, empty text."""
        return Session(self)

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The logits after each token of a text: (T,) → (T, vocabulary), float32."""
        return self.session().feed(ids, every=True)

    def generate(self, ids: Sequence[int] | np.ndarray, **options: Any) -> Iterator[int]:
        """Continue a text; the options are those of :meth:`Session.generate`."""
        return self.session().generate(ids, **options)

    def warm(self) -> None:
        """Compile what this machine has not compiled yet, and read the weights, before somebody waits for a token."""
        for _ in self.generate((0, 0), max_new_tokens=2, sampling=Sampling(temperature=1.0), stop=(), seed=0):
            pass

    def close(self) -> None:
        """Let the helping threads go. The engine still works, with the one that calls it."""
        self._crew.close()

    def check(self, ids: Iterable[int] | np.ndarray) -> np.ndarray:
        """Token ids as (T,) int64.

        Raises:
            UserError: if one is outside of the vocabulary.
        """
        array = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids, dtype=np.int64)
        bad = array[(array < 0) | (array >= self.shape.vocabulary)]
        if array.ndim != 1 or len(bad):
            found = f"token {bad[0]}" if len(bad) else f"an array of shape {array.shape}"
            raise UserError(f"found {found}, expected a list of token ids from 0 to {self.shape.vocabulary - 1}")
        return array

    def _run(self, session: Session, ids: np.ndarray, past: int, outputs: int) -> np.ndarray:
        """One step; returns a view of the logits that the next step writes over."""
        self._crew.run(ids, past, outputs, session.slots, session.number, self._frequencies, self.model["rope_scaling"])
        return self._work.logits[:outputs]

    def _number(self) -> int:
        with self._lock:
            self._texts += 1
            return self._texts


class Session:
    """A text in progress: what its tokens left in the slots. Its size does not change, however long it becomes.

    Attributes:
        seen: tokens that have come.
        slots: keys, values, scores and ranks.
    """

    def __init__(self, engine: Engine):
        self.engine, self.number = engine, engine._number()
        self.slots = _slots(engine.shape)
        self.used = np.zeros(engine.shape.vocabulary, np.uint8)
        self.seen = 0
        self._after: np.ndarray | None = None  # logits after the last token

    @property
    def nbytes(self) -> int:
        """Bytes held for this text; constant."""
        return sum(x.nbytes for x in self.slots) + self.used.nbytes

    def feed(self, ids: Sequence[int] | np.ndarray, every: bool = False) -> np.ndarray:
        """Take tokens in; returns the logits after the last, (vocabulary,), or after every one, (T, vocabulary).

        Raises:
            UserError: for no token, or one outside of the vocabulary.
        """
        engine, tokens = self.engine, self.engine.check(ids)
        if not len(tokens):
            raise UserError("found no tokens, expected at least one")
        room, kept, first = engine.shape.window + engine.shape.local_window, [], 0
        while first < len(tokens):
            some = min(TOKENS_AT_ONCE, len(tokens) - first)
            if self.seen < room:  # a step either fills slots or replaces keys, not both
                some = min(some, room - self.seen)
            outputs = some if every else int(first + some == len(tokens))
            with engine._lock:
                logits = engine._run(self, tokens[first : first + some], self.seen, outputs)
                kept.append(logits.copy())
            self.seen += some
            first += some
        self.used[tokens] = 1
        self._after = kept[-1][-1]
        return np.concatenate(kept) if every else self._after

    def generate(
        self,
        ids: Sequence[int] | np.ndarray = (),
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        seed: int | None = None,
        stop: Iterable[int] | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> Iterator[int]:
        """Take ``ids`` in, then yield one token after another.

        A token has been taken in when the next one is asked for; the last one yielded has not, nor has a ``stop``
        token, which is yielded too.

        Args:
            ids: tokens to take in first; may be empty if others came before.
            max_new_tokens: at most.
            sampling: how tokens are chosen, by default the likeliest.
            seed: makes sampling repeatable.
            stop: tokens to end after; by default those that end a text of this model.
            stopped: asked before each token; True ends the text.
        """
        engine = self.engine
        ends = set(engine.eos if stop is None else stop)
        random = np.random.default_rng(seed)
        space = np.empty(engine.shape.vocabulary, np.float32)
        # Colder than this the likeliest token is certain anyway, and the quotients would overflow.
        temperature = float(sampling.temperature) if sampling.temperature >= _COLDEST else 0.0
        options = (temperature, sampling.top_k, float(sampling.top_p))
        options += (float(sampling.repetition_penalty),)  # type: ignore[assignment]
        if len(ids):
            self.feed(ids)
        if self._after is None:
            raise UserError("found no tokens, expected at least one")
        logits = self._after
        for i in range(max_new_tokens):
            if stopped is not None and stopped():
                return
            uniform = random.random() if temperature else 0.0
            token = int(choose(logits, self.used, *options, uniform, space))
            yield token
            if token in ends or i + 1 == max_new_tokens:
                return
            logits = self.feed((token,))


def _shape(model: dict[str, Any], **kinds: int) -> Shape:
    names = "layers C H G M D inner vocabulary window local_window keys experts eps".split()
    known = {name: model[name] for name in names}
    return Shape(
        **known,
        lifetime=np.float32(model.get("lifetime", 0.0)),  # packed files of before have none
        C_padded=padded(model["C"]),
        D_padded=padded(model["D"]),
        inner_padded=padded(model["inner"]),
        slots=padded(model["window"] + model["local_window"]),
        **kinds,
    )


def _table(packed: Packed, shape: Shape) -> np.ndarray:
    """Addresses of matrices and places of vectors, (layers + 1, COLUMNS) int64; see ``layout``."""
    table = np.full((shape.layers + 1, COLUMNS), -1, np.int64)
    base, tensors = packed.data.ctypes.data, packed.header["tensors"]

    def matrix(row: int, place: int, entry: dict[str, Any]) -> None:
        table[row, 3 * place : 3 * place + 3] = base + entry["at"], base + entry.get("scales", (0,))[0], entry["kind"]

    for name, entry in tensors.items():
        layer, _, short = name.rpartition(".")
        row = int(layer) if layer else shape.layers
        if short in _MATRIX_NAMES:
            matrix(row, _MATRIX_NAMES[short], entry)
        elif short in _VECTOR_NAMES:
            table[row, 3 * MATRICES + _VECTOR_NAMES.index(short)] = entry["at"] // 4
    matrix(shape.layers, EMBED, tensors["embed"])
    matrix(shape.layers, HEAD, tensors.get("head", tensors["embed"]))
    assert table[shape.layers, NORM] >= 0
    table.flags.writeable = False
    return table


def _slots(shape: Shape) -> Slots:
    L, M, N = shape.layers, shape.M, shape.slots
    size = 4 if shape.cache_kind == FLOAT32 else 2
    return Slots(
        k=np.zeros(L * M * N * shape.D * size, np.uint8),
        v=np.zeros(L * M * N * shape.D_padded * size, np.uint8),
        s=np.full((L, M, N), -np.inf, np.float32),
        ranks=np.zeros((L, M, N), np.int64),
    )


def _work_space(shape: Shape, threads: int) -> Work:
    T, heads = TOKENS_AT_ONCE, shape.H // shape.M

    def floats(*size: int) -> np.ndarray:
        return np.zeros(size, np.float32)

    return Work(
        x=floats(T, shape.C_padded),
        normed=floats(T, shape.C_padded),
        qkv=floats(T, (shape.H + 2 * shape.G) * shape.D),
        q=floats(T, shape.H * shape.D),
        out=floats(T, padded(shape.H * shape.D)),
        inner=floats(T, shape.inner_padded),
        normed16=np.zeros((T, shape.C_padded), np.int16),
        out16=np.zeros((T, padded(shape.H * shape.D)), np.int16),
        inner16=np.zeros((T, shape.inner_padded), np.int16),
        factors=floats(3, T),
        routes=floats(T, 2 * shape.keys),
        chosen=np.zeros((T, shape.experts), np.int64),
        shares=floats(T, shape.experts),
        routed=floats(max(T, 2 * threads), shape.C_padded),
        logits=floats(T, shape.vocabulary),
        seen=floats(threads, heads, shape.slots),
        sums=floats(shape.M, max(T, PARTS), heads, shape.D_padded + 2),
        bias=floats(threads, shape.slots),
        rows=floats(threads, T * ROWS),
        angles=floats(T, 2, shape.D // 2),
        sync=np.zeros((shape.layers * REGIONS + 1) * 16, np.int64),
    )
