"""One token over the slots of a bounded cache: the kernels (in Triton's interpreter) against PyTorch and float64."""

import importlib
import os

import pytest
import torch

decoding = importlib.import_module("small_doge.ops.dynamic_mask.decode")

pytest.importorskip("triton", reason="needs Triton, which is there on Linux only")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run on the GPU here")


def slots(B, M, N, D, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(B, M, N, D, generator=g).to(dtype) for _ in range(2))
    ranks = torch.stack([torch.randperm(10 * N, generator=g)[:N] for _ in range(B * M)]).view(B, M, N)
    return k, v, torch.randn(B, M, N, generator=g) * 3, ranks


@pytest.mark.parametrize(("B", "H", "M", "N", "D"), [(1, 1, 1, 1, 16), (2, 4, 2, 37, 80), (1, 6, 3, 300, 128)])
@pytest.mark.parametrize("taken", ["all", "some", "masked"])
def test_decode_in_kernels_is_attention_in_float64(B, H, M, N, D, taken):
    k, v, s, _ = slots(B, M, N, D, torch.float16)  # the interpreter cuts bfloat16 off where a GPU rounds
    if taken == "some":  # the first slots of a row: no longer in one piece
        k, v, s = (x[:, :, : max(1, N // 2)] for x in (k, v, s))
    if taken == "masked":
        s = s.masked_fill(torch.arange(N) % 3 == 1, float("-inf"))
    # as the model has it: a view of (B, 1, H, D)
    q = torch.randn(B, 1, H, D, generator=torch.Generator().manual_seed(1)).half().transpose(1, 2)
    exact_k, exact_v, exact_s = (x.double().repeat_interleave(H // M, dim=1) for x in (k, v, s))
    logits = (exact_k @ q.double().transpose(-1, -2))[..., 0] / D**0.5 + exact_s
    expected = (logits.softmax(-1)[..., None, :] @ exact_v).squeeze(2)
    for got in (decoding._decode(q, k, v, s), decoding.decode(q, k, v, s)):
        assert ((got[:, :, 0].double() - expected).norm() / expected.norm()).item() < 2e-3
    torch.library.opcheck(decoding._decode, (q, k, v, s))


@pytest.mark.parametrize(("B", "M", "N", "D"), [(1, 1, 1, 16), (2, 3, 37, 80), (1, 2, 2100, 16)])
def test_replacing_in_kernels_is_replacing_in_pytorch(B, M, N, D):
    held = slots(B, M, N, D, torch.float32)
    other = [x.clone() for x in held]
    for step in range(4):
        k, v, s, ranks = slots(B, M, 1, D, torch.float32, seed=step + 1)
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        ranks = held[3].amin(-1, keepdim=True) + (torch.arange(M)[:, None] + step) % 3 * 2 - 2  # not all enter
        new = (k, v, s, ranks.clamp(min=-1 - step))
        decoding.replace_worst(held, new)
        decoding._replace_worst(*other, *new)
        assert all(torch.equal(x, y) for x, y in zip(held, other, strict=True))
    torch.library.opcheck(decoding._replace_worst, (*other, *new))
