"""Dynamic Mask Attention while no key can drop out (T ≤ w), for packed documents on a GPU, through Triton kernels.

Here is what calls the kernels: sizes of tiles, allocation, and operators that torch.compile takes as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from ..gpu import kernels

# Tiles (queries, keys, warps, stages) of each kernel, for head sizes up to 128.
Tiles = tuple[int, int, int, int]
HOPPER: dict[str, Tiles] = {
    "forward": (64, 64, 4, 3),
    "backward_queries": (64, 64, 4, 2),
    "backward_keys": (64, 64, 4, 2),
}
EXACT: Tiles = (32, 32, 4, 1)  # for float32: exact, not fast


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """See :func:`small_doge.ops.dynamic_mask.dynamic_mask_attention`, for as many queries as keys, T ≤ w of them.

    The work is that of the pairs within documents. The same inputs give the same bits.

    Args:
        q: (B, H, T, D); k, v: (B, G, T, D); bfloat16, float16 or float32, D up to 128 and a multiple of 8.
        s: (B, M, T).
        documents: (B, T) integers that never fall along a row.

    Returns:
        (B, H, T, D), laid out as (B, T, H, D).
    """
    if s.shape[1] != k.shape[1]:  # a score of its own for every query head
        k, v = (x.repeat_interleave(s.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    documents = documents.contiguous()
    # Where the document of each position starts, and where it ends (exclusive): (B, T) int32.
    starts, ends = (torch.searchsorted(documents, documents, out_int32=True, right=x) for x in (False, True))
    return _forward(q, k, v, s.float().contiguous(), starts, ends)[0]


def takes_heads(q: torch.Tensor) -> bool:
    """Whether the GPU of q (B, H, T, D) is a Hopper, whose copies of blocks this is made for, and can copy such heads.

    On others the kernels spill registers (tests/ops/compile_kernels.py).
    """
    return torch.cuda.get_device_capability(q.device)[0] == 9 and q.shape[3] % 8 == 0


def _descriptor(x: torch.Tensor, rows: int) -> Any:
    """x (B, N, T, D) in blocks of so many positions of one head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    D = x.shape[3]
    unit = 16 // x.element_size()  # what Hopper copies begins at multiples of 16 bytes
    if x.stride(3) != 1 or 0 in x.stride() or any(y % unit for y in x.stride()[:3]) or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, max(16, 1 << (D - 1).bit_length())])


def _launch(kernel: str, q: torch.Tensor, k: torch.Tensor) -> tuple[dict[str, Any], tuple[int, int]]:
    """The arguments that the three kernels share, and the grid of one."""
    (B, H, T, D), M = q.shape, k.shape[1]
    BLOCK_M, BLOCK_N, warps, stages = EXACT if q.dtype == torch.float32 else HOPPER[kernel]
    arguments = {"T": T, "scale": D**-0.5 * 1.4426950408889634, "M": M, "N": H // M, "D": D}
    arguments |= {"BLOCK_D": max(16, 1 << (D - 1).bit_length()), "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    arguments |= {"EXACT": q.dtype == torch.float32, "num_warps": warps, "num_stages": stages}
    return arguments, (-(-T // BLOCK_N), B * M) if kernel == "backward_keys" else (-(-T // BLOCK_M), B * H)


def _like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised (B, N, T, D), the heads of a position side by side."""
    B, N, T, D = x.shape
    return x.new_empty(B, T, N, D).transpose(1, 2)


@torch.library.custom_op("small_doge::packed_forward", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, T, D) and lse (B, H, T) float32."""
    out, lse = _like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    arguments, grid = _launch("forward", q, k)
    M, N = arguments["BLOCK_M"], arguments["BLOCK_N"]
    run: Any = kernels("dynamic_mask.triton_packed")
    run.forward[grid](
        _descriptor(q, M), _descriptor(k, N), _descriptor(v, N), s, starts, out, lse, **arguments
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q, k, v, s, starts, ends):
    return _like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@torch.library.custom_op("small_doge::packed_backward", mutates_args=())
def _backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, ds."""
    dq, dk, dv, ds, delta = _like(q), _like(k), _like(v), torch.empty_like(s), torch.empty_like(lse)
    run: Any = kernels("dynamic_mask.triton_packed")
    for kernel in ("backward_queries", "backward_keys"):
        arguments, grid = _launch(kernel, q, k)
        M, N = arguments["BLOCK_M"], arguments["BLOCK_N"]
        q_, k_, v_, do_ = (_descriptor(x, rows) for x, rows in ((q, M), (k, N), (v, N), (do, M)))
        if kernel == "backward_queries":
            run.backward_queries[grid](q_, k_, v_, s, starts, out, lse, do_, delta, dq, **arguments)
        else:
            run.backward_keys[grid](q_, k_, v_, s, ends, lse, do_, delta, dk, dv, ds, **arguments)
    return dq, dk, dv, ds


@_backward.register_fake
def _(do, q, k, v, s, starts, ends, out, lse):
    return _like(q), _like(k), _like(v), torch.empty_like(s)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx, do, _):
    return *_backward(do, *ctx.saved_tensors), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
