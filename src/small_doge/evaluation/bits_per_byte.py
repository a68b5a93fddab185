"""Bits per byte: how many bits a language model needs for each byte of text it has never seen.

    bits per byte = - sum over tokens of log2 p(token | what came before) / UTF-8 bytes of the text

The sum counts tokens and the divisor counts bytes, so models with different vocabularies, and compressors, can be
compared; a loss per token cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    import torch

    from .expert_use import ExpertUse

# Logits of one batch: 2**27 numbers are 512 MiB in float32. A batch is made smaller to stay below, never empty.
MAX_LOGITS = 1 << 27
# Log-probabilities are taken for this many logits at a time: 2**24 numbers, 64 MiB in float32.
LOGITS_PER_CHUNK = 1 << 24


@dataclass(frozen=True)
class BitsPerByte:
    """What a model needed for a text.

    Attributes:
        nats: minus the sum of the natural logarithms of the tokens' probabilities.
        tokens: how many tokens were predicted: all but the first of each document.
        bytes: UTF-8 bytes of the documents.
        bits_per_byte: nats / ln 2 / bytes.
    """

    nats: float
    tokens: int
    bytes: int
    bits_per_byte: float


class Window(NamedTuple):
    """Inputs ``begin … end - 1`` of one document, of which those from ``scored`` on predict a token that counts."""

    document: int
    begin: int
    end: int
    scored: int


def windows_of(document: int, length: int, context_length: int) -> Iterator[Window]:
    """Cut a document of ``length`` tokens into windows of at most ``context_length`` inputs, half overlapping.

    Input i predicts token i + 1, so there are length - 1 inputs. Each is scored in exactly one window; in all windows
    but the first it has at least ``context_length // 2`` inputs before it.
    """
    stride = max(1, context_length // 2)
    begin, scored = 0, 0
    while scored < length - 1:
        end = min(begin + context_length, length - 1)
        yield Window(document, begin, end, scored)
        begin, scored = begin + stride, end


def bits_per_byte(
    model: Any,
    documents: Iterable[Any],
    document_bytes: int,
    context_length: int,
    batch_size: int = 8,
    device: Any = None,
    progress: Callable[[int, int], None] | None = None,
    expert_use: ExpertUse | None = None,
) -> BitsPerByte:
    """Measure a causal language model on whole documents, exactly.

    Each document is ``[bos] t1 … tn [eos]``; every token after ``bos``, ``eos`` included, is predicted once, from the
    tokens of its own document. Documents longer than ``context_length`` are read in windows that overlap by half.

    Args:
        model: any transformers causal language model; its mode (training or evaluation) is put back afterwards.
        documents: token ids of each document, one-dimensional, at least 2 long.
        document_bytes: UTF-8 bytes of the text of all documents, special tokens not counted.
        context_length: the most tokens the model reads at once, at least 1.
        batch_size: windows per call of the model, at most; fewer where the logits would exceed 512 MiB.
        device: where to run; None leaves the model where it is.
        progress: called with (tokens done, tokens in all) after each batch.
        expert_use: counts, of a model with experts, those of every token that predicts one; it changes no figure.

    Returns:
        Sums in float64 of log-probabilities taken from logits of float32 (or the model's own type if wider).

    Raises:
        UserError: if there is no document or no byte to measure.
        ValueError: for a document of fewer than 2 tokens, or a context length or batch size below 1.
    """
    import torch

    if context_length < 1 or batch_size < 1:
        raise ValueError(f"context_length {context_length} and batch_size {batch_size} must be at least 1")
    texts = [np.asarray(document, dtype=np.int64) for document in documents]
    if not texts or document_bytes < 1:
        raise UserError(f"nothing to evaluate: {len(texts)} documents of {document_bytes} bytes in all")
    for index, text in enumerate(texts):
        if text.ndim != 1 or len(text) < 2:
            raise ValueError(f"document {index} has shape {text.shape}, expected at least 2 token ids in one dimension")

    # Longest first: windows of like length share a batch with little padding, and memory runs out at once or never.
    windows = [w for i, text in enumerate(texts) for w in windows_of(i, len(text), context_length)]
    windows.sort(key=lambda w: w.begin - w.end)
    total = sum(len(text) - 1 for text in texts)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    was_training = model.training
    model.to(device).eval()
    nats, done = 0.0, 0
    try:
        with torch.no_grad():
            for batch in _batches(windows, batch_size, model.config.vocab_size):
                log_probabilities = _score(model, batch, texts, device, expert_use)
                nats -= float(log_probabilities.double().sum())
                done += len(log_probabilities)
                if progress is not None:
                    progress(done, total)
    finally:
        model.train(was_training)
    return BitsPerByte(nats, done, document_bytes, nats / math.log(2) / document_bytes)


def _batches(windows: list[Window], batch_size: int, vocab_size: int) -> Iterator[list[Window]]:
    """Consecutive windows, at most ``batch_size`` of them and at most MAX_LOGITS logits (windows are longest first)."""
    begin = 0
    while begin < len(windows):
        longest = windows[begin].end - windows[begin].begin
        size = max(1, min(batch_size, MAX_LOGITS // (longest * vocab_size)))
        yield windows[begin : begin + size]
        begin += size


def _score(
    model: Any, batch: list[Window], texts: list[np.ndarray], device: torch.device, expert_use: ExpertUse | None
) -> torch.Tensor:
    """Log-probabilities of the tokens that count in a batch of windows: one dimension, float64, on the CPU."""
    import torch

    longest = max(w.end - w.begin for w in batch)
    # Padding is on the right, so positions count from 0 by themselves. Any id will do: masked, and never scored.
    inputs = np.zeros((len(batch), longest), dtype=np.int64)
    targets = np.zeros_like(inputs)
    mask = np.zeros_like(inputs)
    counts = np.zeros(inputs.shape, dtype=bool)
    for row, w in enumerate(batch):
        size = w.end - w.begin
        inputs[row, :size] = texts[w.document][w.begin : w.end]
        targets[row, :size] = texts[w.document][w.begin + 1 : w.end + 1]
        mask[row, :size] = 1
        counts[row, w.scored - w.begin : size] = True

    output = model(
        input_ids=torch.from_numpy(inputs).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        use_cache=False,
        **({"output_router_logits": True} if expert_use is not None else {}),
    )
    logits = output.logits
    where = torch.from_numpy(np.flatnonzero(counts)).to(device)
    if expert_use is not None:
        expert_use.add(output.router_logits, where)
    wanted = torch.from_numpy(targets[counts]).to(device)
    flat = logits.view(-1, logits.shape[-1])
    found = []
    step = max(1, LOGITS_PER_CHUNK // logits.shape[-1])
    for rows, ids in zip(where.split(step), wanted.split(step), strict=True):
        chunk = flat[rows]
        chunk = chunk.to(torch.promote_types(chunk.dtype, torch.float32))
        picked = chunk.gather(1, ids[:, None])[:, 0] - chunk.logsumexp(dim=1)
        found.append(picked.cpu().double())  # on the CPU, because some accelerators have no float64
    return torch.cat(found)
