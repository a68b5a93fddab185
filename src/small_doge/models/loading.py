"""Opening a model folder for use, with mistakes told in one sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .. import artifacts
from ..errors import UserError

_RUN_FILE = "run.json"  # that of training, which this may not import: it says which run a folder has begun

if TYPE_CHECKING:
    from .modeling_doge import DogeForCausalLM


def load_model(model: str | os.PathLike, **kwargs) -> DogeForCausalLM:
    """A Doge language model from a folder or a Hub name, in eval mode; ``kwargs`` go to ``from_pretrained``.

    Raises:
        UserError: if there is no such model, its training is not finished, it is not a Doge model, or its weights are
            cut short or do not fit.
    """
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    from .modeling_doge import DogeForCausalLM

    name = os.fspath(model)
    looks_local = os.path.exists(name) or name.count("/") != 1 or name.startswith((".", "/"))
    if looks_local and not os.path.isfile(os.path.join(name, "config.json")):
        _refuse_unfinished(name)
        found = "is a folder without a config.json" if os.path.isdir(name) else "does not exist"
        raise UserError(f"model {name} {found}; expected a folder that pretraining or save_pretrained wrote")
    disable_progress_bar()  # a small model is read in an instant
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "doge":
            raise UserError(f"model {name} is of type {config.model_type!r}, expected 'doge'")
        loaded, info = DogeForCausalLM.from_pretrained(name, config=config, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise UserError(f"the weights of model {name} are cut short or damaged ({error})") from error
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"model {name} cannot be opened: {str(error).strip().splitlines()[0]}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"the weights of model {name} lack {len(missing)} tensors, the first {missing[0]}")
    return loaded.eval()


def load_causal_lm(model: str | os.PathLike) -> Any:
    """A causal language model of any architecture: Doge as :func:`load_model` opens it, others as transformers does.

    Raises:
        UserError: if there is none, or it cannot be opened.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = os.fspath(model)
    if not os.path.isfile(os.path.join(name, "config.json")):
        return load_model(name)  # which says what is wrong with the name, or asks the Hub
    try:
        if AutoConfig.from_pretrained(name).model_type == "doge":
            return load_model(name)
        return AutoModelForCausalLM.from_pretrained(name).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model {name} cannot be opened: {str(error).strip().splitlines()[0]}") from error


def _refuse_unfinished(folder: str) -> None:
    """Raise UserError for a folder whose training was begun and not finished, saying what can be done with it."""
    run = Path(folder, _RUN_FILE)
    if not run.is_file():
        return
    stage = artifacts.read_json(run).get("stage", "pretrain")  # whose run.json does not say
    checkpoints = [file.parent for file in Path(folder).glob("checkpoint-*/config.json")]
    newest = max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    instead = f", or give its newest checkpoint, {newest}, as the model" if newest else ""
    raise UserError(
        f"model {folder} is a `doge {stage}` run that is not finished; run the same command again to finish it{instead}"
    )
