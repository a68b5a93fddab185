"""The model that a pretraining recipe asks for: fresh, from a folder, or that of a run it continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import set_seed

from ..data.packing import PackedTokens
from ..errors import UserError
from ..models import SIZES, DogeForCausalLM, config_for, load_model
from .continuing import Start, open_model, set_windows, windows


def model_of(
    args: Any, data: PackedTokens, tokenizer: Any, start: Start | None, checkpoint: Path | None
) -> DogeForCausalLM:
    """The model to train, with the balance loss counting for what the recipe says."""
    if start is None:
        model = _fresh_or_from_a_folder(args, data, tokenizer)
    else:
        data.check_tokenizer(args.tokenizer)
        model = open_model(args, start, checkpoint)
    if args.router_aux_loss_coef is not None:
        if not model.config.is_moe:
            raise UserError(f"router_aux_loss_coef is {args.router_aux_loss_coef}, and {args.model} has no experts")
        model.config.router_aux_loss_coef = args.router_aux_loss_coef
    return model


def _fresh_or_from_a_folder(args: Any, data: PackedTokens, tokenizer: Any) -> DogeForCausalLM:
    """A fresh model of a size, or the one in a folder, fitting the vocabulary of the data."""
    vocab_size = data.manifest["vocab_size"]
    data.check_tokenizer(args.tokenizer)
    set_seed(args.seed)
    if args.model.lower() in SIZES:
        row_length = data.manifest["row_length"]
        options: dict[str, Any] = windows(args)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = config_for(args.model, vocab_size=vocab_size, **special, **options)
        config.max_position_embeddings = max(config.max_position_embeddings, row_length)
        return DogeForCausalLM(config)
    model = load_model(args.model)
    if model.config.vocab_size != vocab_size:
        raise UserError(
            f"model {args.model} has a vocabulary of {model.config.vocab_size:,} and the data {args.data} one of "
            f"{vocab_size:,}; expected the same tokenizer for both"
        )
    return set_windows(model, args)
