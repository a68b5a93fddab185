"""When does a key leave the window? Scores to ranks, ranks to eviction times.

The w-th best rank of a prefix never falls as the prefix grows, so a key that has left W never returns: key j is seen by
exactly the queries j ≤ i < e_j. One integer per key and head, its eviction time e, is the whole mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..gpu import usable
from . import window_gpu


def grid(s: torch.Tensor) -> torch.Tensor:
    """Scores (floating point, any shape) → integers in [0, 2²¹] of the same order, int64: what ranks compare.

    Scores are compared as float32 rounded to 12 bits of mantissa, in steps of 1.2e-4 to 2.4e-4 of the score. The same
    token's score differs in its last bits (some 1e-6) between a batched and a one-row matrix product, and a tie decided
    by such noise would make cached generation differ from the full pass; a step of 2e-4 in a bias decides nothing.
    """
    bits = (s.float() + 0.0).view(torch.int32)  # + 0.0 makes −0 and 0 the same number
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats order backwards by their bits
    return (ordered.long() + ((1 << 31) + (1 << 10))) >> 11  # round away the last 11 of 23 mantissa bits; positive


LONGEST = 1 << 19  # tokens that a score may be worth: what it is capped at
# Places on the grid that floats are made for, less that of zero: from the smallest normal one, since smaller ones may
# be flushed to zero, to the largest.
NORMAL, LARGEST = 1 << 12, 0x7F7FF800 >> 11
AT_ONCE = LARGEST - NORMAL - LONGEST  # tokens that can be ranked by such floats


def places(s: torch.Tensor, ages: torch.Tensor, lifetime: float) -> torch.Tensor:
    """⌊s · lifetime⌋ + age + 1: scores and ages (…, T) → int64 above 0, by which keys rank if their scores age.

    The age is how many tokens came before. A score that is higher by 1 makes up for ``lifetime`` of them, for all keys
    alike, so which of two is better never changes, and a key that has left the window never returns. Whole numbers are
    exact at any position, so a text is ranked alike wherever it begins; scores are first rounded as on the
    :func:`grid`, and worth at most ``LONGEST`` tokens.
    """
    bits = ((s.detach().float() + 0.0).view(torch.int32).long() + (1 << 10)) >> 11 << 11  # s ≥ 0, 12 bits of mantissa
    worth = (bits.int().view(torch.float32) * lifetime).floor().clamp(max=LONGEST)
    return worth.long() + ages + 1


def as_scores(place: torch.Tensor) -> torch.Tensor:
    """Float32 numbers (…, T) that rank like whole numbers (…, T), to be given in place of scores.

    Each stands at its place on the :func:`grid`, so that nothing is rounded; what is a million behind the largest ties.
    """
    shifted = place - place.amax(-1, keepdim=True) + LARGEST
    return (shifted.clamp(min=NORMAL) << 11).int().view(torch.float32)


def aged(s: torch.Tensor, lifetime: float, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """What keys are ranked by in place of their scores if these age: (B, M, T) → float32, see :func:`places`.

    Args:
        s: scores ≥ 0.
        lifetime: tokens that a score of 1 is worth.
        key_mask: (B, T) bool, False for padding, which makes nothing older.

    Raises:
        ValueError: for more than ``AT_ONCE`` tokens, some 516,000.
    """
    T = s.shape[-1]
    if T > AT_ONCE:
        raise ValueError(f"{T:,} tokens at once with a score_lifetime, expected at most {AT_ONCE:,}")
    ages = torch.arange(T, device=s.device) if key_mask is None else key_mask.cumsum(-1)[:, None]
    return as_scores(places(s, ages, lifetime))


def ranks(s: torch.Tensor) -> torch.Tensor:
    """Order the keys of each head: scores (..., T) → distinct ranks ≥ 0 (..., T), int64; a larger rank is kept longer.

    Scores are compared on the :func:`grid`. Ties go to the newer key: its position breaks them.
    """
    T = s.shape[-1]
    return grid(s) * T + torch.arange(T, device=s.device)


@torch.no_grad()
def eviction_times(
    s: torch.Tensor,
    window: int,
    *,
    key_mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    local_window: int = 0,
) -> torch.Tensor:
    """Scores (B, M, T) → e (B, M, T), int32: key j is seen by exactly the queries j ≤ i < e_j.

    e_j is the first i at which ``window`` keys of the prefix 0…i rank above key j (T if that never happens, and j if
    it is never seen); a tie goes to the newer key. Exact. With C ≈ √T, time O(T·C) and memory O(T + (T/C)²):
    thresholds at every C-th position from a table of counts, then the place inside the block by comparing.

    Args:
        s: scores, floating point.
        window: w ≥ 1.
        key_mask: (B, T) bool, False for padding: seen by itself only (e_j = j + 1), and takes no place in W.
        documents: (B, T) integers that never fall along a row: a key leaves at the end of its document, and is ranked
            within it.
        local_window: e_j is at least j + ``local_window``.
    """
    B, M, T = s.shape
    j = torch.arange(T, device=s.device)
    if window >= T:
        e = torch.full((B, M, T), T, device=s.device)
    else:
        e = (
            window_gpu.evictions(s, window, key_mask, documents)
            if usable(s)
            else _rank_and_evict(s, window, key_mask, documents)
        )
    if local_window:
        e = torch.maximum(e, (j + local_window).clamp(max=T))
    if documents is not None:
        end = torch.searchsorted(documents.contiguous(), documents.contiguous(), right=True)
        e = torch.minimum(e, end[:, None])
    if key_mask is not None:
        e = torch.where(key_mask[:, None], e, j + 1)
    return e.int()


def _rank_and_evict(
    s: torch.Tensor, window: int, key_mask: torch.Tensor | None, documents: torch.Tensor | None
) -> torch.Tensor:
    """See ``window_gpu.evictions``."""
    order_key = grid(s) + 1  # 1 or more, so that padding (0) ranks below every score
    if key_mask is not None:
        order_key = order_key * key_mask[:, None]
    if documents is not None:  # a newer document ranks above the older ones: ranks within it are all that counts
        order_key = order_key + (documents.long()[:, None] << 22)
    return _evictions(order_key.flatten(0, 1), window).view(s.shape)


def _evictions(order_key: torch.Tensor, window: int) -> torch.Tensor:
    """Integers (R, T) to rank by, position breaking ties → eviction times (R, T), int64, for window < T."""
    R, T = order_key.shape
    device = order_key.device
    C = window_gpu.block_length(T)  # positions and ranks are both cut into blocks of C
    blocks = -(-T // C)
    order = order_key.argsort(dim=-1, stable=True)
    j = torch.arange(T, device=device).expand(R, T)
    rank = torch.zeros(R, T, dtype=torch.int64, device=device).scatter_(1, order, j)

    # at_least[b, u]: how many keys of the blocks up to b rank in bucket u or above; a column of zeros closes it.
    cells = (j // C) * (blocks + 1) + rank // C
    counts = torch.zeros(R, blocks * (blocks + 1), dtype=torch.int32, device=device)
    counts = counts.scatter_add_(1, cells, torch.ones_like(cells, dtype=torch.int32)).view(R, blocks, blocks + 1)
    at_least = counts.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1).cumsum(1, dtype=torch.int32)

    # threshold[b]: the rank of the w-th best key up to the end of block b, −1 while there are fewer than w keys.
    bucket = (at_least >= window).sum(-1) - 1  # (R, blocks)
    missing = window - at_least.gather(-1, (bucket + 1)[..., None])  # how many the buckets above leave to find here
    padded = F.pad(order, (0, blocks * C - T), value=blocks * C).view(R, blocks, C)
    inside = padded.gather(1, bucket.clamp(min=0)[..., None].expand(-1, -1, C))  # positions, by ascending rank
    seen = inside < (torch.arange(1, blocks + 1, device=device) * C)[:, None]
    enough = seen.flip(-1).cumsum(-1).flip(-1) >= missing
    threshold = torch.where(bucket >= 0, bucket * C + enough.sum(-1) - 1, -1)

    # Key j leaves in the first block, not before its own, at whose end its rank is below the threshold.
    block = torch.searchsorted(threshold, rank, right=True).maximum(j // C)  # (R, T), `blocks` for never
    i = _position_in_block(order, rank, at_least, block, window, C)
    return torch.where(block == blocks, T, torch.maximum(i, j))


def _position_in_block(
    order: torch.Tensor, rank: torch.Tensor, at_least: torch.Tensor, block: torch.Tensor, window: int, C: int
) -> torch.Tensor:
    """Where in its ``block`` w keys rank above each key: positions (R, T), without meaning where it is past the end."""
    R, T = rank.shape
    blocks = at_least.shape[1]
    c = torch.arange(C, device=rank.device, dtype=torch.int32)
    # A row of these tables is a block of C: taking whole rows is far faster than taking single elements.
    order_rows = F.pad(order, (0, blocks * C - T), value=T).int().reshape(-1, C)
    rank_rows = F.pad(rank, (0, blocks * C - T), value=-1).int().reshape(-1, C)
    first_row = torch.arange(R, device=rank.device)[:, None] * blocks
    higher = F.pad(at_least, (0, 0, 1, 0)).flatten(1)  # a block of zeros in front of the first
    pieces = []
    step = max(1, (1 << 20) // (R * C))  # about a million elements at a time, which stay in a CPU's cache
    for start in range(0, T, step):
        r = rank[:, start : start + step]  # (R, step)
        b = block[:, start : start + step].clamp(max=blocks - 1)
        higher_buckets = higher.gather(1, b * (blocks + 1) + r // C + 1)
        places = order_rows.index_select(0, (first_row + r // C).flatten()).view(*r.shape, C)  # by ascending rank
        same_bucket = ((places < (b * C).int()[..., None]) & (c > (r % C).int()[..., None])).sum(-1, dtype=torch.int32)
        missing = window - higher_buckets - same_bucket
        newer = rank_rows.index_select(0, (first_row + b).flatten()).view(*r.shape, C)
        above = (newer > r.int()[..., None]).cumsum(-1, dtype=torch.int32)
        pieces.append(b * C + (above < missing[..., None]).sum(-1, dtype=torch.int32))
    return torch.cat(pieces, dim=-1)
