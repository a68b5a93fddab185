"""Dynamic Mask Attention on a GPU through Triton kernels: only tiles with a pair that is seen, forward and backward.

Here is what calls the kernels: sizes of tiles, allocation, and operators that torch.compile takes as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from ..gpu import kernels, power_of_2

CHUNK = 1024  # queries that share a list of keys
# Tiles (queries, keys, warps, stages) of each kernel, for head sizes up to 128. The first two share their queries.
Tiles = tuple[int, int, int, int]
HOPPER: dict[str, Tiles] = {
    "forward": (64, 64, 4, 2),
    "backward_queries": (64, 64, 4, 2),
    "backward_keys": (64, 64, 4, 2),
}
OTHERS: dict[str, Tiles] = {  # within the 99 KiB of shared memory of an RTX 30 or 40, and without spilling registers
    "forward": (128, 64, 8, 3),
    "backward_queries": (128, 32, 8, 2),
    "backward_keys": (32, 64, 8, 2),
}
EXACT: Tiles = (32, 32, 4, 1)  # for float32: exact, not fast
LARGEST_HEAD = 128  # beyond it the tiles do not fit into shared memory
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, e: torch.Tensor, most: int
) -> torch.Tensor:
    """See :func:`small_doge.ops.dynamic_mask.dynamic_mask_attention`, for as many queries as keys.

    Work O(T·w); memory O(T), the lists of keys included: 24 bytes a key and head at w = ``CHUNK``.

    Args:
        q: (B, H, T, D); k, v: (B, G, T, D); of one of ``DTYPES``, D up to ``LARGEST_HEAD``.
        s: (B, M, T).
        e: (B, M, T) int32 eviction times.
        most: no query sees more keys than this.

    Returns:
        (B, H, T, D), laid out as (B, T, H, D). The same inputs give the same bits, but for the gradients of k, v and
        s, which are sums in an order that changes from run to run.
    """
    if s.shape[1] != k.shape[1]:  # a mask of its own for every query head
        k, v = (x.repeat_interleave(s.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    return _forward(_readable(q), _readable(k), _readable(v), s.float().contiguous(), e.contiguous(), most)[0]


def _readable(x: torch.Tensor) -> torch.Tensor:
    """With the numbers of a head side by side and no dimension that repeats itself."""
    return x.contiguous() if x.stride(-1) != 1 or 0 in x.stride() else x


def _tiles(kernel: str, q: torch.Tensor) -> Tiles:
    if q.dtype == torch.float32:
        return EXACT
    return (HOPPER if torch.cuda.get_device_capability(q.device)[0] == 9 else OTHERS)[kernel]


def _allocate(q: torch.Tensor, k: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out (B, H, T, D), lse (B, H, T), and the lists that ``triton_window.list_keys`` describes."""
    B, H, T, D = q.shape
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    R, chunks, old = k.shape[0] * k.shape[1], -(-T // CHUNK), -(-min(most, T) // 128) * 128
    tiles = -(-T // _tiles("forward", q)[0])
    lists = (R, chunks, old + CHUNK)
    shapes = [lists, lists, lists, (R, chunks, 2), (R, tiles, 3)]
    dtypes = (torch.int32, torch.int32, torch.float32, torch.int32, torch.int32)
    return out, lse, [torch.empty(x, dtype=y, device=q.device) for x, y in zip(shapes, dtypes, strict=True)]


def _launch(
    kernel: str, q: torch.Tensor, k: torch.Tensor, keys: torch.Tensor
) -> tuple[dict[str, Any], tuple[int, int]]:
    """The arguments that the three attention kernels share, and the grid of one."""
    B, H, T, D = q.shape
    M = k.shape[1]
    BLOCK_M, BLOCK_N, warps, stages = _tiles(kernel, q)
    chunks, old = keys.shape[1], keys.shape[2] - CHUNK
    log2_e = 1.4426950408889634
    arguments = {"T": T, "scale": D**-0.5 * log2_e, "M": M, "OLD": old, "N": H // M, "D": D}
    arguments |= {"BLOCK_D": power_of_2(D, 16), "CHUNK": CHUNK, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    arguments |= {"EXACT": q.dtype == torch.float32, "num_warps": warps, "num_stages": stages}
    if kernel != "backward_keys":
        return arguments, (-(-T // BLOCK_M), B * H)
    return arguments, (chunks * (old + CHUNK) // BLOCK_N, B * M)


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


@torch.library.custom_op("small_doge::dynamic_mask_forward", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, e: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, lse and the five lists."""
    out, lse, (keys, ends, scores, sizes, ranges) = _allocate(q, k, most)
    T, (R, _, slots) = q.shape[2], keys.shape
    rows = torch.arange(R, device=e.device)[:, None]
    late = (rows * (T + 1) + T - e.view(R, T)).flatten()
    if R * (T + 1) < 1 << 31:
        late = late.int()  # half the passes of a radix sort
    falling = late.argsort().view(R, T) - rows * T  # one sort of all rows
    run: Any = kernels("dynamic_mask.triton_window")
    run.list_keys[(keys.shape[1], R)](
        falling.int(), e, s, keys, ends, scores, sizes, ranges, T, slots - CHUNK,
        CHUNK=CHUNK, BLOCK_M=_tiles("forward", q)[0], BLOCK=1024, num_warps=8,
    )  # fmt: skip
    arguments, grid = _launch("forward", q, k, keys)
    run = kernels("dynamic_mask.triton_attention")
    run.forward[grid](q, k, v, keys, ends, scores, ranges, out, lse, *_strides(q, k, v, out), **arguments)
    return out, lse, keys, ends, scores, sizes, ranges


@_forward.register_fake
def _(q, k, v, s, e, most):
    out, lse, lists = _allocate(q, k, most)
    return out, lse, *lists


@torch.library.custom_op("small_doge::dynamic_mask_backward", mutates_args=())
def _backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    e: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    keys: torch.Tensor,
    ends: torch.Tensor,
    scores: torch.Tensor,
    sizes: torch.Tensor,
    ranges: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, ds."""
    do = _readable(do)
    dq = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    # Chunks add their parts to the gradients of the keys.
    dk, dv, ds = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (k, v, s))
    run: Any = kernels("dynamic_mask.triton_attention")
    arguments, grid = _launch("backward_queries", q, k, keys)
    run.backward_queries[grid](
        q, k, v, keys, ends, scores, ranges, out, lse, do, delta, dq, *_strides(q, k, v, out, do), **arguments
    )
    arguments, grid = _launch("backward_keys", q, k, keys)
    run.backward_keys[grid](
        q, k, v, keys, ends, scores, sizes, lse, do, delta, dk, dv, ds, *_strides(q, k, v, do), **arguments
    )
    return dq, dk.to(k.dtype), dv.to(v.dtype), ds


@_backward.register_fake
def _(do, q, k, v, s, e, out, lse, keys, ends, scores, sizes, ranges):
    dq = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device=q.device)
    return dq, *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v, s))


def _save(ctx, inputs, output):
    q, k, v, s, e, _ = inputs
    ctx.save_for_backward(q, k, v, s, e, *output)


def _differentiate(ctx, do, *_):
    return *_backward(do, *ctx.saved_tensors), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
