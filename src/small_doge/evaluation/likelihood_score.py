"""Log-probabilities of continuations, computed as ``likelihood_plan`` lays them out.

A group's prefix is read once into a cache. The trunks of a batch are read behind it, padded on the right, where plain
causality hides the padding. Then the tails of each row are read in one go, side by side: a four-dimensional mask shows
each the prefix, its row's trunk and itself, and their positions all go on from the trunk's last. Only hidden states
that predict a token of a continuation meet the output head.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from .likelihood_plan import Group, Row, Sequence, plan

logger = logging.getLogger(__name__)

# Logits computed at a time: 2**23 numbers, 32 MiB in float32.
LOGITS_PER_CHUNK = 1 << 23
# Where they cannot be, so many of a batch: 512 MiB in float32.
LOGITS_PER_BATCH = 1 << 27
# Two ways of computing the same may differ by this share of the largest logit, from rounding alone.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
ROUNDING_OF_HALVES = 0.1
SAME = 1e-6  # the same operations on the same shapes


class Scorer:
    """Log-probabilities under one model, which is left where it is.

    Attributes:
        shares: whether the model computes with a cache and a mask what it computes without. It is tried once: recurrent
            models do not, nor those whose attention kernel takes no mask. They get one sequence a row.
        splits_head: whether its logits are its output head applied to its base model's output. They are not where
            something is done to the logits afterwards; then all of them are computed.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None = None, tokens_per_batch: int | None = None):
        self.model, self.autocast = model, autocast
        self.device = next(model.parameters()).device
        # Enough to keep the device busy: more costs memory, and padding where lengths vary.
        self.tokens_per_batch = tokens_per_batch or (2048 if self.device.type == "cpu" else 32768)
        self.head = model.get_output_embeddings()
        self.base = model.base_model
        self.shares = self.splits_head = False
        config = model.config.get_text_config()
        self.share_up_to, self.equal_beyond = _limits(config)
        self.additive = getattr(config, "_attn_implementation", None) == "eager"  # it adds its mask to the logits
        with torch.no_grad(), self._precision():
            self._try()
        if not self.shares:
            self.share_up_to = 0
        if not self.splits_head:
            self.tokens_per_batch = max(1, min(self.tokens_per_batch, LOGITS_PER_BATCH // config.vocab_size))

    def run(self, sequences: list[Sequence]) -> Iterator[tuple[int, float, bool]]:
        """Yields (request, log-probability of its continuation, whether greedy decoding gives it), batch by batch.

        Logits are those of the model's dtype, under autocast if that is set; normalised in at least float32 and summed
        in float64.
        """
        for group in plan(sequences, self.tokens_per_batch, self.share_up_to, self.equal_beyond):
            with torch.no_grad(), self._precision():
                prefix = self._read_prefix(group)
            for rows in group.batches:
                with torch.no_grad(), self._precision():
                    found = self._batch(rows, group.prefix, prefix)
                yield from found

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def _read_prefix(self, group: Group) -> DynamicCache | None:
        if not len(group.prefix):
            return None
        cache = DynamicCache()
        self._call(group.prefix[None], past_key_values=cache, use_cache=True)
        return cache

    def _batch(self, rows: list[Row], prefix: np.ndarray, cached: DynamicCache | None) -> list[tuple[int, float, bool]]:
        p = len(prefix)
        trunks = _padded([row.branches[0].ids[p : row.trunk] for row in rows])
        tails = _padded([np.concatenate([s.ids[row.trunk :] for s in row.branches]) for row in rows])
        T, Tt = trunks.shape[1], tails.shape[1]
        cache = None
        if cached is not None:
            cache = _repeated(cached, len(rows))
        elif Tt:
            cache = DynamicCache()
        hidden = [self._call(trunks, past_key_values=cache, use_cache=cache is not None).flatten(0, 1)]
        if Tt:
            mask, positions = self._side_by_side(rows, p, T, Tt)
            out = self._call(tails, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            hidden.append(out.flatten(0, 1))

        # Places in [trunks, tails], flattened, of the positions asked about, and what should come next there.
        where: list[int] = []
        targets: list[tuple[np.ndarray, np.ndarray]] = []  # of each ask: indices into ``where``, and token ids
        requests: list[int] = []
        for r, row in enumerate(rows):
            begin = min(row.first, row.trunk)  # of the part of the trunk that is asked about, by one branch or more
            trunk_at = len(where) - begin
            where += range(r * T + begin - p, r * T + row.trunk - p)
            tail = len(rows) * T + r * Tt
            for sequence in row.branches:
                n, first = len(sequence.ids), max(sequence.first, row.trunk)
                tail_at = len(where) - first
                where += range(tail + first - row.trunk, tail + n - row.trunk)
                tail += n - row.trunk
                for request, continuation in sequence.asks:
                    at = np.arange(n - len(continuation), n)
                    targets.append((at + np.where(at < row.trunk, trunk_at, tail_at), continuation))
                    requests.append(request)
        chosen = torch.cat(hidden)[torch.tensor(where, device=self.device)]
        found, greedy = self._log_probabilities(
            chosen, np.concatenate([at for at, _ in targets]), np.concatenate([ids for _, ids in targets])
        )
        ends = np.cumsum([len(ids) for _, ids in targets])[:-1]
        parts = zip(requests, np.split(found, ends), np.split(greedy, ends), strict=True)
        return [(request, float(part.sum()), bool(best.all())) for request, part, best in parts]

    def _call(self, ids: np.ndarray, **options: Any) -> torch.Tensor:
        """Token ids (B, T) → (B, T, C) hidden states, or (B, T, vocab) logits if the head cannot be split off."""
        inputs = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        if self.splits_head:
            return self.base(input_ids=inputs, **options).last_hidden_state
        return self.model(input_ids=inputs, **options).logits

    def _log_probabilities(
        self, chosen: torch.Tensor, at: np.ndarray, ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of token ``ids`` (K,) after places ``at`` (K,) of ``chosen`` (N, C or vocab): (K,) float64, and whether each
        is the likeliest, (K,) bool.
        """
        order = np.argsort(at, kind="stable")
        step = max(1, LOGITS_PER_CHUNK // int(self.model.config.get_text_config().vocab_size))
        bounds = np.searchsorted(at[order], np.arange(0, len(chosen) + step, step))
        found, best = [], []
        for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
            logits = chosen[i * step : (i + 1) * step]
            if self.splits_head:
                logits = self.head(logits)
            # Writes as many numbers again, and takes half the time of logsumexp on a CPU.
            logits = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            rows = torch.from_numpy(at[order[begin:end]] - i * step).to(self.device)
            wanted = torch.from_numpy(ids[order[begin:end]].astype(np.int64)).to(self.device)
            found.append(logits[rows, wanted])
            best.append(logits.argmax(-1)[rows] == wanted)
        log_probabilities, greedy = np.empty(len(at)), np.empty(len(at), dtype=bool)
        log_probabilities[order] = torch.cat(found).cpu().double().numpy()
        greedy[order] = torch.cat(best).cpu().numpy()
        return log_probabilities, greedy

    def _side_by_side(self, rows: list[Row], p: int, T: int, Tt: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask (B, 1, Tt, p + T + Tt) and positions (B, Tt) of the tails behind trunks padded to T, and a prefix of p.

        The mask is bool, or for attention that adds it, 0 and the smallest number. Every tail's padding sees itself, so
        that its softmax is defined.
        """
        branch = np.full((len(rows), Tt), -1)
        positions = np.zeros((len(rows), Tt), dtype=np.int64)
        for r, row in enumerate(rows):
            begin = 0
            for b, sequence in enumerate(row.branches):
                n = len(sequence.ids) - row.trunk
                branch[r, begin : begin + n] = b
                positions[r, begin : begin + n] = np.arange(row.trunk, row.trunk + n)
                begin += n
        same = (branch[:, :, None] == branch[:, None, :]) & np.tri(Tt, dtype=bool)  # (B, Tt, Tt)
        trunk = np.arange(p + T) < np.array([row.trunk for row in rows])[:, None]  # (B, p + T)
        seen = np.concatenate([np.broadcast_to(trunk[:, None], (len(rows), Tt, p + T)), same], axis=-1)[:, None]
        mask = torch.from_numpy(seen).to(self.device)
        if self.additive:
            dtype = self.model.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask, torch.from_numpy(positions).to(self.device)

    def _try(self) -> None:
        """Set ``splits_head`` and ``shares`` by computing a few tokens in both ways."""
        vocab = int(self.model.config.get_text_config().vocab_size)
        text = (np.arange(1, 13, dtype=np.int32) * 7919) % vocab
        other = np.concatenate([text[:7], text[::-1][:3]])
        whole = self.model(input_ids=torch.from_numpy(text[None].astype(np.int64)).to(self.device), use_cache=False)
        if self.head is not None and self.base is not self.model:
            hidden = self.base(input_ids=torch.from_numpy(text[None].astype(np.int64)).to(self.device), use_cache=False)
            self.splits_head = _close(self.head(hidden.last_hidden_state), whole.logits, SAME * _largest(whole.logits))
        if self.share_up_to == 0:
            return
        sequences = [Sequence(ids, [(i, ids[-4:])]) for i, ids in enumerate((text, other))]
        rows = [Row(7, sequences), Row(len(other), sequences[1:])]
        expected = [x for s in sequences for x in self._batch([Row(len(s.ids), [s])], text[:0], None)]
        expected.append(expected[1])
        try:
            found = self._batch(rows, text[:3], self._read_prefix(Group(text[:3], [rows])))
        except Exception as error:  # whatever a model says to a mask or a cache that it does not take
            logger.warning("one sequence a row: %s takes no mask of its own (%s)", type(self.model).__name__, error)
            return
        rounding = ROUNDING.get(whole.logits.dtype, ROUNDING_OF_HALVES) * _largest(whole.logits)
        self.shares = _close(torch.tensor([x[1] for x in found]), torch.tensor([x[1] for x in expected]), rounding)
        if not self.shares:
            logger.warning("one sequence a row: %s computes others side by side differently", type(self.model).__name__)


def _limits(config: Any) -> tuple[int | None, float]:
    """``share_up_to`` and ``equal_beyond`` of :func:`likelihood_plan.plan` for a model's configuration.

    A mask of ours says all that is seen. Where a model itself hides keys of a long text, from ``sliding_window`` on or
    past the ``keep_window_size`` best, longer sequences are left to it. Where rotary angles depend on the length of the
    longest row, longer sequences may not meet others of another length.
    """
    windows = [getattr(config, name, None) for name in ("keep_window_size", "sliding_window", "attention_chunk_size")]
    equal_beyond = float("inf")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        windows.append(trained)
        equal_beyond = trained
    return min((window for window in windows if window), default=None), equal_beyond


def _largest(logits: torch.Tensor) -> float:
    return max(1e-3, float(logits.abs().max()))


def _close(found: torch.Tensor, expected: torch.Tensor, allowed: float) -> bool:
    return found.shape == expected.shape and float((found - expected).abs().max()) <= allowed


def _padded(parts: list[np.ndarray]) -> np.ndarray:
    """One-dimensional parts as rows (B, longest), padded on the right with id 0, which nothing sees."""
    padded = np.zeros((len(parts), max(map(len, parts))), dtype=np.int32)
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    return padded


def _repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    """A new cache that holds the one row of ``cache`` so many times."""
    repeated = DynamicCache()
    for i, layer in enumerate(cache.layers):
        keys, values = (x.expand(rows, -1, -1, -1) for x in (layer.keys, layer.values))  # type: ignore[union-attr]
        repeated.update(keys, values, i)
    return repeated
