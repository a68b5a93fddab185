"""Dynamic Mask Attention while no key can drop out (Tk ≤ w): the score rides inside the dot product.

With q' = [q, 1] and k' = [k, √D · s],  q'·k' / √D = q·k / √D + s,  so any causal attention kernel computes it and
its gradients, and none of them needs a (T, T) bias.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..gpu import kernels, power_of_2, usable

CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def folded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """See :func:`small_doge.ops.dynamic_mask.dynamic_mask_attention`; (B, H, Tq, D) out, for Tk no larger than w."""
    (_, H, Tq, D), Tk = q.shape, k.shape[2]
    if s.shape[1] != k.shape[1]:  # a score of its own for every query head: keys differ between the heads of a group
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))

    if torch.is_autocast_enabled(q.device.type):
        # Attention would round its inputs under autocast; the score must be split for the dtype it will meet there.
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if mask is None and 1 < Tq < Tk:  # several new tokens after a cache: is_causal would align them to the start
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    causal = False
    if mask is None and Tq > 1:  # a branch: where T is dynamic, compiling takes no symbol for `is_causal`
        causal = True
    half = k.dtype in (torch.bfloat16, torch.float16)
    # cuDNN leaves v as it is; FlashAttention wants one head size for q, k and v. Both want multiples of 8 at least.
    unequal = mask is None and half and _cudnn_takes_unequal_heads(q)
    width = D + (2 if half else 1)
    if k.is_cuda:
        width += -width % (16 if unequal else 8)
    # Compiled, the columns become part of the kernel that rotates q and k; otherwise they are one of their own.
    append = _widen if half and usable(k) and not torch.compiler.is_compiling() else _append
    q, k = append(q, None, width), append(k, s, width)
    if not unequal:
        v = F.pad(v, (0, width - D))

    with sdpa_kernel(CUDNN_FIRST, set_priority=True) if unequal else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout_p,
            is_causal=causal,
            scale=D**-0.5,
            enable_gqa=k.shape[1] != H,
        )
    return out[..., :D]


def _append(x: torch.Tensor, s: torch.Tensor | None, width: int) -> torch.Tensor:
    """x (B, N, T, D) and columns up to (B, N, T, width): √D·s for keys, ones for queries (s None), zeros."""
    D = x.shape[-1]
    parts = 2 if x.dtype in (torch.bfloat16, torch.float16) else 1
    columns = [x.new_ones(1, 1, 1, 1).expand(*x.shape[:3], parts)]
    if s is not None:
        bias = s[..., None].to(torch.promote_types(s.dtype, torch.float32)) * D**0.5
        columns = [bias.to(x.dtype)]
        if parts == 2:
            # √D·s needs more bits than a half has: a second column carries what the first left out.
            high = _cut(bias.detach(), x.dtype)
            lost = torch.where(bias.isinf(), 0.0, bias - high)
            columns = [high.to(x.dtype), lost.to(x.dtype)]  # the gradients of both are equal: one of them is enough
    x = torch.cat([x, *columns], dim=-1)
    return F.pad(x, (0, width - x.shape[-1]))


def _cut(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in float32 with the bits that ``dtype`` has no room for at zero.

    Bits, because torch.compile takes ``x.to(dtype).to(x.dtype)`` for x where both are in one kernel.
    """
    too_many = round(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)  # 2 ** (bits without room)
    return (x.float().contiguous().view(torch.int32) & -too_many).view(torch.float32)


@torch.library.custom_op("small_doge::widen", mutates_args=())
def _widen(x: torch.Tensor, s: torch.Tensor | None, width: int) -> torch.Tensor:
    """``_append`` for 16-bit floats, laid out in memory in the order of x."""
    B, N, T, D = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = _like(x, width)
    run: Any = kernels("dynamic_mask.triton_fold")
    run.widen[(-(-T // 32), B * N)](
        x, None if s is None else s.float().contiguous(), out, *x.stride()[:3], *out.stride()[:3], T, N, D**0.5,
        D=D, BLOCK_D=power_of_2(D), W=width, EXTRA=power_of_2(width - D), ROWS=32,
    )  # fmt: skip
    return out


def _like(x: torch.Tensor, width: int) -> torch.Tensor:
    """Uninitialised (B, N, T, width), the heads of a position side by side if they are in x (B, N, T, D)."""
    B, N, T, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(B, T, N, width).transpose(1, 2)
    return x.new_empty(B, N, T, width)


@_widen.register_fake
def _(x, s, width):
    return _like(x, width)


def _remember(ctx, inputs, output):
    x, s, _ = inputs
    ctx.D, ctx.scores = x.shape[-1], None if s is None else s.dtype


def _narrow(ctx, grad):
    D = ctx.D
    # Both columns have the same gradient; that of s is one of them, times √D.
    return grad[..., :D], None if ctx.scores is None else (grad[..., D].float() * D**0.5).to(ctx.scores), None


_widen.register_autograd(_narrow, setup_context=_remember)


def _cudnn_takes_unequal_heads(q: torch.Tensor) -> bool:
    """Whether q and k may be wider than v: on Hopper, measured: 0.83 ms instead of 1.27."""
    if not q.is_cuda or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(q.device)[0] == 9 and _cudnn_version() >= 91900


@torch.compiler.assume_constant_result
def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0
