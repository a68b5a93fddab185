"""Dynamic Mask Attention while no key can drop out (T ≤ w), for packed documents on a GPU, through Triton kernels.

Here is what calls the kernels: sizes of tiles, allocation, and operators that torch.compile takes as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..gpu import kernels, power_of_2

LOG2_E = 1.4426950408889634
# Tiles (queries, keys, warps, stages) of each kernel, for head sizes up to 128.
Tiles = tuple[int, int, int, int]
HOPPER: dict[str, Tiles] = {
    "forward": (64, 64, 4, 3),
    "backward_queries": (64, 64, 4, 2),
    "backward_keys": (64, 64, 4, 2),
}
EXACT: Tiles = (32, 32, 4, 1)  # for float32: exact, not fast
# Kernels of gluon_packed.py: four warps to begin with and, when all twelve are there, registers for them from one pool.
PAIRS = {"num_warps": 4, "maxnreg": 168}


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
    s = F.pad(s.float() * LOG2_E, (0, -s.shape[2] % 4))  # what Hopper copies begins at multiples of 16 bytes
    return _forward(q, k, v, s.contiguous(), starts, ends)[0]  # not all padding copies


def takes_heads(q: torch.Tensor) -> bool:
    """Whether the GPU of q (B, H, T, D) is a Hopper, whose copies of blocks this is made for, and can copy such heads.

    On others the kernels spill registers (tests/ops/compile_kernels.py).
    """
    return torch.cuda.get_device_capability(q.device)[0] == 9 and q.shape[3] % 8 == 0


def _pairs(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether two query heads on the same keys go through them together, in gluon_packed.py.

    Gluon is experimental in Triton: only versions for which its kernels were compiled and looked at.
    """
    if q.dtype == torch.float32 or not 64 < q.shape[3] <= 128 or q.shape[1] // k.shape[1] % 2:
        return False
    if not q.is_cuda or not takes_heads(q):
        return False
    import triton

    return triton.__version__.startswith(("3.6.", "3.7."))


def _descriptor(x: torch.Tensor, rows: int, gluon: bool = False) -> Any:
    """x (B, N, T, D) in blocks of so many positions of a head."""
    D = x.shape[3]
    unit = 16 // x.element_size()  # what Hopper copies begins at multiples of 16 bytes
    if x.stride(3) != 1 or 0 in x.stride() or any(y % unit for y in x.stride()[:3]) or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return _blocks(x, x.shape, x.stride(), [1, 1, rows, power_of_2(D, 16)], gluon)


def _rows(x: torch.Tensor, T: int, block: int, gluon: bool = False) -> Any:
    """The first T of each row of x (B, N, T′) float32, in blocks of one row."""
    return _blocks(x, (x.shape[0] * x.shape[1], T), (x.shape[2], 1), [1, block], gluon)


def _blocks(x: torch.Tensor, shape: Sequence[int], stride: Sequence[int], block: list[int], gluon: bool) -> Any:
    """What Hopper needs to copy such blocks of x by itself."""
    if not gluon:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(x, list(shape), list(stride), block)
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia import hopper

    # Heads lie in shared memory as products read them.
    layout = NVMMASharedLayout(0 if x.dtype == torch.float32 else 128, 8 * x.element_size(), len(block))
    return hopper.TensorDescriptor(x, list(shape), list(stride), block, layout)


def _launch(kernel: str, q: torch.Tensor, k: torch.Tensor, s: torch.Tensor) -> tuple[dict[str, Any], tuple[int, int]]:
    """The arguments that the three kernels share, and the grid of one."""
    (B, H, T, D), M = q.shape, k.shape[1]
    BLOCK_M, BLOCK_N, warps, stages = EXACT if q.dtype == torch.float32 else HOPPER[kernel]
    arguments = {"T": T, "stride": s.shape[2], "scale": D**-0.5 * LOG2_E, "M": M, "N": H // M, "D": D}
    arguments |= {"BLOCK_D": power_of_2(D, 16), "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    arguments |= {"EXACT": q.dtype == torch.float32, "num_warps": warps, "num_stages": stages}
    return arguments, (-(-T // BLOCK_N), B * M) if kernel == "backward_keys" else (-(-T // BLOCK_M), B * H)


def _launch_pairs(
    kernel: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    blocks: tuple[torch.Tensor, ...],
    *pointers: torch.Tensor,
) -> None:
    """Run a kernel of gluon_packed.py on q, k, v, s, then others in blocks as q, then some as they are."""
    (B, H, T, D), M = q.shape, k.shape[1]
    rows = 64  # queries of a head, or keys, in a tile
    tiles = -(-T // rows)
    total = tiles * B * H // 2
    programs = min(total, torch.cuda.get_device_properties(q.device).multi_processor_count)
    run: Any = kernels("dynamic_mask.gluon_packed")
    getattr(run, kernel)[(programs,)](
        *(_descriptor(x, rows, gluon=True) for x in (q, k, v)), _rows(s, T, rows, gluon=True),
        *(_descriptor(x, rows, gluon=True) for x in blocks), *pointers, q.new_zeros(1, dtype=torch.int32),
        T, s.shape[2], D**-0.5 * LOG2_E, M, tiles, total, H // M, **PAIRS,
    )  # fmt: skip


def _like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised (B, N, T, D), the heads of a position side by side."""
    B, N, T, D = x.shape
    return x.new_empty(B, T, N, D).transpose(1, 2)


@torch.library.custom_op("small_doge::packed_forward", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, T, D) and lse (B, H, T′) float32, where T′ is that of s (B, M, T′), a multiple of 4."""
    out, lse = _like(q), s.new_empty(*q.shape[:2], s.shape[2])
    if _pairs(q, k):
        _launch_pairs("forward", q, k, v, s, (out,), starts, lse)
        return out, lse
    arguments, grid = _launch("forward", q, k, s)
    M, N = arguments["BLOCK_M"], arguments["BLOCK_N"]
    run: Any = kernels("dynamic_mask.triton_packed")
    run.forward[grid](
        _descriptor(q, M), _descriptor(k, N), _descriptor(v, N), _rows(s, q.shape[2], N), starts, out, lse, **arguments
    )
    return out, lse


@_forward.register_fake
def _(q, k, v, s, starts, ends):
    return _like(q), s.new_empty(*q.shape[:2], s.shape[2])


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
    T = q.shape[2]
    dq, dk, dv, ds, delta = _like(q), _like(k), _like(v), torch.zeros_like(s), torch.empty_like(lse)
    run: Any = kernels("dynamic_mask.triton_packed")
    if pairs := _pairs(q, k):
        _launch_pairs("backward_queries", q, k, v, s, (out, do, dq), starts, lse, delta)
    for kernel in ("backward_keys",) if pairs else ("backward_queries", "backward_keys"):
        arguments, grid = _launch(kernel, q, k, s)
        M, N = arguments["BLOCK_M"], arguments["BLOCK_N"]
        (q_, do_), (k_, v_) = [_descriptor(x, M) for x in (q, do)], [_descriptor(x, N) for x in (k, v)]
        if kernel == "backward_queries":
            run.backward_queries[grid](q_, k_, v_, _rows(s, T, N), starts, out, lse, do_, delta, dq, **arguments)
        else:
            lse_, delta_ = (_rows(x, T, M) for x in (lse, delta))
            run.backward_keys[grid](q_, k_, v_, _rows(s, T, N), ends, lse_, do_, delta_, dk, dv, ds, **arguments)
    return dq, dk, dv, ds


@_backward.register_fake
def _(do, q, k, v, s, starts, ends, out, lse):
    return _like(q), _like(k), _like(v), torch.empty_like(s)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx, do, _):
    return *_backward(do, *ctx.saved_tensors), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
