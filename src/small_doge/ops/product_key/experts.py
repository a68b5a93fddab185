"""Experts of one hidden unit each in plain torch: few tokens, and many without a tensor of tokens × k × C.

out_n = Σ_e weights[n, e] · silu(x_n · down[e]) · up[e], over the k experts e of token n. On an NVIDIA GPU the Triton
kernels of ``fused`` compute the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gathered(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """See :func:`small_doge.ops.product_key.experts`; stores N × k × C numbers, and calls little for a few tokens."""
    (N, C), k, dtype = x.shape, indices.shape[1], x.dtype
    compute = torch.promote_types(dtype, torch.float32)
    down, up = (rows.index_select(0, indices.flatten()).view(N, k, C).to(compute) for rows in (down, up))
    with torch.autocast(x.device.type, enabled=False):
        hidden = F.silu(torch.bmm(down, x.to(compute)[:, :, None])) * weights.to(compute)[:, :, None]  # (N, k, 1)
        return torch.bmm(hidden.transpose(1, 2), up)[:, 0].to(dtype)


def grouped(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """See :func:`small_doge.ops.product_key.experts`; memory O(N·(C + k) + E·C), forward and backward.

    Weighted sums of rows are ``embedding_bag`` without a copy of the rows: over the experts of a token, and, for the
    gradients of ``down`` and ``up``, over the tokens of an expert. 16 bit floats are computed in float32.
    """
    return _forward(x, down, up, indices, weights)[0]


def forward(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (N, C) in the dtype of x, and the dot products x_n · down[e] (N, k)."""
    dtype = x.dtype
    x, down, up, weights = _wide(x.dtype, x, down, up, weights)
    with torch.autocast(x.device.type, enabled=False):
        dots = _dots(x, down, indices)
        return _sum_of_rows(up, indices, weights * F.silu(dots)).to(dtype), dots


def backward(
    do: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    dots: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x (N, C), down and up (E, C), and weights (N, k), each in its dtype.

    Args:
        do: (N, C), the gradient of the output.
        dots: (N, k), from :func:`forward`.
    """
    dtypes = [leaf.dtype for leaf in (x, down, up, weights)]
    do, x, down, up, weights = _wide(x.dtype, do, x, down, up, weights)
    with torch.autocast(x.device.type, enabled=False):
        sigmoid = dots.sigmoid()
        hidden = dots * sigmoid
        dcoefficients = _dots(do, up, indices)  # of weights · hidden
        dweights = dcoefficients * hidden
        ddots = dcoefficients * weights * sigmoid * (1 + dots - hidden)
        dx = _sum_of_rows(down, indices, ddots)
        order, tokens, starts = _by_expert(indices, down.shape[0])
        ddown = _sum_of_rows(x, tokens, ddots.flatten()[order], starts)
        dup = _sum_of_rows(do, tokens, (weights * hidden).flatten()[order], starts)
    dx, ddown, dup, dweights = (d.to(dtype) for d, dtype in zip((dx, ddown, dup, dweights), dtypes, strict=True))
    return dx, ddown, dup, dweights


def _wide(dtype: torch.dtype, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """In float32 (float64 for float64), rows side by side."""
    return [x.to(torch.promote_types(dtype, torch.float32)).contiguous() for x in tensors]


def _dots(x: torch.Tensor, rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """x (N, C), rows (E, C), indices (N, k) → (N, k): x_n · rows[indices[n, e]].

    This is the gradient that ``embedding_bag`` gives its coefficients, and the operator that computes it copies no
    rows: ten times as fast on a CPU as taking the rows and multiplying, and exact where an expert comes twice.
    (``torch.sparse.sampled_addmm`` is no faster, and refuses more entries than N × E.)
    """
    N, k = indices.shape
    n = torch.arange(N, device=x.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, rows, indices.flatten(), n * k, n.repeat_interleave(k), mode=0
    ).view(N, k)


def _sum_of_rows(
    rows: torch.Tensor, indices: torch.Tensor, coefficients: torch.Tensor, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Σ coefficients · rows[indices] over every row of ``indices``, or from one of ``starts`` to the next."""
    return F.embedding_bag(indices, rows, starts, mode="sum", per_sample_weights=coefficients)


def _by_expert(indices: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The places of ``indices`` (N, k) by expert (N·k,), their tokens (N·k,), and where each expert starts (E,)."""
    experts, order = indices.flatten().sort(stable=True)
    starts = torch.searchsorted(experts, torch.arange(E, device=indices.device))
    return order, order // indices.shape[1], starts


_forward = torch.library.custom_op("small_doge::experts_forward", forward, mutates_args=())
_backward = torch.library.custom_op("small_doge::experts_backward", backward, mutates_args=())


@_forward.register_fake
def _(x, down, up, indices, weights):
    dots = torch.empty(indices.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dots


@_backward.register_fake
def _(do, x, down, up, indices, weights, dots):
    return tuple(torch.empty(leaf.shape, dtype=leaf.dtype, device=x.device) for leaf in (x, down, up, weights))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, do, _):
    x, down, up, indices, weights, dots = ctx.saved_tensors
    dx, ddown, dup, dweights = _backward(do, x, down, up, indices, weights, dots)
    return dx, ddown, dup, None, dweights


_forward.register_autograd(_differentiate, setup_context=_save)
