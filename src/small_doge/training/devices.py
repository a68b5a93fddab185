"""How weights lie on many devices, through accelerate: what then can be read, saved and optimised."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as shards

from .. import artifacts
from ..errors import UserError
from .checkpoints import MARKER
from .optimizer import optimizer_name

WEIGHTS_SHARDED = "pytorch_model_fsdp_0"
NEVER_SHARDED = {"cpu", "mps"}  # accelerate passes over FSDP there, and every device holds all

# With several processes on a CPU, transformers 5.17 has moments read to "cpu:0", a place that torch does not know.
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)


def sharding(args: Any) -> str:
    """How weights and moments lie on the devices: "whole", "fsdp full", "fsdp sharded" or "deepspeed"."""
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return "deepspeed"
    version, plugin = _fsdp_version(args), getattr(args, "fsdp_plugin_args", None)
    if version is None:
        return "whole"
    default = "SHARDED_STATE_DICT" if version == 2 else "FULL_STATE_DICT"  # accelerate's
    kind = str((plugin or {}).get("state_dict_type") or os.environ.get("FSDP_STATE_DICT_TYPE", default))
    return "fsdp sharded" if "SHARDED" in kind else "fsdp full"


def _fsdp_version(args: Any) -> int | None:
    """1 or 2 under FSDP, which args or the environment of `accelerate launch` ask for."""
    plugin = getattr(args, "fsdp_plugin_args", None)
    if args.device.type in NEVER_SHARDED:
        return None
    if plugin is not None:
        return int(plugin.get("fsdp_version", 2))
    on = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return int(os.environ.get("FSDP_VERSION", "1")) if on else None


def require_same_sharding(args: Any, checkpoint: Path) -> None:
    """Raise UserError if a run's own checkpoint cannot be read the way its processes now hold weights."""
    there = artifacts.read_json(checkpoint / MARKER).get("sharding", sharding(args))
    if there != sharding(args):
        raise UserError(
            f"checkpoint {checkpoint} holds {there} weights and this run {sharding(args)} ones, expected the same "
            f"kind of launch (any number of processes); or give it as --continue_from to a run in another folder"
        )


def require_optimizer(args: Any) -> None:
    """Raise UserError if the optimiser, or skipping its steps, is not to be had the way weights are shared out."""
    kind, version = sharding(args), _fsdp_version(args)
    if args.muon_learning_rate and (kind == "deepspeed" or version == 1):
        how = "DeepSpeed" if kind == "deepspeed" else "FSDP version 1"
        raise UserError(
            f"`muon_learning_rate` is {args.muon_learning_rate} under {how}, which flattens matrices, expected null; "
            f"DDP and FSDP version 2 have it (recipes/accelerate)"
        )
    if args.on_bad_step == "skip" and (
        kind == "deepspeed" or ("fused" not in optimizer_name(args) and not args.muon_learning_rate)
    ):
        what = "under DeepSpeed" if kind == "deepspeed" else f"with `optim: {optimizer_name(args)}`"
        raise UserError(
            f"`on_bad_step` is skip {what}, expected adamw_torch_fused, whose steps can be left out; or stop"
        )


def read_shards(model: torch.nn.Module, folder: Path) -> None:
    """Weights that FSDP's processes wrote, each its part, into a model that lies whole on this one."""
    state = {"model": model.state_dict()}
    # not as a group: every process reads all of a small model, however many wrote it
    shards.load(state, storage_reader=shards.FileSystemReader(str(folder)), no_dist=True)
    model.load_state_dict(state["model"])


class Sharded:
    """What goes before ``Trainer`` in the order of inheritance: sharded checkpoints open, finished models are whole."""

    args: Any
    accelerator: Any
    model: Any
    processing_class: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, which writes no model at all where checkpoints are sharded."""
        if sharding(self.args) != "fsdp sharded":
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        folder = output_dir or self.args.output_dir
        if not _internal_call:
            self._save(folder, state_dict=self.accelerator.get_state_dict(self.model))  # type: ignore[attr-defined]
        elif self.args.should_save:  # beside the shards, what says which model they are of
            os.makedirs(folder, exist_ok=True)
            self.model.config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def generates_together(self) -> bool:
        """Whether no process can generate alone, because each holds a part of the weights."""
        return sharding(self.args) != "whole"
