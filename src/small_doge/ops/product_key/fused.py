"""The experts of CDMoE and their retrieval on a GPU through Triton kernels: nothing of tokens × k × C is stored.

Here is what calls the kernels: sizes of tiles, allocation, and operators that torch.compile takes as they are.

The rows that tokens look up are read from the L2 cache several times as fast as from memory, so where the tables do not
fit into it they are passed over a slice of their columns at a time. The gradients of the tables are summed expert by
expert over the pairs of token and slot sorted by expert: no atomics, the same inputs give the same bits.

With few experts, matrix products with all of them cost less than looking up some: the path ``dense``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from .. import gpu


class Tiles(NamedTuple):
    """What the launches of one kind of GPU look like."""

    # Of `tokens` with both passes, with the first, with the second: rows (the slots) times columns of a tile, warps a
    # program, and pipeline stages, one meaning registers only.
    both: tuple[int, int, int] = (2048, 2, 1)
    dot: tuple[int, int, int] = (2048, 2, 1)
    sum: tuple[int, int, int] = (2048, 1, 1)
    experts: tuple[int, int, int, int] = (16, 256, 4, 1)  # pairs, columns, warps, stages; of `crowded` too
    retrieve: int = 2  # tokens a program
    joined: float = 0.4  # of the L2 cache, what both tables may take for both passes to be one launch
    cached: float = 0.4  # of the L2 cache, what a slice of one table may take
    dense: int = 0  # the most experts that take the path ``dense``


HOPPER = Tiles()
OTHERS = Tiles()
LENGTH = 256  # pairs of one expert that are summed apart from its others
LANES = 1024  # the most pairs of ranks that `retrieve` can choose from
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _kernels() -> Any:
    return gpu.kernels("product_key.triton_experts")


def usable(x: torch.Tensor) -> bool:
    """Whether the kernels take ``x``: one of ``DTYPES`` on an NVIDIA GPU from Ampere on, with Triton installed."""
    return x.dtype in DTYPES and gpu.usable(x)


def _tiles(device: torch.device) -> Tiles:
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return HOPPER if hopper else OTHERS


def _cache_bytes(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2.0**25


def _power(n: int) -> int:
    """The power of two that is n or next above."""
    return 1 << max(1, n - 1).bit_length()


def fused_experts(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    dense: bool | None = None,
) -> torch.Tensor:
    """See :func:`small_doge.ops.product_key.experts`, for tensors that are :func:`usable`.

    Looking rows up takes 4 bytes × 3 a pair of token and slot, and what sorting the pairs takes; ``dense`` takes
    3 × N × E numbers of the dtype of x at most.

    Args:
        x: (N, C).
        down, up: (E, C).
        indices: (N, k) int64.
        weights: (N, k).
        dense: whether to multiply with all experts; None: what ``Tiles.dense`` says.

    Returns:
        (N, C) in the dtype of x. The same inputs give the same bits, gradients included.
    """
    if dense is None:
        dense = down.shape[0] <= _tiles(x.device).dense
    tensors = (x.contiguous() for x in (x, down, up, indices, weights.float()))  # kernels know no strides
    return _forward(*tensors, dense)[0]


def _tokens(
    v: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    h: torch.Tensor,
    made: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    backward: bool,
) -> None:
    """Launch `tokens`, once or once a pass; see there."""
    (N, C), SLOTS, tiles = v.shape, indices.shape[1], _tiles(v.device)
    table, cache = first.numel() * first.element_size(), _cache_bytes(v.device)
    together = 2 * table <= tiles.joined * cache
    slices = 1 if together else -(-table // max(1, int(tiles.cached * cache)))
    WIDE = _power(SLOTS)

    def cut(elements: int) -> tuple[int, int, int]:
        """Columns of a tile, columns of a slice, slices."""
        block = min(_power(C), max(16, elements // WIDE))
        columns = -(-C // (slices * block)) * block
        return block, columns, -(-C // columns)

    parts = cut(tiles.dot[0])[2]
    dots = h if together else torch.empty(parts, N, SLOTS, dtype=torch.float32, device=v.device)
    kernels = _kernels()
    for dot, total in ((True, True),) if together else ((True, False), (False, True)):
        elements, warps, stages = tiles.both if together else tiles.dot if dot else tiles.sum
        block, columns, programs = cut(elements)
        kernels.tokens[(N, programs)](
            v, first, second, indices, weights, dots, h, *made, out, N, C=C, SLOTS=SLOTS, WIDE=WIDE, BLOCK_C=block,
            SLICE=columns, PARTS=parts, STAGES=stages, BACKWARD=backward, DOT=dot, SUM=total, num_warps=warps,
        )  # fmt: skip


def _spread(
    dots: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, h: torch.Tensor, dweights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `spread`, backward if there is a dweights to fill: a and dh, each (N, E); forward, no dh."""
    N, E = dots.shape
    SLOTS = indices.shape[1]
    a = torch.empty_like(dots)
    dh = a if dweights is None else torch.empty_like(dots)
    WIDE = _power(SLOTS)
    kernels = _kernels()
    kernels.spread[(N,)](
        dots, indices, weights, h, h if dweights is None else dweights, a, dh, E, SLOTS=SLOTS, WIDE=WIDE,
        BLOCK_E=min(_power(E), max(16, 4096 // WIDE)), BACKWARD=dweights is not None, num_warps=4,
    )  # fmt: skip
    return a, dh


def sort_pairs(indices: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs of token and slot (P,) int64 by expert, then by token; their experts (P,); and where each starts.

    indices: (N, k) int64 → ..., starts (E + 1,) int32.
    """
    dtype = torch.int16 if E < 1 << 15 else torch.int32  # a radix sort takes half the passes
    keys, order = indices.flatten().to(dtype).sort(stable=True)
    starts = torch.empty(E + 1, dtype=torch.int32, device=indices.device)
    kernels = _kernels()
    P = keys.numel()
    kernels.starts[(-(-(E + 1) // 128),)](keys, starts, P, E, P.bit_length(), BLOCK=128, num_warps=4)
    return order, keys, starts


def sum_pairs(
    x: torch.Tensor,
    do: torch.Tensor,
    a: torch.Tensor,
    dh: torch.Tensor,
    order: torch.Tensor,
    keys: torch.Tensor,
    starts: torch.Tensor,
    ddown: torch.Tensor,
    dup: torch.Tensor,
) -> None:
    """Fill the gradients of the tables (E, C) from the sorted pairs."""
    (E, C), SLOTS = ddown.shape, a.shape[1]
    ROWS, columns, warps, stages = _tiles(x.device).experts
    columns = min(columns, _power(C))
    blocks, whole = -(-C // columns), keys.numel() // LENGTH
    parts = torch.empty(whole, 2, C, dtype=torch.float32, device=x.device)
    sizes = {"C": C, "SLOTS": SLOTS, "LENGTH": LENGTH, "ROWS": ROWS, "BLOCK_C": columns, "STAGES": stages}
    sizes["num_warps"] = warps
    kernels = _kernels()
    if whole:
        kernels.crowded[(whole, blocks)](x, do, a, dh, keys, order, parts, **sizes)
    kernels.experts[(E, blocks)](x, do, a, dh, order, parts, starts, ddown, dup, **sizes)


@torch.library.custom_op("small_doge::fused_experts_forward", mutates_args=())
def _forward(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, dense: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (N, C), and h = x·down (N, k) float32."""
    h = torch.empty(indices.shape, dtype=torch.float32, device=x.device)
    if dense:
        a, _ = _spread(x @ down.to(x.dtype).T, indices, weights, h, None)
        return a @ up.to(x.dtype), h
    out = torch.empty_like(x)
    _tokens(x, down, up, indices, weights, h, (h, h, h), out, backward=False)
    return out, h


@_forward.register_fake
def _(x, down, up, indices, weights, dense):
    return torch.empty_like(x), torch.empty(indices.shape, dtype=torch.float32, device=x.device)


@torch.library.custom_op("small_doge::fused_experts_backward", mutates_args=())
def _backward(
    do: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    h: torch.Tensor,
    dense: bool,
    tables: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, ddown, dup, dweights; without ``tables``, ddown and dup are empty."""
    do = do.contiguous()
    dweights = torch.empty_like(h)
    ddown, dup = (x.new_empty(table.shape if tables else (0,), dtype=table.dtype) for table in (down, up))
    if dense:
        all_a, all_dh = _spread(do @ up.to(x.dtype).T, indices, weights, h, dweights)
        dx = all_dh @ down.to(x.dtype)
        if tables:
            ddown, dup = (all_dh.T @ x).to(down.dtype), (all_a.T @ do).to(up.dtype)
        return dx, ddown, dup, dweights
    a, dh, dx = torch.empty_like(h), torch.empty_like(h), torch.empty_like(x)
    _tokens(do, up, down, indices, weights, h, (a, dh, dweights), dx, backward=True)
    if tables:
        sum_pairs(x, do, a, dh, *sort_pairs(indices, down.shape[0]), ddown, dup)
    return dx, ddown, dup, dweights


@_backward.register_fake
def _(do, x, down, up, indices, weights, h, dense, tables):
    ddown, dup = (x.new_empty(table.shape if tables else (0,), dtype=table.dtype) for table in (down, up))
    return torch.empty_like(x), ddown, dup, torch.empty_like(h)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.dense = inputs[5]
    ctx.set_materialize_grads(False)  # no zeros for h, whose gradient nobody asks for


def _differentiate(ctx, do, _):
    if do is None:
        return (None,) * 6
    tables = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, ddown, dup, dweights = _backward(do, *ctx.saved_tensors, ctx.dense, tables)
    return dx, ddown if tables else None, dup if tables else None, None, dweights, None


_forward.register_autograd(_differentiate, setup_context=_save)


@functools.cache
def _pairs_of_ranks(K: int, k: int, device: torch.device) -> torch.Tensor:
    """i · 65536 + j of the ranks with (i + 1)(j + 1) ≤ k, in int32; −1 up to the next power of two, at least k."""
    pairs = [i << 16 | j for i in range(min(k, K)) for j in range(min(k // (i + 1), K))]
    pairs += [-1] * (max(_power(len(pairs)), _power(k)) - len(pairs))
    return torch.tensor(pairs, dtype=torch.int32).to(device)


def retrieves(logits: torch.Tensor, k: int) -> bool:
    """Whether :func:`fused_retrieve` takes ``logits`` (N, 2K) and k: the sorting has to fit into registers."""
    if not usable(logits) or max(k, logits.shape[-1] // 2) > LANES:
        return False
    return sum(k // n for n in range(1, k + 1)) <= LANES


def fused_retrieve(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`small_doge.ops.product_key.retrieve`, for logits that :func:`retrieves`.

    Args:
        logits: (N, 2K) of one of ``DTYPES``.
        k: experts a token.

    Returns:
        Scores (N, k) float32, falling, and indices (N, k) int64.
    """
    scores, indices = _retrieve(logits.contiguous(), k)
    return scores, indices


@torch.library.custom_op("small_doge::fused_retrieve", mutates_args=())
def _retrieve(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    N, K = logits.shape[0], logits.shape[1] // 2
    pairs = _pairs_of_ranks(K, k, logits.device)
    scores = torch.empty(N, k, dtype=torch.float32, device=logits.device)
    indices = torch.empty(N, k, dtype=torch.int64, device=logits.device)
    KEYS, WIDE = _power(K), _power(k)
    tokens = min(_tiles(logits.device).retrieve, max(1, 512 // max(KEYS, pairs.numel())))  # what registers hold
    kernels = _kernels()
    kernels.retrieve[(-(-N // tokens),)](
        logits, pairs, scores, indices, N, K, SLOTS=k, WIDE=WIDE, KEYS=KEYS, BEST=min(WIDE, KEYS),
        LANES=pairs.numel(), TOKENS=tokens, num_warps=1,  # Triton 3.7 does not compile its gather for several
    )  # fmt: skip
    return scores, indices


@_retrieve.register_fake
def _(logits, k):
    return tuple(logits.new_empty(logits.shape[0], k, dtype=x) for x in (torch.float32, torch.int64))


@torch.library.custom_op("small_doge::fused_retrieve_backward", mutates_args=())
def _retrieve_backward(dscores: torch.Tensor, indices: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """dlogits; of logits only the shape and the dtype matter."""
    dlogits = torch.empty_like(logits)
    (N, SLOTS), K = indices.shape, logits.shape[1] // 2
    kernels = _kernels()
    kernels.retrieve_backward[(N,)](
        dscores.contiguous(), indices, dlogits, K, SLOTS=SLOTS, WIDE=_power(SLOTS), KEYS=_power(K), num_warps=1
    )
    return dlogits


@_retrieve_backward.register_fake
def _(dscores, indices, logits):
    return torch.empty_like(logits)


def _save_retrieved(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_retrieved(ctx, dscores, _):
    logits, indices = ctx.saved_tensors
    return None if dscores is None else _retrieve_backward(dscores, indices, logits), None


_retrieve.register_autograd(_differentiate_retrieved, setup_context=_save_retrieved)
