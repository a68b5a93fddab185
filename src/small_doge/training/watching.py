"""What a run shows beside its loss: what attention keeps, layer by layer, to any of the Trainer's reporters by name."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..data.packing import collate
from ..errors import UserError
from ..models.attention import DogeAttention
from ..ops.dynamic_mask.window import aged, eviction_times
from ..recipe import nearest

ROWS = 2  # of the validation split, the same at every look
# What a look gives for each layer, in the order of `statistics`:
#   A                mean |A|; 0 is a sliding window, as a model begins
#   score_spread     standard deviation of the scores of a row's keys, which are added to the logits
#   evicted          share of keys that leave the window before their document ends
#   seen_distance    how far back the keys lie that a query sees, in tokens, on average
NAMES = ("A", "score_spread", "evicted", "seen_distance")


def require_reporters(args: Any) -> None:
    """Raise UserError if ``report_to`` names one that there is not, or that is not installed."""
    for name in args.report_to or []:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"`report_to` names {name!r}{nearest(name, INTEGRATION_TO_CALLBACK)}, expected tensorboard, trackio, "
                f"wandb or another of transformers' integrations"
            )
        if name in ("tensorboard", "trackio", "wandb") and importlib.util.find_spec(name) is None:
            raise UserError(f"`report_to` names {name}, which is not installed, expected it from `pip install {name}`")


def statistics(attention: DogeAttention, s: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """``NAMES`` of one layer, float32 on the device.

    Args:
        s: (B, M, T) scores.
        position_ids: (B, T); where they do not go up by one another document begins.
    """
    T = s.shape[-1]
    documents = torch.nn.functional.pad((position_ids.diff(dim=-1) != 1).long(), (1, 0)).cumsum(-1)
    config = attention.config
    by = aged(s, config.score_lifetime) if config.score_lifetime else s
    e = eviction_times(by, config.keep_window_size, documents=documents, local_window=config.local_window)
    end = eviction_times(s, T, documents=documents)
    # Key j is seen from distances 0 … e − j − 1.
    seen = (e - torch.arange(T, device=s.device)).float()
    distance = (seen * (seen - 1) / 2).sum() / seen.sum()
    spread = s.float().std(dim=-1).mean()
    return torch.stack([attention.A.float().abs().mean(), spread, (e < end).float().mean(), distance])


@torch.no_grad()
def attention_statistics(trainer: Any, dataset: Any) -> dict[str, float]:
    """``NAMES`` of all layers on the first rows of ``dataset``: one small forward pass, one wait for the device.

    Every process takes part, with the same rows, as none can compute alone where weights are shared out.
    """
    model = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    batch = collate([dataset[i] for i in range(min(ROWS, len(dataset)))])
    batch = {name: x.to(trainer.args.device) for name, x in batch.items()}
    found: list[torch.Tensor] = []

    def scores(layer: DogeAttention, *values: Any) -> torch.Tensor:
        s = type(layer).scores(layer, *values)
        found.append(statistics(layer, s, batch["position_ids"]))
        return s

    layers = [module for module in model.modules() if isinstance(module, DogeAttention)]
    was_training = model.training
    model.eval()
    try:
        for layer in layers:
            layer.scores = partial(scores, layer)  # type: ignore[method-assign]
        with torch.compiler.set_stance("force_eager"):  # what is compiled knows no statistics
            model(**batch, skip_logits=True)
    finally:
        for layer in layers:
            del layer.scores
        model.train(was_training)
    rows = torch.stack(found).tolist()
    return {f"{name}/layer_{i}": x for i, row in enumerate(rows) for name, x in zip(NAMES, row, strict=True)}
