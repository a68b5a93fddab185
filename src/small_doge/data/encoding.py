"""Batches of documents to token ids: in this process while a corpus is small, then in processes of its own.

What comes out does not depend on who encodes, nor on how documents fall into batches.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from .documents import Document, digest_of, split_of
from .filters import make_filter
from .tokenizer import encode_text, load_tokenizer, plain_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .rendering import Renderer

BLANK = "blank"
_ALONE_BYTES = 64 << 20
"""Text that this process encodes itself, by threads, before other processes are worth their start."""


@dataclass
class Encoded:
    """A batch in tokens: document i is ``ids[ends[i - 1] : ends[i]]``, from its begin to its end token.

    One that ``dropped`` gives a reason for has none. ``sizes`` are UTF-8 bytes of the text that the tokens hold.
    """

    ids: np.ndarray[Any, Any]
    ends: list[int]
    sizes: list[int]
    sources: list[str]
    digests: list[bytes]
    splits: list[str]
    dropped: list[str | None]


@dataclass(frozen=True)
class Work:
    """What encoding depends on; small enough to be sent to a process once."""

    tokenizer: str
    bos: int
    eos: int
    dtype: str
    validation_fraction: float
    filters: Mapping[str, Any]


class Encoder:
    """Encodes batches one after another. ``encode`` gives the ids of plain texts."""

    def __init__(self, work: Work, encode: Callable[[list[str]], Sequence[Sequence[int]]]) -> None:
        self.work, self.encode = work, encode
        self.fails = make_filter(work.filters)
        self.renderer: Renderer | None = None

    def __call__(self, documents: list[Document]) -> Encoded:
        work, dropped = self.work, [self._reason(document) for document in documents]
        kept = [document for document, reason in zip(documents, dropped, strict=True) if reason is None]
        plain = [document.text for document in kept if document.prompt is None]
        plain_ids = iter(self.encode(plain) if plain else ())
        chats = iter(self._chats([document for document in kept if document.prompt is not None]))
        found = Encoded(np.empty(0), [], [], [document.source for document in documents], [], [], dropped)
        pieces: list[np.ndarray[Any, Any]] = []
        end = 0
        for i, document in enumerate(documents):
            ids: Sequence[int] = ()
            size = 0
            if dropped[i] is None and document.prompt is None:
                ids, size = [work.bos, *next(plain_ids), work.eos], len(document.text.encode())
            elif dropped[i] is None:
                ids, size = next(chats)
                dropped[i] = None if ids else "refused by the chat template"
            pieces.append(np.array(ids, work.dtype))
            end += len(ids)
            found.ends.append(end)
            found.sizes.append(size)
            found.digests.append(digest_of(document) if dropped[i] is None else b"")
            found.splits.append(split_of(document, work.validation_fraction) if dropped[i] is None else "")
        found.ids = np.concatenate(pieces) if pieces else np.empty(0, work.dtype)
        return found

    def _reason(self, document: Document) -> str | None:
        if document.unfit is not None:
            return document.unfit
        if not document.text.strip() or (document.prompt is not None and not document.prompt.strip()):
            return BLANK
        return self.fails(document.text)

    def _chats(self, documents: list[Document]) -> list[tuple[list[int], int]]:
        """Ids and bytes of documents with a prompt, by the tokenizer's own chat template; no ids where it refuses."""
        if not documents:
            return []
        if self.renderer is None:
            from .rendering import require_chat

            self.renderer = require_chat(load_tokenizer(self.work.tokenizer))
        turns = [
            [{"role": "user", "content": d.prompt or ""}, {"role": "assistant", "content": d.text}] for d in documents
        ]
        found: list[tuple[list[int], int]] = []
        for chat, size in zip(self.renderer.encode(turns), self.renderer.sizes(turns), strict=True):
            ids = [] if chat is None else chat.input_ids
            # Templates differ in what stands around a conversation; a document is from begin to end token.
            begin = [self.work.bos] if ids and ids[0] != self.work.bos else []
            end = [self.work.eos] if ids and ids[-1] != self.work.eos else []
            found.append(([*begin, *ids, *end], size))
        return found


class Pool:
    """Encodes batches of documents side by side; leave it with ``with``."""

    def __init__(self, work: Work, tokenizer: PreTrainedTokenizerFast, workers: int) -> None:
        self.work, self.tokenizer, self.workers = work, tokenizer, workers
        self.bytes = 0
        encoder = Encoder(work, lambda texts: encode_text(tokenizer, texts))
        self.encode: Callable[[list[Document]], Encoded] = encoder
        self.executor: Executor = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self.alone = True
        self.others: list[Executor] = [self.executor]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for executor in self.others:
            executor.shutdown(cancel_futures=True)

    @property
    def depth(self) -> int:
        """Batches of one source that are under way at once."""
        return 2 if self.workers == 1 else self.workers + 2

    def submit(self, documents: list[Document]) -> Future[Encoded]:
        """Begin to encode a batch."""
        if self.alone and self.workers > 1 and self.bytes >= _ALONE_BYTES:
            self._start_processes()
        self.bytes += sum(len(document.text) for document in documents)
        try:
            return self.executor.submit(self.encode, documents)
        except BrokenProcessPool:
            raise broken() from None

    def _start_processes(self) -> None:
        import multiprocessing

        text = plain_tokenizer(self.tokenizer).to_str()
        self.executor = ProcessPoolExecutor(
            self.workers, multiprocessing.get_context("spawn"), _begin, (self.work, text)
        )
        self.others.append(self.executor)
        self.encode, self.alone = _encode, False


def broken() -> UserError:
    """What to say when a process of the pool has died."""
    return UserError(
        "a process that encodes ended unexpectedly, from lack of memory or because a script calls `prepare` outside "
        'of `if __name__ == "__main__":`; expected it to live, `workers: 1` does without such processes'
    )


_encoder: Encoder | None = None


def _begin(work: Work, tokenizer: str) -> None:
    """The start of a process that encodes: one thread each, and an end when its parent's comes."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    from multiprocessing import connection, parent_process

    from tokenizers import Tokenizer

    parent = parent_process()
    if parent is not None:
        # A killed parent does not tell its children, and they would wait for work forever.
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True).start()
    plain = Tokenizer.from_str(tokenizer)
    plain.encode_special_tokens = True
    _encoder = Encoder(
        work, lambda texts: [found.ids for found in plain.encode_batch_fast(texts, add_special_tokens=False)]
    )


def _encode(documents: list[Document]) -> Encoded:
    assert _encoder is not None
    return _encoder(documents)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
