"""What a model is made of, what its state weighs, and which attention path a shape takes here and why."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError


@dataclass
class InfoRecipe:
    """A model and the shape to ask about."""

    model: str = field(metadata={"help": "model folder, or a size such as 20m"})
    rows: int = field(default=1, metadata={"help": "rows of a batch"})
    length: int = field(default=2048, metadata={"help": "tokens of a row"})
    dtype: str = field(default="", metadata={"help": "of attention; by default bfloat16 on a GPU, float32 on a CPU"})
    device: str = field(default="", metadata={"help": "cpu or cuda; by default a GPU if there is one"})
    packed: bool = field(default=False, metadata={"help": "whether rows hold several documents, or padding"})

    def __post_init__(self) -> None:
        for name in ("rows", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least 1")


def info(recipe: InfoRecipe) -> dict[str, str]:
    """Print the facts, a line each; returns them.

    Raises:
        UserError: if there is no such model, dtype or device.
    """
    import torch
    import transformers

    from ..models import DogeForCausalLM
    from ..ops.dynamic_mask import FORCE, choose_path

    config = _config(recipe.model)
    kind = recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"`device` is {kind!r}, expected cpu{', or cuda' if torch.cuda.is_available() else ' here'}")
    dtype = getattr(torch, recipe.dtype or ("bfloat16" if kind == "cuda" else "float32"), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"`dtype` is {recipe.dtype!r}, expected a floating point type such as bfloat16")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DogeForCausalLM(config).parameters())
    H, G, M, D = config.heads
    w, held = config.keep_window_size, config.keep_window_size + config.local_window
    # One number seen as many: shapes cost nothing.
    shapes = ((recipe.rows, H, recipe.length, D), (recipe.rows, G, recipe.length, D))
    q, k = (torch.empty(1, device=kind, dtype=dtype).expand(shape) for shape in shapes)
    try:
        path, why = choose_path(q, k, w, packed=recipe.packed)
    except ValueError as error:
        raise UserError(str(error)) from error

    def state(heads: int, keys: int, extra: int) -> str:
        size = config.num_hidden_layers * recipe.rows * heads * keys * (2 * D * dtype.itemsize + extra)
        return f"{size / 2**20:,.1f} MiB"

    lifetime = config.score_lifetime
    ageing = f"; a score higher by 1 makes up for {lifetime:g} tokens of age" if lifetime else ""
    name = torch.cuda.get_device_name() if kind == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    facts = {
        "model": f"{recipe.model}: {parameters:,} parameters, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, a vocabulary of {config.vocab_size:,}",
        "heads": f"{H} for queries, {G} for keys and values, {M} for scores, of size {D}",
        "window": f"{w:,} keys a head, and the last {config.local_window} whatever their score{ageing}",
        "device": f"{name}; torch {torch.__version__}, transformers {transformers.__version__}",
        "attention": f"{path} for {recipe.rows} × {recipe.length:,} tokens in {str(dtype)[6:]}: {why}",
        "cache": f"{state(M, min(recipe.length, held), 12)} after {recipe.length:,} tokens, at most "
        f"{state(M, held, 12)}; one that keeps every key has {state(G, recipe.length, 0)}",
    }
    if config.is_moe:
        N, k, idle = config.num_experts, config.num_experts_per_tok, config.num_experts - config.num_experts_per_tok
        used = parameters - 2 * config.num_hidden_layers * idle * config.hidden_size
        facts["experts"] = f"{k:,} of {N:,} for each token in every layer; a token meets {used:,} of the parameters"
    if FORCE not in os.environ:
        facts["force"] = f"{FORCE}=reference|folded|chunked|sparse takes another path where it can"
    for key, value in facts.items():
        print(f"{key:<10} {value}")
    return facts


def _config(model: str) -> Any:
    """The configuration of a folder or Hub name, or of a size."""
    from transformers import AutoConfig

    from ..models import SIZES, config_for

    if model.lower() in SIZES and not os.path.exists(model):
        return config_for(model)
    if not os.path.isfile(os.path.join(model, "config.json")) and model.count("/") != 1:
        raise UserError(f"model {model} is neither a folder with a config.json nor one of {', '.join(SIZES)}")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"model {model} cannot be opened: {str(error).strip().splitlines()[0]}") from error
    if config.model_type != "doge":
        raise UserError(f"model {model} is of type {config.model_type!r}, expected 'doge'")
    return config
