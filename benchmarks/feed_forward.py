"""Four feed-forward designs with experts, as layers of equal size: SEIMoE, PKM, PEER, CDMoE. See ``experts.py``.

N experts, of which a token takes k = ratio · N:

    SEIMoE   shared-expert isolation, as in DeepSeekMoE (arXiv:2401.06066): one SwiGLU for every token, and N routed
             SwiGLU experts, weighted by a softmax over N. ``loop`` sorts the pairs of token and expert once, then
             goes through the experts one by one, as is usual; ``grouped`` multiplies all of them at once
             (torch._grouped_mm)
    PKM      product-key memory (arXiv:1907.05242): 4 heads of queries, two sets of √N sub-keys each, the best of all
             pairs of the best halves, and an embedding_bag of the N values
    PEER     a mixture of a million experts (arXiv:2407.04153): 8 heads, the same retrieval, N experts of one hidden
             unit with GELU. ``gathers`` is the paper's listing, which takes the rows and multiplies; ``our kernels`` is
             small_doge's retrieval and experts, which know SiLU instead
    CDMoE    small_doge.models.moe.DogeCDMoE, as the model runs it; ``gathers`` takes rows and multiplies

Equal size is the same hidden size C, the same N and k, and the same number of active parameters as far as a design
permits. CDMoE sets it: 3·C·F of its SwiGLU, 2·C a taken expert, 2·C·√N of its router. SEIMoE cuts F / 2 hidden units
into N experts (one unit each at the least), and its shared expert gets the width that makes its active parameters those
of CDMoE, to the nearest 16 units. PKM and PEER replace the SwiGLU in their papers and have none here, so they are
smaller by what it has. Their k is over all heads, which share it evenly (at k < 8, or 12, there are fewer heads); two
heads may take the same expert, so at ratio 1 they look up N rows, not N different ones. ``level`` gives both, beside
them, the SwiGLU that makes their active parameters those of CDMoE too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from small_doge.models import DogeConfig
from small_doge.models.moe import DogeCDMoE
from small_doge.ops.product_key import experts, gathered, reference, route

LOOP, GROUPED, MEMORY = "SEIMoE, loop", "SEIMoE, grouped", "PKM"
PEER_GATHERS, PEER_OURS = "PEER, gathers", "PEER, our kernels"
GATHERS, OURS = "CDMoE, gathers", "CDMoE"
# Copies of tokens × k × C numbers that are alive at once, forward and in training, in the dtype of the parameters.
COPIES = {
    LOOP: (0, 1),
    GROUPED: (3, 6),
    MEMORY: (0, 0),
    PEER_GATHERS: (2, 6),
    PEER_OURS: (0, 0),
    GATHERS: (7, 14),
    OURS: (0, 0),
}
ALIGN = 8  # numbers: torch._grouped_mm wants rows, and groups of rows, that start at multiples of 16 bytes
GROUPS = 512  # experts of one call; on a GPU it takes fewer than 1,024


def normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.02)


class SEIMoE(nn.Module):
    """A SwiGLU for every token, and k of N SwiGLU experts of ``width`` hidden units, weighted by a softmax over N."""

    def __init__(self, C: int, shared: int, N: int, k: int, width: int, grouped: bool):
        super().__init__()
        self.k, self.width, self.grouped = k, width, grouped
        self.router = nn.Linear(C, N, bias=False)
        self.shared_gate_up, self.shared_down = nn.Linear(C, 2 * shared, bias=False), nn.Linear(shared, C, bias=False)
        self.gate_up, self.down = normal(N, 2 * width, C), normal(N, width, C)
        self.per_expert = 3 * C * width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, C) → (n, C)."""
        weights, indices = self.router(x).float().softmax(-1).topk(self.k, dim=-1, sorted=False)
        gate, up = self.shared_gate_up(x).chunk(2, dim=-1)
        out = self.shared_down(F.silu(gate) * up)
        picked, order = indices.flatten().int().sort(stable=True)  # by expert, then by token
        tokens, weights = order // self.k, weights.to(x.dtype).flatten()[order, None]
        return (self._grouped if self.grouped else self._loop)(x, out, picked, tokens, weights)

    def _loop(
        self, x: torch.Tensor, out: torch.Tensor, picked: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        counts = torch.bincount(picked, minlength=len(self.down)).tolist()
        # `unbind` once: indexing a stack in the loop would make a gradient of the whole stack for every expert.
        each = zip(tokens.split(counts), weights.split(counts), self.gate_up.unbind(), self.down.unbind(), strict=True)
        for of_expert, weight, gate_up, down in each:
            if len(of_expert):
                gate, up = F.linear(x.index_select(0, of_expert), gate_up).chunk(2, dim=-1)
                # The weight is applied to the few hidden numbers, so that no copy of the output has to be kept.
                out = out.index_add_(0, of_expert, (F.silu(gate) * up * weight) @ down)
        return out

    def _grouped(
        self, x: torch.Tensor, out: torch.Tensor, picked: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        n, (N, _, C) = len(x), self.down.shape
        counts = torch.bincount(picked, minlength=N)
        room = (counts + ALIGN - 1) // ALIGN * ALIGN
        ends = room.cumsum(0)
        places = torch.arange(len(picked), device=x.device) + (ends - room - counts.cumsum(0) + counts)[picked]
        total = len(picked) + ALIGN * N  # the most there can be, so that nobody waits to hear how many there are
        ends[-1] = total
        # Places that are left over hold token n, which is zeros, with weight zero.
        source = tokens.new_full((total,), n).index_copy_(0, places, tokens)
        scale = weights.new_zeros(total, 1).index_copy_(0, places, weights)
        padded, out, extra = F.pad(x, (0, 0, 0, 1)), F.pad(out, (0, 0, 0, 1)), -self.width % ALIGN
        gate_up = F.pad(self.gate_up.view(N, 2, self.width, C), (0, 0, 0, extra)).flatten(1, 2).transpose(1, 2)
        down = F.pad(self.down, (0, 0, 0, extra))
        begin = 0
        for e, end in zip(range(0, N, GROUPS), [*ends[GROUPS - 1 : -1 : GROUPS].tolist(), total], strict=True):
            offsets, here = (ends[e : e + GROUPS] - begin).int(), source[begin:end]
            rows = padded.index_select(0, here)
            gate, up = torch._grouped_mm(rows, gate_up[e : e + GROUPS], offs=offsets).chunk(2, dim=-1)
            hidden = F.silu(gate) * up * scale[begin:end]
            out = out.index_add_(0, here, torch._grouped_mm(hidden, down[e : e + GROUPS], offs=offsets))
            begin = end
        return out[:n]


class ProductKeys(nn.Module):
    """For each of ``heads`` queries of a token, the best of √N × √N pairs of sub-keys; published code, line by line."""

    def __init__(self, C: int, N: int, k: int, heads: int, size: int, ours: bool = False):
        super().__init__()
        self.K, self.heads, self.each, self.ours = math.isqrt(N), heads, k // heads, ours
        self.query, self.norm = nn.Linear(C, heads * size, bias=False), nn.BatchNorm1d(heads * size)
        self.keys = normal(2, heads, self.K, size // 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, C) → weights and indices, (n, k)."""
        halves = self.norm(self.query(x)).view(len(x), self.heads, 2, -1)
        scores = torch.einsum("nhsd,shkd->nhsk", halves, self.keys)
        if self.ours:
            weights, indices = route(scores.reshape(-1, 2 * self.K), self.each)
            return weights.view(len(x), -1), indices.view(len(x), -1)
        best, places = scores.topk(min(self.each, self.K), dim=-1)
        sums = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(-2)
        pairs = (places[:, :, 0, :, None] * self.K + places[:, :, 1, None, :]).flatten(-2)
        sums, chosen = sums.topk(self.each, dim=-1)
        return sums.softmax(-1).flatten(1), pairs.gather(-1, chosen).flatten(1)


class PKM(nn.Module):
    """The weighted sum of the values of k product keys."""

    def __init__(self, C: int, N: int, k: int):
        super().__init__()
        self.retrieval = ProductKeys(C, N, k, math.gcd(4, k), max(2, C // 2))
        self.values, self.per_expert = normal(N, C), C

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, C) → (n, C)."""
        weights, indices = self.retrieval(x)
        values = self.values
        if torch.is_grad_enabled() and x.is_cuda:  # there the weights get no gradient in bfloat16
            weights, values = weights.float(), values.float()
        return F.embedding_bag(indices, values, mode="sum", per_sample_weights=weights).to(x.dtype)


class PEER(nn.Module):
    """Experts of one hidden unit found by product keys."""

    def __init__(self, C: int, N: int, k: int, ours: bool):
        super().__init__()
        self.ours = ours
        self.retrieval = ProductKeys(C, N, k, math.gcd(8, k), max(2, C // 8), ours)
        self.down, self.up, self.per_expert = normal(N, C), normal(N, C), 2 * C

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, C) → (n, C)."""
        weights, indices = self.retrieval(x)
        if self.ours:
            return experts(x, self.down, self.up, indices, weights)
        hidden = F.gelu(torch.einsum("nc,nkc->nk", x, F.embedding(indices, self.down))) * weights
        return torch.einsum("nk,nkc->nc", hidden, F.embedding(indices, self.up))


class CDMoE(nn.Module):
    """The layer of the model, or the same with ``gathered`` for its experts."""

    def __init__(self, C: int, intermediate: int, N: int, k: int, plain: bool):
        super().__init__()
        fields: dict[str, Any] = {"hidden_size": C, "intermediate_size": intermediate, "num_attention_heads": 1}
        self.layer = DogeCDMoE(DogeConfig(**fields, is_moe=True, num_experts=N, num_experts_per_tok=k))
        self.plain, self.per_expert = plain, 2 * C

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, C) → (n, C)."""
        if not self.plain:
            return self.layer(x[None])[0][0]
        weights, indices = route(self.layer.router_gate(x), self.layer.num_experts_per_tok)
        tables = self.layer.down_embed.weight, self.layer.up_embed.weight
        return super(DogeCDMoE, self.layer).forward(x) + gathered(x, *tables, indices, weights)


class Beside(nn.Module):
    """A layer, and a SwiGLU for every token."""

    def __init__(self, layer: Any, C: int, width: int):
        super().__init__()
        self.layer, self.per_expert = layer, layer.per_expert
        self.gate_up, self.down = nn.Linear(C, 2 * width, bias=False), nn.Linear(width, C, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, C) → (n, C)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up) + self.layer(x)


def parameters(layer: Any, N: int, k: int) -> tuple[int, int]:
    """Of a layer: all of them, and those that a token meets."""
    total = sum(p.numel() for p in layer.parameters())
    return total, total - (N - k) * layer.per_expert


def makers(C: int, intermediate: int, N: int, k: int, level: bool = False) -> dict[str, Callable[[], Any]]:
    """A function for each contender that makes its layer."""
    width = max(1, intermediate // (2 * N))
    active = C * (3 * intermediate + 2 * k + 2 * math.isqrt(N))  # of CDMoE

    def missing(others: int) -> int:
        units = (active - others) / (3 * C)
        if units < 16:
            raise SystemExit(f"{k} of {N} experts need an --intermediate above {intermediate} to be of equal size")
        return 16 * round(units / 16)

    def levelled(layer: Any) -> Any:
        return Beside(layer, C, missing(parameters(layer, N, k)[1])) if level else layer

    shared = missing(C * N + 3 * C * width * k)
    return {
        LOOP: lambda: SEIMoE(C, shared, N, k, width, False),
        GROUPED: lambda: SEIMoE(C, shared, N, k, width, True),
        MEMORY: lambda: levelled(PKM(C, N, k)),
        PEER_GATHERS: lambda: levelled(PEER(C, N, k, False)),
        PEER_OURS: lambda: levelled(PEER(C, N, k, True)),
        GATHERS: lambda: CDMoE(C, intermediate, N, k, True),
        OURS: lambda: CDMoE(C, intermediate, N, k, False),
    }


def all_experts(layer: Any, x: torch.Tensor, k: int) -> torch.Tensor:
    """What a layer computes, in float64, as products with all experts, of which those not taken weigh nothing."""
    if isinstance(layer, CDMoE):
        inner, y = layer.layer, x.double()
        r = inner.router_gate(x).double()
        inner.double()
        routed = reference(y, r, inner.down_embed.weight, inner.up_embed.weight, k)[0]
        return super(DogeCDMoE, inner).forward(y) + routed
    if isinstance(layer, SEIMoE):
        weights, indices = layer.router(x).float().softmax(-1).topk(k)
    else:
        weights, indices = layer.retrieval(x)
    x, layer = x.double(), layer.double()
    table = layer.values if isinstance(layer, PKM) else layer.down
    share = x.new_zeros(len(x), len(table)).scatter_add(1, indices, weights.double())
    if isinstance(layer, PKM):
        return share @ layer.values
    if isinstance(layer, PEER):
        return ((F.silu if layer.ours else F.gelu)(x @ layer.down.T) * share) @ layer.up
    gate, up = torch.einsum("nc,ewc->new", x, layer.gate_up).chunk(2, dim=-1)
    routed = torch.einsum("new,ewc,ne->nc", F.silu(gate) * up, layer.down, share)
    gate, up = layer.shared_gate_up(x).chunk(2, dim=-1)
    return layer.shared_down(F.silu(gate) * up) + routed


@torch.no_grad()
def check(device: torch.device, dtype: torch.dtype) -> None:
    """Each contender on a few tokens, against :func:`all_experts`."""
    torch.manual_seed(0)
    x = torch.randn(40, 64, device=device, dtype=dtype)
    for name, make in makers(64, 256, 16, 4).items():
        layer = make().to(device, dtype)
        got, expected = layer(x).double(), all_experts(layer, x, 4)
        error = float((got - expected).norm() / expected.norm())
        if not error < (1e-4 if dtype == torch.float32 else 0.05):
            raise SystemExit(f"{name} computes something else: relative error {error:.2g}")
