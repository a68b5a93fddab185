"""Growing a model: experts beside the SwiGLU of a dense one, or more experts than there are, old ones kept.

A new expert starts with a zero ``up_embed``: it may be chosen and learn, but adds nothing. Beside a SwiGLU that is all
there is to it, and the logits of the grown model are those of the dense one to the bit.

From K to L keys an axis, expert (a, b) moves from a·K + b to a·L + b, and what has to stay is which old experts a token
is sent to and with which weight. New keys are of two kinds:

- A *twin* has the router row of an old key. With n twins of each key on one axis, or n = n₁·n₂ on both, every old
  expert has n places with its score, one of them its own. n·k choices take in all places of the k old ones (choices in
  order of score cannot do otherwise), each with an n-th of its weight, which ``up_embed`` times n makes up for.
- A *dormant* key has the mean of the old rows, and a little noise, which tells the dormant apart. Its score lies in
  the middle of the old ones, whatever the token is, so that a pair with it stays below the chosen as long as k keys of
  the axis score above the mean. A bias of −∞ would be safer, but the router has none. The balance loss wakes them.

So k' = (L/K)²·k keeps the outputs but for rounding (twins on both axes), k' = (L/K)·k and k' = k (twins on the first
axis; none) do unless a dormant key rises. With any other k' experts are chosen that were not before: outputs change.
Seen on a model of 3 layers trained on source text, 1,024 to 4,096 experts, k = 8: relative change of the logits 1.4e-7
for k' = 32 and 16, none for 8; for k' = 12 it is 8e-3, and 2.4424 bits per byte become 2.4442.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import artifacts
from ..errors import UserError
from .configuration_doge import DogeConfig
from .loading import load_model
from .modeling_doge import DogeForCausalLM
from .moe import DogeCDMoE

# What of a model folder does not go with the grown model: weights, and what tells of the run that made them.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")
_OF_THE_RUN = (artifacts.STAGE_FILE, "run.json", "trainer_state.json", "checkpoint.json", "samples.jsonl")
_FOLDERS = ("additional_chat_templates",)  # all that transformers puts beside a model
_NEW = (".router_gate.", ".down_embed.", ".up_embed.")  # tensors that a grown model does not take over as they are
_NOISE = 0.1  # of dormant router rows, as a share of the spread of the old ones


@dataclass
class UpcycleRecipe:
    """A model to grow and how far."""

    model: str = field(metadata={"help": "folder of a dense model, or of one that gets more experts"})
    output_dir: str = field(metadata={"help": "folder for the grown model"})
    num_experts: int = field(default=1024, metadata={"help": "experts of a layer, a perfect square"})
    num_experts_per_tok: int | None = field(
        default=None,
        metadata={"help": "experts of a token; null takes √num_experts / 4, or as many times more as there are keys"},
    )
    seed: int = field(default=233, metadata={"help": "seed of what is random in the new weights"})


def upcycle_folder(recipe: UpcycleRecipe) -> None:
    """Write the grown model, and print what it is and how far its logits are from those before.

    Raises:
        UserError: as :func:`upcycle`.
    """
    out, k = recipe.output_dir, recipe.num_experts_per_tok
    found = (Path(out) / artifacts.STAGE_FILE).exists()
    after = upcycle(recipe.model, out, num_experts=recipe.num_experts, num_experts_per_tok=k, seed=recipe.seed)
    parameters = sum(p.numel() for p in after.parameters())
    print(
        f"{'found' if found else 'wrote'} {out}: {parameters:,} parameters, "
        f"{after.config.num_experts:,} experts a layer, {after.config.num_experts_per_tok} a token"
    )
    ids = torch.randint(after.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(recipe.seed))
    with torch.no_grad():
        logits = load_model(recipe.model)(ids, use_cache=False).logits.float()
        change = (after(ids, use_cache=False).logits.float() - logits).abs().max()
    print(f"logits of 256 random tokens: at most {change:.2g} from those before, which reach {logits.abs().max():.2g}")


def upcycle(
    dense: str | os.PathLike | DogeForCausalLM,
    out: str | os.PathLike | None = None,
    num_experts: int = 1024,
    num_experts_per_tok: int | None = None,
    seed: int = 233,
) -> DogeForCausalLM:
    """A model with experts that gives the logits of ``dense``, in eval mode; see the top of this file.

    Args:
        dense: a dense model, or one with fewer experts, or the folder of one. It stays as it is.
        out: folder to write the new model to, whole or not at all, with the tokenizer and all else of the folder
            ``dense`` that is neither weights nor a record of their training. One that holds this very model, grown
            from the same folder, is read again.
        num_experts: experts N of a layer, a perfect square.
        num_experts_per_tok: experts k of a token. None: √N / 4 for a dense model, as in the published sizes; from K to
            L keys an axis, ⌊L/K⌋ times the k before, which all but keeps the outputs.
        seed: of what is drawn at random; the state of PyTorch's own generator is left alone.

    Raises:
        UserError: if ``dense`` is no Doge language model, there are as many experts already, N or k cannot be, ``out``
            is a file or a folder with anything else in it, or the disk is too small.
    """
    started = time.perf_counter()
    if isinstance(dense, DogeForCausalLM):
        before, folder = dense, None
    elif not os.path.isdir(dense):
        raise UserError(f"model {os.fspath(dense)} does not exist, expected the folder of a Doge model")
    else:
        before, folder = load_model(dense), Path(dense)
    config = _grown_config(before.config, num_experts, num_experts_per_tok)
    settings = {"model": None if folder is None else str(folder), "seed": seed}
    settings |= {"num_experts": num_experts, "num_experts_per_tok": config.num_experts_per_tok}
    if out is not None and artifacts.is_finished(Path(out), "upcycle", settings):
        if folder is None:
            raise UserError(f"output folder {out} holds a model already, expected an empty folder")
        return load_model(Path(out))
    after = _grow(before, config, seed)
    if out is not None:
        size = sum(p.numel() * p.element_size() for p in after.parameters())
        artifacts.require_space(Path(out), size, "the grown model")
        with artifacts.staged(Path(out)) as partial:
            after.save_pretrained(partial)
            if folder is not None:
                _copy_the_rest(folder, partial)
            artifacts.finish(partial, "upcycle", settings, time.perf_counter() - started)
    return after


def _grown_config(old: DogeConfig, num_experts: int, k: int | None) -> DogeConfig:
    """The configuration with ``num_experts``, k of them a token."""
    if old.is_moe and num_experts <= old.num_experts:
        raise UserError(f"num_experts is {num_experts}, expected more than the {old.num_experts} that the model has")
    if k is None:
        L = math.isqrt(max(num_experts, 0))
        k = old.num_experts_per_tok * (L // old.num_keys) if old.is_moe else max(1, L // 4)
    new = {"is_moe": True, "num_experts": num_experts, "num_experts_per_tok": k, "router_per_token": True}
    try:
        return DogeConfig.from_dict({**old.to_dict(), **new})
    except ValueError as error:
        raise UserError(str(error)) from error


@torch.no_grad()
def _grow(before: DogeForCausalLM, config: DogeConfig, seed: int) -> DogeForCausalLM:
    """A model of ``config`` with the weights of ``before``, in its dtype and on its device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        after = DogeForCausalLM(config)
        torch.nn.Module.to(after, dtype=before.dtype)
        kept = {name: tensor for name, tensor in before.state_dict().items() if not any(new in name for new in _NEW)}
        after.load_state_dict(kept, strict=False)
        for old, new in zip(before.model.layers, after.model.layers, strict=True):
            new.mlp.up_embed.weight.zero_()
            if before.config.is_moe:
                _take_over(old.mlp, new.mlp, _twins(before.config, config))
    after.generation_config = copy.deepcopy(before.generation_config)
    torch.nn.Module.to(after, before.device)
    return after.eval()


def _twins(old: DogeConfig, new: DogeConfig) -> tuple[int, int]:
    """How often each old key stands on the first and on the second axis: as often as k' has room for."""
    n, room = new.num_keys // old.num_keys, new.num_experts_per_tok // old.num_experts_per_tok
    return (n, n) if room >= n * n else (n, 1) if room >= n else (1, 1)


def _take_over(old: DogeCDMoE, new: DogeCDMoE, twins: tuple[int, int]) -> None:
    """Fill a layer's new router and experts, whose ``up_embed`` is zero, from fewer old ones."""
    router = old.router_gate.weight.unflatten(0, (2, -1))  # (2, K, C)
    K, C = router.shape[1:]
    grown = new.router_gate.weight.unflatten(0, (2, -1))  # (2, L, C)
    for old_rows, new_rows, n in zip(router, grown, twins, strict=True):
        new_rows.normal_(std=_NOISE * old_rows.std().item()).add_(old_rows.mean(dim=0))
        new_rows[: n * K] = old_rows.repeat(n, 1)
    new.down_embed.weight.normal_(std=old.down_embed.weight.std().item())  # as large as those that have learnt
    L = grown.shape[1]
    new.down_embed.weight.view(L, L, C)[:K, :K] = old.down_embed.weight.view(K, K, C)
    new.up_embed.weight.view(L, L, C)[:K, :K] = old.up_embed.weight.view(K, K, C) * (twins[0] * twins[1])


def _copy_the_rest(folder: Path, out: Path) -> None:
    """Copy what ``folder`` holds besides weights and records and ``out`` does not hold yet."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, out / path.name)
        stays = path.name.endswith(_WEIGHTS) or path.name in _OF_THE_RUN or (out / path.name).exists()
        if path.is_file() and not stays:
            shutil.copyfile(path, out / path.name)
