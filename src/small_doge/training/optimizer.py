"""Which parameters decay; and Muon for the matrices, AdamW for everything else, as one optimiser.

PyTorch's own ``torch.optim.Muon`` takes matrices only, so two optimisers would have to be scheduled, saved and resumed
together, and it iterates in bfloat16, which many CPUs have no instructions for.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan, kellerjordan.github.io/posts/muon


# Norms, biases, the residual weights and A scale or shift; pulling them to zero is not what weight decay is for. The
# tables of experts are weights like those of the SwiGLU, row e of each being hidden unit e, and decay as these do.
_NO_DECAY = ("norm.weight", "layernorm.weight", ".bias", "_residual", ".A")
# Matrices in the layers that are not for Muon. It gives all directions of a matrix moves of one size; but the rows of
# the tables are experts on their own, most of which a batch moves little, and the others' outputs are scores.
_NO_MUON = ("down_embed.weight", "up_embed.weight", "router_gate.weight", "dt_proj.weight")


def decayed_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay applies to: the matrices and the embeddings."""
    return [name for name, _ in model.named_parameters() if not name.endswith(_NO_DECAY)]


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Replace the singular values of each matrix by values near 1 (0.7 to 1.2): (n, rows, columns) → the same.

    Newton–Schulz iteration X ← aX + (bA + cA²)X with A = XXᵀ, in bfloat16 on a GPU and in float32 elsewhere.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, and Muon for the groups that say ``muon: True``.

    Muon: M ← μM + G;  W ← W − η · 0.2 √max(rows, columns) · orthogonalize(G + μM), with decoupled weight decay. The
    factor gives an update the size that AdamW's has (Moonlight, arXiv:2502.16982), so that rates compare.

    Args:
        groups: parameter groups; those with ``muon: True`` hold matrices only.
        momentum: μ, Muon's momentum (Nesterov).
        options: as for ``torch.optim.AdamW``.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float = 0.95, **options: Any):
        super().__init__([{"muon": False, "momentum": momentum, **group} for group in groups], **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both; see ``torch.optim.Optimizer.step``."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._muon(group)
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        # A step that is to be left out, which only the device knows: every number below then becomes one that does
        # nothing, exactly.
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        momentum, decay, kept = group["momentum"], 1 - group["lr"] * group["weight_decay"], None
        if found_inf is not None:
            kept = found_inf == 0
            momentum, decay = (torch.where(kept, x, 1.0) for x in (momentum, decay))
        by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.shape].append(p)
        for shape, parameters in by_shape.items():
            for p in parameters:
                if not self.state[p]:
                    # Adam looks for a step in every state that it loads.
                    self.state[p] = {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
                self.state[p]["step"] += 1 if kept is None else kept.to(self.state[p]["step"])
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            gradients = [p.grad for p in parameters if p.grad is not None]
            if kept is not None:
                gradients = [torch.where(kept, g, 0.0) for g in gradients]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
            directions = torch.stack([_whole(d) for d in torch._foreach_add(gradients, buffers, alpha=momentum)])
            updates = orthogonalize(directions) * (-group["lr"] * 0.2 * max(shape) ** 0.5)
            if kept is not None:
                updates = torch.where(kept, updates, 0.0)
            torch._foreach_mul_(parameters, decay)
            torch._foreach_add_(parameters, [_like(u, p) for u, p in zip(updates.unbind(0), parameters, strict=True)])


def _whole(x: torch.Tensor) -> torch.Tensor:
    """All of a matrix of which FSDP keeps a few rows on each device: singular values are those of the whole."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _like(update: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The part of a whole matrix that lies where this part of the parameter does."""
    if not isinstance(parameter, DTensor):
        return update
    # every device has computed the whole, so there is nothing to send
    return distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)


def make_optimizer(model: nn.Module, args: Any) -> torch.optim.Optimizer:
    """The optimiser of a pretraining recipe that asks for Muon, and otherwise AdamW on the same parameters."""
    options: dict[str, Any] = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "fused": True}
    if args.muon_learning_rate:
        groups = parameter_groups(model, args.weight_decay, args.learning_rate, args.muon_learning_rate)
        return MuonAdamW(groups, **options)
    return torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, **options)


def optimizer_name(args: Any) -> str:
    """What a checkpoint's moments are of."""
    return "muon" if args.muon_learning_rate else str(getattr(args.optim, "value", args.optim))


def parameter_groups(
    model: nn.Module, weight_decay: float, learning_rate: float, muon_learning_rate: float
) -> list[dict[str, Any]]:
    """Groups for :class:`MuonAdamW`: matrices inside the layers to Muon, all else to AdamW.

    That is embeddings, tables of experts, what makes scores (of keys, of experts), and vectors.
    """
    decayed = set(decayed_parameters(model))
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "decayed": [], "other": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            inside = ".layers." in name and p.dim() == 2 and not name.endswith(_NO_MUON)
            groups["muon" if inside else "decayed" if name in decayed else "other"].append(p)
    return [
        {"params": groups["muon"], "muon": True, "lr": muon_learning_rate, "weight_decay": weight_decay},
        {"params": groups["decayed"], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": groups["other"], "lr": learning_rate, "weight_decay": 0.0},
    ]
