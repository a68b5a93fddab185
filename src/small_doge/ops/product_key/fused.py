"""The experts of CDMoE and their retrieval on a GPU through Triton kernels: nothing of tokens × k × C is stored.

Here is what calls the kernels: sizes of tiles, allocation, and operators that torch.compile takes as they are.

The gradients of the tables are summed expert by expert over the pairs of token and slot sorted by expert: no atomics,
the same inputs give the same bits.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from .. import gpu


class Tiles(NamedTuple):
    """What the launches of one kind of GPU look like."""

    tokens: tuple[int, int, int] = (2048, 1, 3)  # rows (the slots) times columns, warps, pipeline stages
    experts: tuple[int, int, int, int] = (4, 256, 1, 1)  # pairs, columns, warps, stages; of `crowded` too
    retrieve: int = 2  # tokens a program


HOPPER = Tiles()  # as benchmarks/experts_layer.py --tune found on an H200
OTHERS = Tiles()
MANY = 64  # slots that a warp goes through at once: 1.0 ms for 64, 2.8 for 128 (experts_h200.csv, 256 experts)
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


def fused_experts(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """See :func:`small_doge.ops.product_key.experts`, for tensors that are :func:`usable`.

    Takes 4 bytes × 3 a pair of token and slot, and in the backward pass what sorting the pairs takes.

    Args:
        x: (N, C).
        down, up: (E, C).
        indices: (N, k) int64.
        weights: (N, k).

    Returns:
        (N, C) in the dtype of x. The same inputs give the same bits, gradients included.
    """
    tensors = (x.contiguous() for x in (x, down, up, indices, weights.float()))  # kernels know no strides
    return _forward(*tensors)[0]


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
    """Launch `tokens`, or `tokens_of_many`; see there."""
    (N, C), SLOTS = v.shape, indices.shape[1]
    elements, warps, stages = _tiles(v.device).tokens
    WIDE, WIDE_C = gpu.power_of_2(SLOTS, 2), gpu.power_of_2(C, 2)
    kernels = _kernels()
    arguments = (v, first, second, indices, weights, h, *made, out)
    options: dict[str, Any] = {"C": C, "SLOTS": SLOTS, "STAGES": stages, "BACKWARD": backward, "num_warps": warps}
    if WIDE > MANY:
        ROWS = min(WIDE, max(1, elements // WIDE_C))
        kernels.tokens_of_many[(N,)](*arguments, ROWS=ROWS, WIDE_C=WIDE_C, **options)
    else:
        BLOCK_C = min(WIDE_C, max(16, elements // WIDE))
        kernels.tokens[(N,)](*arguments, WIDE=WIDE, BLOCK_C=BLOCK_C, **options)


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
    columns = min(columns, gpu.power_of_2(C, 2))
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
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (N, C), and h = x·down (N, k) float32."""
    h = torch.empty(indices.shape, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    _tokens(x, down, up, indices, weights, h, (h, h, h), out, backward=False)
    return out, h


@_forward.register_fake
def _(x, down, up, indices, weights):
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
    tables: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, ddown, dup, dweights; without ``tables``, ddown and dup are empty."""
    do = do.contiguous()
    dweights = torch.empty_like(h)
    ddown, dup = (x.new_empty(table.shape if tables else (0,), dtype=table.dtype) for table in (down, up))
    a, dh, dx = torch.empty_like(h), torch.empty_like(h), torch.empty_like(x)
    _tokens(do, up, down, indices, weights, h, (a, dh, dweights), dx, backward=True)
    if tables:
        sum_pairs(x, do, a, dh, *sort_pairs(indices, down.shape[0]), ddown, dup)
    return dx, ddown, dup, dweights


@_backward.register_fake
def _(do, x, down, up, indices, weights, h, tables):
    ddown, dup = (x.new_empty(table.shape if tables else (0,), dtype=table.dtype) for table in (down, up))
    return torch.empty_like(x), ddown, dup, torch.empty_like(h)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)  # no zeros for h, whose gradient nobody asks for


def _differentiate(ctx, do, _):
    if do is None:
        return (None,) * 5
    tables = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, ddown, dup, dweights = _backward(do, *ctx.saved_tensors, tables)
    return dx, ddown if tables else None, dup if tables else None, None, dweights


_forward.register_autograd(_differentiate, setup_context=_save)


@functools.cache
def _pairs_of_ranks(K: int, k: int, device: torch.device) -> torch.Tensor:
    """i · 65536 + j of the ranks with (i + 1)(j + 1) ≤ k, in int32; −1 up to the next power of two, at least k."""
    pairs = [i << 16 | j for i in range(min(k, K)) for j in range(min(k // (i + 1), K))]
    pairs += [-1] * (max(gpu.power_of_2(len(pairs), 2), gpu.power_of_2(k, 2)) - len(pairs))
    return torch.tensor(pairs, dtype=torch.int32).to(device)


def retrieves(logits: torch.Tensor, k: int) -> bool:
    """Whether :func:`fused_retrieve` takes ``logits`` (N, 2K) and k: the sorting has to fit into registers."""
    K = logits.shape[-1] // 2
    if not usable(logits) or max(k, K) > LANES:
        return False
    return sum(min(k // n, K) for n in range(1, min(k, K) + 1)) <= LANES


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
    KEYS, WIDE = gpu.power_of_2(K, 2), gpu.power_of_2(k, 2)
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
    kernels, KEYS = _kernels(), gpu.power_of_2(K, 2)
    # A warp unrolls WIDE · KEYS elements: at 1,024 · 32 compiling took over four minutes.
    WIDE = min(gpu.power_of_2(SLOTS, 2), max(1, 4096 // KEYS))
    kernels.retrieve_backward[(N,)](
        dscores.contiguous(), indices, dlogits, K, SLOTS=SLOTS, WIDE=WIDE, KEYS=KEYS, num_warps=1
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
