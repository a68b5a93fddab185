"""From a model folder to packed weights, once: later the packed file is found again and nothing else is opened."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from .pack import BFLOAT16, FLOAT32, PRECISIONS, VERSION, Packed, pack, read, write

PACKED_FILE = "weights.doge"  # in a folder of `doge quantize`, which holds no others
CACHE = ".packed"  # in any other model folder


class Unsupported(UserError):
    """A model that the engine cannot run, and transformers can."""


def open_weights(folder: str | os.PathLike, precision: str = "auto") -> Packed:
    """The packed weights of a model folder, packed now if they have not been.

    They are kept in the folder itself, in ``.packed``; where that cannot be written, in the user's cache; and where
    not even that can, in memory. A folder whose weights or config have changed is packed anew.

    Args:
        precision: float32, bf16, int8, int4, or auto: what the folder holds, that is bf16 where all weights are stored
            so, and float32 else. Nothing is rounded that was not asked for.

    Raises:
        Unsupported: for a model that is no Doge or of a kind that the engine does not run.
        UserError: for a precision that does not exist or that a quantised folder does not hold, and for a folder that
            cannot be opened.
    """
    folder = Path(folder)
    if precision not in ("auto", *PRECISIONS):
        raise UserError(f"precision is {precision!r}, expected auto, {', '.join(PRECISIONS)}")
    if (folder / PACKED_FILE).is_file():
        packed = read(folder / PACKED_FILE)
        if precision not in ("auto", packed.precision):
            raise UserError(f"{folder} holds weights of precision {packed.precision}, expected {precision}")
        return packed
    if not (folder / "config.json").is_file():
        from ...models import load_model

        load_model(folder)  # says what is wrong with it, in its words
        raise Unsupported(f"{folder} is no local folder")
    _check_config(folder)
    if precision == "auto":
        precision = "bf16" if stored_types(folder) == {"BF16"} else "float32"
    name = f"{precision}-{_key(folder)}.doge"
    places = [folder / CACHE, _user_cache()]
    for place in places:
        if (place / name).is_file():
            try:
                return read(place / name)
            except UserError:
                continue  # cut short by a full disk, say: it is only a copy
    packed = pack_model(folder, precision)
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            write(packed, place / name)
        except OSError:
            continue
        for old in place.glob(f"{precision}-*.doge") if place.parent == folder else ():
            if old.name != name:
                old.unlink(missing_ok=True)  # of weights that are no more
        return read(place / name)
    return packed


def pack_model(folder: str | os.PathLike, precision: str, model: Any = None) -> Packed:
    """Pack the weights of a folder, or of a DogeForCausalLM already opened.

    Norms, biases, A and Wdt stay float32. The router, which picks experts, is rounded to bf16 at most.
    """
    if model is None:
        from ...models import load_model

        model = load_model(folder)
    describe = description(model.config)
    ends = getattr(model.generation_config, "eos_token_id", None)  # which `generate` goes by
    describe["eos"] = ends if isinstance(ends, list) else describe["eos"] if ends is None else [ends]
    return pack(_tensors(model, PRECISIONS[precision]), describe, precision)


def description(config: Any) -> dict[str, Any]:
    """What jitted code has to know of a configuration.

    Raises:
        Unsupported: for RoPE whose angles change as the text grows, or an activation other than silu.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from ...models.rotary import grows_with_length

    if grows_with_length(config):
        kind = config.rope_parameters["rope_type"]
        raise Unsupported(f"the model's RoPE is of type {kind}, whose angles change as the text grows")
    if config.hidden_act not in ("silu", "swish"):
        raise Unsupported(f"the model's activation is {config.hidden_act}, expected silu")
    H, G, M, D = config.heads
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        import torch

        frequencies = config.rope_parameters["rope_theta"] ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)
        scaling = 1.0
    else:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, None)
    eos = config.eos_token_id
    return {
        "layers": config.num_hidden_layers,
        "C": config.hidden_size,
        "H": H,
        "G": G,
        "M": M,
        "D": D,
        "inner": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "window": config.keep_window_size,
        "local_window": config.local_window,
        "lifetime": config.score_lifetime or 0.0,
        "keys": config.num_keys if config.is_moe else 0,
        "experts": config.num_experts_per_tok if config.is_moe else 0,
        "eps": config.rms_norm_eps,
        "tied": bool(config.tie_word_embeddings),
        "frequencies": [float(f) for f in frequencies],
        "rope_scaling": float(scaling),
        "eos": eos if isinstance(eos, list) else [] if eos is None else [eos],
    }


def _tensors(model: Any, kind: int) -> Iterator[tuple[str, np.ndarray, int]]:
    def plain(x: Any) -> np.ndarray:
        return x.detach().float().cpu().numpy()

    def joined(*linears: Any) -> np.ndarray:
        return np.concatenate([plain(linear.weight) for linear in linears])

    config = model.config
    for i, layer in enumerate(model.model.layers):
        at, mlp = layer.self_attn, layer.mlp
        yield f"{i}.qkv", joined(at.q_proj, at.k_proj, at.v_proj), kind
        yield f"{i}.out", plain(at.o_proj.weight), kind
        pair = np.stack([plain(mlp.gate_proj.weight), plain(mlp.up_proj.weight)], 1)  # their rows in turn
        yield f"{i}.gate_up", pair.reshape(-1, pair.shape[-1]), kind
        yield f"{i}.down", plain(mlp.down_proj.weight), kind
        if config.is_moe:
            yield f"{i}.router", plain(mlp.router_gate.weight), min(kind, BFLOAT16)
            yield f"{i}.expert_in", plain(mlp.down_embed.weight), kind
            yield f"{i}.expert_out", plain(mlp.up_embed.weight), kind
        yield f"{i}.norm", plain(layer.input_layernorm.weight), FLOAT32
        yield f"{i}.norm_2", plain(layer.post_attention_layernorm.weight), FLOAT32
        yield f"{i}.keep", plain(layer.input_residual), FLOAT32
        yield f"{i}.keep_2", plain(layer.post_attention_residual), FLOAT32
        yield f"{i}.A", plain(at.A), FLOAT32
        yield f"{i}.dt", plain(at.dt_proj.weight).reshape(-1), FLOAT32
        if config.qk_norm:
            yield f"{i}.q_norm", plain(at.q_norm.weight), FLOAT32
            yield f"{i}.k_norm", plain(at.k_norm.weight), FLOAT32
        if config.attention_bias:
            yield f"{i}.qkv_bias", np.concatenate([plain(p.bias) for p in (at.q_proj, at.k_proj, at.v_proj)]), FLOAT32
            yield f"{i}.out_bias", plain(at.o_proj.bias), FLOAT32
            yield f"{i}.dt_bias", plain(at.dt_proj.bias), FLOAT32
        if config.mlp_bias:
            both = np.stack([plain(mlp.gate_proj.bias), plain(mlp.up_proj.bias)], 1)
            yield f"{i}.gate_up_bias", both.reshape(-1), FLOAT32
            yield f"{i}.down_bias", plain(mlp.down_proj.bias), FLOAT32
    yield "norm", plain(model.model.norm.weight), FLOAT32
    yield "embed", plain(model.model.embed_tokens.weight), kind
    if not config.tie_word_embeddings:
        yield "head", plain(model.lm_head.weight), kind


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read weights from."""
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return [path for path in found if path.is_file()]


def stored_types(folder: Path) -> set[str]:
    """The types of the tensors in a folder's safetensors, in its words: F32, BF16 …"""
    types: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            start = file.read(8)
            try:
                header = json.loads(file.read(struct.unpack("<Q", start)[0]))
            except (struct.error, ValueError, MemoryError, OverflowError):
                raise UserError(f"the weights of model {folder} are cut short or damaged ({path.name})") from None
        types |= {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return types


def _check_config(folder: Path) -> None:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        raise UserError(f"{folder / 'config.json'} is not JSON of a model's configuration") from None
    if kind != "doge":
        raise Unsupported(f"the model is of type {kind!r}, expected 'doge'")
    if not weight_files(folder):
        raise UserError(f"model {folder} holds no weights, expected model.safetensors")


def _key(folder: Path) -> str:
    """What packed weights depend on: the config, and names, sizes and times of the weights."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    digest.update((folder / "config.json").read_bytes())
    if (folder / "generation_config.json").is_file():  # it says which tokens end a text
        digest.update((folder / "generation_config.json").read_bytes())
    for path in weight_files(folder):
        found = path.stat()
        digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _user_cache() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home())
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base, "small-doge", "packed")
