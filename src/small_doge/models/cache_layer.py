"""What one layer remembers of a text: at most w keys a head, however long the text, and nothing lost.

A key that has left W never returns (``ops.dynamic_mask.window``), so whoever holds the w best keys of each head holds
all that a later query can see. Shapes: B rows, G key/value heads, M score heads (k and v are held per score head), T
new tokens, N slots, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..ops.dynamic_mask.decode import replace_worst
from ..ops.dynamic_mask.window import grid, places

# A key's rank is its score's place · ARRIVALS + the number of its arrival, the place being that on the grid or, where
# scores age, that of ``ops.dynamic_mask.window.places``: the order of ``ops.dynamic_mask.ranks`` for keys that stand in
# any order. Padding has place 0, below that of every score. The largest place on the grid is 2²¹, with age it is the
# arrival and 2¹⁹: a rank stays below 2⁶² for the first billion tokens, and RECENT lifts any rank above all others.
ARRIVALS = 1 << 32
RECENT = 1 << 62


class Keys(tuple[torch.Tensor, ...]):
    """Some keys of every row and score head, in any order: four tensors, or five where k is not rotated yet."""

    @property
    def k(self) -> torch.Tensor:
        """(B, M, N, D)"""
        return self[0]

    @property
    def v(self) -> torch.Tensor:
        """(B, M, N, D)"""
        return self[1]

    @property
    def s(self) -> torch.Tensor:
        """(B, M, N) scores, at least float32"""
        return self[2]

    @property
    def ranks(self) -> torch.Tensor:
        """(B, M, N) int64: place · ARRIVALS + arrival"""
        return self[3]

    @property
    def positions(self) -> torch.Tensor:
        """(B, M, N) int64, for the rotary angles; only where these change as the text grows"""
        return self[4]

    @property
    def arrivals(self) -> torch.Tensor:
        """(B, M, N): how many tokens came before each key"""
        return self.ranks % ARRIVALS

    @property
    def places(self) -> torch.Tensor:
        """(B, M, N): what ranks each key, 0 for padding"""
        return self.ranks // ARRIVALS

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Keys:
        """``function`` of each tensor."""
        return Keys([function(x) for x in self])

    def detach(self) -> Keys:
        """The same keys without their gradient."""
        return self.map(lambda x: x.detach())

    def pick(self, slots: torch.Tensor) -> Keys:
        """The keys in ``slots``: (B, M, N') indices into N → N' keys."""
        return self.map(lambda x: x.gather(2, _for_each_channel(slots, x)))


def _for_each_channel(slots: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Indices (B, M, N) for a tensor (B, M, N), or (B, M, N, D), where they become (B, M, N, D)."""
    return slots if x.dim() == 3 else slots[..., None].expand(*slots.shape, x.shape[-1])


def _writable(x: torch.Tensor) -> bool:
    """What was made in inference mode cannot be written outside it; compiled code can neither ask nor be in it."""
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference()


class DynamicMaskLayer(CacheLayerMixin):
    """What ``DynamicMaskCache`` holds of one layer.

    Slots are filled in order of arrival. Once all ``window + local_window`` are taken, a new key takes the slot of the
    worst, if it is better; the last ``local_window`` arrivals count as better than all others. Padding takes slots too,
    so that all rows fill alike, but ranks below every real key and is not seen. Keys are held without their gradient.
    """

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, window: int, local_window: int = 0, lifetime: float | None = None):
        super().__init__()
        self.window, self.local_window, self.lifetime = window, local_window, lifetime
        self.size = window + local_window
        self.reset()

    def reset(self) -> None:
        """Hold nothing."""
        self.seen = 0
        self.clock: torch.Tensor | None = None
        self.padded = False  # whether any token was said to be padding
        self.paddings: torch.Tensor | None = None  # (B, 1, 1), how many, where scores age
        self._hold(None)

    def _hold(self, slots: Keys | None) -> None:
        self.slots = slots
        self.keys, self.values = (None, None) if slots is None else (slots.k, slots.v)  # as other layers call them
        self.is_initialized = slots is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: slots are made as keys come."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Not how keys come in here: they need scores.

        Raises:
            ValueError: always; only a model that is not Doge calls this.
        """
        raise ValueError(
            "DynamicMaskCache needs the score of each key and serves small_doge's Doge models only; "
            "expected DynamicCache for another model"
        )

    @property
    def held(self) -> Keys:
        """The slots in use, in no particular order."""
        assert self.slots is not None
        used = min(self.seen, self.size)
        return self.slots if used == self.slots.s.shape[2] else self.slots.map(lambda x: x[:, :, :used])

    def describe(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        s: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> Keys:
        """New keys (B, G, T, D), values (B, G, T, D) and scores (B, M, T) as the arrivals that they are.

        Args:
            key_mask: (B, T or more) bool, whose last T columns are False for padding.
            positions: (B or 1, T), if the slots have positions.
        """
        B, M, T = s.shape
        if self.slots is not None and self.slots.s.shape[0] != B:
            raise ValueError(f"the cache holds {self.slots.s.shape[0]} rows, the input has {B}")
        if k.shape[1] < M:
            k, v = (x.repeat_interleave(M // x.shape[1], dim=1) for x in (k, v))
        arrivals = self._now(s.device)
        if T > 1:
            arrivals = arrivals + torch.arange(T, device=s.device)
        padding = None if key_mask is None else ~key_mask[:, None, -T:]
        place = grid(s.detach()) if self.lifetime is None else places(s, self._ages(arrivals, padding), self.lifetime)
        if padding is not None:
            self.padded = True
            place = place.masked_fill(padding, 0)
        ranks = place * ARRIVALS + arrivals
        if positions is None:
            return Keys((k, v, s, ranks))
        return Keys((k, v, s, ranks, positions[:, None].expand(B, M, T)))

    def _ages(self, arrivals: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """How many tokens that are no padding came before new ones, (T) or (B, 1, T), which are counted in."""
        if padding is not None:
            came = padding.cumsum(-1)
            if self.paddings is None:
                self.paddings = torch.zeros_like(came[..., -1:])
            ages = arrivals - self.paddings - came
            if _writable(self.paddings):
                self.paddings.add_(came[..., -1:])  # in place, as for the clock
            else:
                self.paddings = self.paddings + came[..., -1:]
            return ages
        return arrivals if self.paddings is None else arrivals - self.paddings

    def _now(self, device: torch.device) -> torch.Tensor:
        """``seen`` on the device, int64: a captured CUDA graph counts on there, while Python's number stands still."""
        if self.clock is None or self.clock.device != device or not _writable(self.clock):
            self.clock = torch.full((), self.seen, device=device)
        return self.clock

    def _tick(self, T: int) -> None:
        self.seen += T
        if self.clock is not None:
            self.clock.add_(T)

    def step(self, new: Keys) -> Keys:
        """Take one new key; returns the slots. No synchronisation with the host, and nothing is copied."""
        if self.seen < self.size:
            self._append(new.detach())
        else:
            self._replace(new.detach())
        self._tick(1)
        return self.held

    def extend(self, new: Keys) -> Keys:
        """Take T new keys; returns the old and the new ones together, in order of arrival, before any is dropped."""
        together = new
        if self.seen:
            old = self.held
            if self.seen > self.size:
                old = old.pick(old.arrivals.argsort(dim=-1))
            together = Keys([torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)])
        T = new.s.shape[2]
        if self.seen + T <= self.size:
            self._append(new.detach())
        else:
            self._keep_best(together.detach(), T)
        self._tick(T)
        return together

    def visible(self) -> torch.Tensor | None:
        """(B, M, N) bool: what the newest token sees of the slots in use; None: all."""
        held, visible = self.held, None
        if self.local_window and held.ranks.shape[-1] > self.window:
            worst_of_window = held.ranks.topk(self.window, dim=-1).values[..., -1:]
            visible = (held.ranks >= worst_of_window) | (held.arrivals >= self._now(held.s.device) - self.local_window)
        if self.padded:
            # The newest sees itself even if it is padding, so that its softmax is defined.
            real = (held.ranks >= ARRIVALS) | (held.arrivals == self._now(held.s.device) - 1)
            visible = real if visible is None else visible & real
        return visible

    def _order(self, keys: Keys, T: int) -> torch.Tensor:
        """(B, M, N): the key that is smallest here goes first when T more tokens have come."""
        if not self.local_window:
            return keys.ranks
        return keys.ranks + RECENT * (keys.arrivals >= self._now(keys.s.device) + T - self.local_window)

    def _reserve(self, room: int, new: Keys) -> Keys:
        """Slots for ``room`` keys that can be written in place, in dtypes that hold the old keys and the new."""
        old = self.slots
        if old is None:
            self._hold(new.map(lambda x: x.new_zeros(*x.shape[:2], room, *x.shape[3:])))
            return self._reserve(room, new)
        held = old.s.shape[2]
        dtypes = [torch.promote_types(a.dtype, b.dtype) for a, b in zip(old, new, strict=True)]
        if held >= room and _writable(old.k) and dtypes == [x.dtype for x in old]:
            return old
        N = held if held >= room else min(max(room, 2 * held), self.size)  # doubling: a token costs O(1) copies
        larger = Keys([x.new_zeros(*x.shape[:2], N, *x.shape[3:], dtype=d) for x, d in zip(old, dtypes, strict=True)])
        for slots, x in zip(larger, old, strict=True):
            slots[:, :, :held] = x
        self._hold(larger)
        return larger

    def _append(self, new: Keys) -> None:
        end = self.seen + new.s.shape[2]
        for slots, x in zip(self._reserve(end, new), new, strict=True):
            slots[:, :, self.seen : end] = x

    def _replace(self, new: Keys) -> None:
        """Put one key in the slot of the worst, unless it is itself the worst."""
        slots = self._reserve(self.size, new)
        if not self.local_window:
            return replace_worst(slots, new)
        worst = self._order(slots, 1).argmin(dim=-1, keepdim=True)  # (B, M, 1); the new key is recent and enters
        for old, x in zip(slots, new, strict=True):
            old.scatter_(2, _for_each_channel(worst, old), x.to(old.dtype))

    def _keep_best(self, together: Keys, T: int) -> None:
        best = self._order(together, T).topk(self.size, dim=-1, sorted=False).indices
        self._hold(together.pick(best.sort(dim=-1).values))

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether every key that ever came is still held."""
        return self.seen <= self.size

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number: as if they had never come.

        Raises:
            ValueError: for a positive number, or once a key has been dropped.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}, expected a negative number: that many go")
        if tokens_to_remove == 0 or self.seen == 0:
            return
        if not self.is_croppable:
            raise ValueError(
                f"cannot remove the last {-tokens_to_remove} of {self.seen} tokens: the cache holds the {self.size} "
                f"best keys and dropped others, which would have to come back; expected at most {self.size} tokens in "
                "all, a model with a larger keep_window_size, or DynamicCache, which drops nothing"
            )
        self.seen = max(0, self.seen + tokens_to_remove)
        self.clock = None
        if self.paddings is not None:
            self.paddings = (self.held.ranks[:, :1] < ARRIVALS).sum(-1, keepdim=True)

    def _change_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.slots is not None:
            self._hold(self.slots.map(function))
        if self.paddings is not None:
            self.paddings = function(self.paddings)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row b becomes what row ``beam_idx[b]`` was, for indices (B,)."""
        self._change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, one after the other."""
        self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``: (B',) → B' rows."""
        self._change_rows(lambda x: x[indices.to(x.device)])

    def get_seq_length(self) -> int:
        """How many tokens have come, padding included; not how many are held."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a 2-D attention mask: it covers all tokens that ever came."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """−1: a text may be as long as it likes."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of :meth:`get_max_length` in older releases of transformers."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of the slots, used or not."""
        return sum(x.nbytes for x in self.slots or ())
