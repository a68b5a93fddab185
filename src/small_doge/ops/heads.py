"""From hidden states to the heads of attention: one product for q, k and v, RMSNorm and rotation of q and k."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .gpu import kernels, power_of_2, usable
from .products import multiply, scaled_product
from .residual import Stream, gradient_of_stream

_BLOCK, _WARPS = 16, 4  # tokens and warps of a program


def can_project_heads(x: torch.Tensor, head_dim: int) -> bool:
    """Whether :func:`projected_heads` has kernels for the device and dtype of x."""
    return usable(x) and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and head_dim % 2 == 0


def projected_heads(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norms: tuple[torch.Tensor, torch.Tensor],
    angles: tuple[torch.Tensor, torch.Tensor],
    scorer: tuple[torch.Tensor, torch.Tensor | None],
    H: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of one matrix product, q and k with RMSNorm over each head (arXiv:1910.07467) and then rotated, and a
    linear layer of v, whose gradient joins that of v where this is written.

    What is between the product and attention is read and written once, in float32 in between; left to torch.compile it
    is four kernels forward and seven backward, which at 320M took a fourteenth of a training step.

    Args:
        x: (B, T, C).
        weight: ((H + 2 G)·D, C), bias likewise or None: q, k and v one below the other.
        norms: weights of the two norms, (D,) each.
        angles: cos and sin, (B or 1, 1, T, D/2), of the pairs (x_d, x_{d+D/2}).
        scorer: weight (M, G·D) and bias (M,) or None of the layer of v.
        H: how many heads q has.
        eps: of the norms.

    Returns:
        q (B, H, T, D), k and v (B, G, T, D) in the dtype of the product, which is autocast's where that is on; v is a
        view of the product, q and k are laid out as (B, T, heads, D); and the layer of v (B, T, M).
    """
    products = [x, weight, bias, *scorer]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        products = [None if y is None else y.to(dtype) for y in products]
    return _ProjectedHeads.apply(*products, *norms, *angles, H, eps)


def heads_of_stream(
    stream: Stream,
    norm: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor],
    angles: tuple[torch.Tensor, torch.Tensor],
    scorer: tuple[torch.Tensor, torch.Tensor | None],
    H: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Stream]:
    """:func:`projected_heads` of RMSNorm(y) · norm of a stream y (B, T, C) by products that do all of it (see
    residual.py), and y for :func:`.residual.add_product`, whose gradients of y and scale are given here.

    Args:
        norm, scale: (C,), of the norm and of the stream.
        weight, norms, angles, scorer, H, eps: as there.
    """
    dtype = stream.high.dtype
    products = [(weight * norm).to(dtype), None, *(None if x is None else x.to(dtype) for x in scorer)]
    q, k, v, scored, high = _ProjectedHeads.apply(stream.high, *products, *norms, *angles, H, eps, stream.rstd, scale)
    return q, k, v, scored, stream._replace(high=high)


class _ProjectedHeads(torch.autograd.Function):
    """The products are part of it, as their gradient is then written in one piece, that of v too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scorer: torch.Tensor,
        scorer_bias: torch.Tensor | None,
        q_norm: torch.Tensor,
        k_norm: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        H: int,
        eps: float,
        rstd: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """With rstd and scale, x is that of a stream, and comes out last as it is."""
        if rstd is not None:
            qkv = scaled_product(x.flatten(0, 1), rstd.flatten(), weight).view(*x.shape[:2], -1)
        elif bias is None:
            qkv = multiply(x.flatten(0, 1), weight.T).view(*x.shape[:2], -1)
        else:
            qkv = F.linear(x, weight, bias)
        q, k, scored = _forward(qkv, q_norm, k_norm, cos, sin, scorer, H, eps)
        ctx.save_for_backward(x, weight, qkv, q_norm, k_norm, cos, sin, scorer, rstd, scale)
        ctx.eps = eps
        v = qkv[..., -scorer.shape[1] :].unflatten(-1, (-1, q.shape[3])).transpose(1, 2)
        heads = q, k, v, scored if scorer_bias is None else scored + scorer_bias
        return heads if rstd is None else (*heads, x.view_as(x))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, qkv, *norms, cos, sin, scorer, rstd, scale = ctx.saved_tensors
        d_qkv, d_norms, dots = _backward(*grads[:4], qkv, *norms, cos, sin, scorer, rstd, ctx.eps)
        needs, flat, d_scored = ctx.needs_input_grad, d_qkv.flatten(0, 1), grads[3].flatten(0, 1)
        d_weight = flat.T @ x.flatten(0, 1) if needs[1] else None
        d_bias = flat.sum(0) if needs[2] else None
        d_scorer = d_scored.T @ qkv[..., -scorer.shape[1] :].flatten(0, 1) if needs[3] else None
        d_scorer_bias = d_scored.sum(0) if needs[4] else None
        rest = (part.to(norm.dtype) for part, norm in zip(d_norms.sum(0), norms, strict=True))
        if rstd is None:
            dx, d_scale = multiply(flat, weight).view_as(x), None
        else:
            dx, d_scale = gradient_of_stream(flat, weight, grads[4], scale, x, rstd, dots)
        return dx, d_weight, d_bias, d_scorer, d_scorer_bias, *rest, None, None, None, None, None, d_scale


def _arguments(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, scorer: torch.Tensor, eps: float
) -> tuple[dict[str, Any], int]:
    """What both kernels take besides tensors, and how many programs there are."""
    B, H, T, D = q.shape
    N = B * T
    arguments = {"N": N, "T": T, "angle_stride": 0 if cos.shape[0] == 1 else T * (D // 2), "eps": eps}
    arguments |= {"H": H, "G": k.shape[1], "D": D, "BLOCK": _BLOCK, "HALF": power_of_2(D // 2)}
    arguments |= {"M": scorer.shape[0], "num_warps": _WARPS}
    return arguments, -(-N // _BLOCK)


def _empty(qkv: torch.Tensor, H: int, D: int, M: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised (B, H, T, D) and (B, G, T, D), the heads of a position side by side, and (B, T, M)."""
    G = (qkv.shape[2] // D - H) // 2
    q, k = (qkv.new_empty(*qkv.shape[:2], heads, D).transpose(1, 2) for heads in (H, G))
    return q, k, qkv.new_empty(*qkv.shape[:2], M)


@torch.library.custom_op("small_doge::norm_and_rotate", mutates_args=())
def _forward(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scorer: torch.Tensor,
    H: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, H, T, D), k (B, G, T, D) and the layer of v (B, T, M) of qkv (B, T, (H + 2 G)·D)."""
    q, k, scored = _empty(qkv, H, q_norm.shape[0], scorer.shape[0])
    arguments, programs = _arguments(q, k, cos, scorer, eps)
    # what tensor cores multiply has sides of at least 16
    arguments |= {"WIDTH": power_of_2(arguments["D"], 16), "SCORES": power_of_2(arguments["M"], 16)}
    inputs = (x.contiguous() for x in (qkv, q_norm, k_norm, cos, sin, scorer))
    kernels("triton_heads").forward[(programs,)](*inputs, q, k, scored, **arguments)
    return q, k, scored


@_forward.register_fake
def _(qkv, q_norm, k_norm, cos, sin, scorer, H, eps):
    return _empty(qkv, H, q_norm.shape[0], scorer.shape[0])


@torch.library.custom_op("small_doge::norm_and_rotate_backward", mutates_args=())
def _backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    d_scored: torch.Tensor,
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scorer: torch.Tensor,
    rstd: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of qkv, those of both norms in float32 and in parts that are to be summed (programs, 2, D), in the
    same bits for the same inputs, and with rstd, of a product that was scaled by it, the first times rstd, and for each
    token the sum of gradients and qkv (B·T,)."""
    arguments, programs = _arguments(dq, dk, cos, scorer, eps)
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    norms = torch.empty(programs, 2, arguments["D"], dtype=torch.float32, device=qkv.device)
    dots = norms.new_empty(0 if rstd is None else arguments["N"])
    inputs = (x.contiguous() for x in (qkv, q_norm, k_norm, cos, sin, scorer, dots if rstd is None else rstd))
    grads = [*(x if x.stride(3) == 1 else x.contiguous() for x in (dq, dk, dv)), d_scored]
    strides = [stride for x in grads for stride in x.stride()[:3]]
    arguments["SCALED"] = rstd is not None
    kernels("triton_heads").backward[(programs,)](*inputs, *grads, out, norms, dots, *strides, **arguments)
    return out, norms, dots


@_backward.register_fake
def _(dq, dk, dv, d_scored, qkv, q_norm, k_norm, cos, sin, scorer, rstd, eps):
    programs = -(-qkv.shape[0] * qkv.shape[1] // _BLOCK)
    norms = qkv.new_empty(programs, 2, q_norm.shape[0], dtype=torch.float32)
    dots = norms.new_empty(0 if rstd is None else rstd.numel())
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), norms, dots
