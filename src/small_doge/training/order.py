"""Which rows a step sees: a function of the seed and the step alone.

One permutation of the rows follows the other without end, and a step takes the next ``rows_per_step`` of them. That
does not depend on how many devices share a step, so a run resumed on another number sees the rows it would have seen;
a run that continues another takes the rows where that one stopped; and no step at the end of an epoch is short.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepOrder(Sampler[int]):
    """Row numbers of one epoch after the other, each a whole number of steps (at least one).

    Args:
        rows: how many rows there are.
        rows_per_step: how many a step sees over all devices.
        seed: permutation k is that of seed + k.
        start: rows of the sequence that were seen before.
        shuffle: False takes the rows as they lie, again and again.
    """

    def __init__(self, rows: int, rows_per_step: int, seed: int, start: int = 0, shuffle: bool = True):
        self.rows, self.seed, self.start, self.shuffle = rows, seed, start, shuffle
        self.length = max(1, rows // rows_per_step) * rows_per_step
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """The Trainer says which epoch is next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        position = self.start + self.epoch * self.length
        end = position + self.length
        while position < end:
            k, first = divmod(position, self.rows)
            some = self._permutation(k)[first : first + end - position].tolist()
            yield from some
            position += len(some)

    def _permutation(self, k: int) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.rows)
        return torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed + k))
