"""Dynamic Mask Attention of one new token over the keys that a bounded cache holds, and how that takes a new key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..gpu import kernels, power_of_2, usable

LOG2_E = 1.4426950408889634
TILE = 128  # slots that a program of the kernel reads: many programs for the one token


def replace_worst(held: Sequence[torch.Tensor], new: Sequence[torch.Tensor]) -> None:
    """Put one key in the slot of the one that ranks lowest, unless it ranks lowest itself, in place.

    Args:
        held: k, v (B, M, N, D), s, ranks (B, M, N), all slots taken, and any number of tensors (B, M, N) besides.
        new: the same with N = 1. Ranks are int64, no two of a head alike.
    """
    ranks, rank = held[3], new[3]
    if len(held) == 4 and usable(ranks) and held[2].dtype == torch.float32 and all(x.is_contiguous() for x in held):
        k, v, s = (x.to(y.dtype) for x, y in zip(new[:3], held[:3], strict=True))
        return _replace_worst(*held, k, v, s, rank)
    worst = ranks.argmin(dim=-1, keepdim=True)  # (B, M, 1)
    enters = rank > ranks.gather(-1, worst)
    for old, x in zip(held, new, strict=True):
        index, entering = worst, enters
        if old.dim() == 4:
            index, entering = worst[..., None].expand_as(x), enters[..., None]
        old.scatter_(2, index, torch.where(entering, x.to(old.dtype), old.gather(2, index)))


@torch.library.custom_op("small_doge::replace_worst", mutates_args=("k", "v", "s", "ranks"))
def _replace_worst(
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    ranks: torch.Tensor,
    new_k: torch.Tensor,
    new_v: torch.Tensor,
    new_s: torch.Tensor,
    new_ranks: torch.Tensor,
) -> None:
    B, M, N, D = k.shape
    new_k, new_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (new_k, new_v))
    strides = [stride for x in (new_k, new_v, new_s, new_ranks) for stride in x.stride()[:2]]
    run: Any = kernels("dynamic_mask.triton_decode")
    run.replace_worst[(B * M,)](
        k, v, s, ranks, new_k, new_v, new_s, new_ranks, *strides, N, M, D=D, BLOCK_D=power_of_2(D), BLOCK_N=1024
    )


@_replace_worst.register_fake
def _(k, v, s, ranks, new_k, new_v, new_s, new_ranks):
    return None


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """out = softmax over the visible slots of (q · k_j / √D + s_j), times v_j; the slots stand in any order.

    Args:
        q: (B, H, 1, D), floating point.
        k: (B, M, N, D) and v: (B, M, N, D) in the dtype of q, N slots; H is a multiple of M.
        s: (B, M, N) scores, at least float32.
        visible: (B, M or 1, N) bool, False for slots that are out of W or padding, at least one of a row and head
            True; None: all are visible.

    Returns:
        (B, H, 1, D) in the dtype of q. The softmax is computed in at least float32.
    """
    B, H, _, D = q.shape
    M = k.shape[1]
    bias = s if visible is None else s.masked_fill(~visible, float("-inf"))
    half = q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    if half and s.dtype == torch.float32 and not torch.is_grad_enabled() and usable(q):
        return _decode(q, k, v, bias)
    compute = torch.promote_types(q.dtype, torch.float32)
    # The query heads of a group stand where queries usually do: nothing of k and v is repeated. Keys times queries, and
    # not the other way round, takes half the time on a CPU. Not PyTorch's fused attention: its bias has the dtype of
    # q, and in bfloat16 a score of 40 is then off by up to 0.125.
    products = k @ q.reshape(B, M, H // M, D).transpose(-1, -2)  # (B, M, N, H/M)
    logits = products.transpose(-1, -2).to(compute) / D**0.5 + bias[:, :, None].to(compute)
    return (logits.softmax(dim=-1).to(q.dtype) @ v).reshape(B, H, 1, D)


@torch.library.custom_op("small_doge::decode", mutates_args=())
def _decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    B, H, _, D = q.shape
    M, N = k.shape[1:3]
    # A row of slots stands in one piece, and rows at equal distances, also where only the first slots are taken.
    rows = [x if x.stride(0) == M * x.stride(1) and x[0, 0].is_contiguous() else x.contiguous() for x in (k, v, s)]
    q = q if q.stride(-1) == 1 else q.contiguous()
    tiles = -(-N // TILE)
    tops, totals = (torch.empty(B * H, tiles, dtype=torch.float32, device=q.device) for _ in range(2))
    parts = torch.empty(B * H, tiles, D, dtype=torch.float32, device=q.device)
    out = torch.empty(B, H, 1, D, dtype=q.dtype, device=q.device)
    run: Any = kernels("dynamic_mask.triton_decode")
    run.attend[(B * M, tiles)](
        q, *rows, tops, totals, parts, *q.stride()[:2], *(x.stride(1) for x in rows), N, M, D**-0.5 * LOG2_E,
        HEADS=H // M, D=D, BLOCK_D=power_of_2(D), BLOCK_N=TILE,
    )  # fmt: skip
    run.combine[(B * H,)](tops, totals, parts, out, tiles, D=D, BLOCK_D=power_of_2(D), TILES=power_of_2(tiles))
    return out


@_decode.register_fake
def _(q, k, v, s):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
