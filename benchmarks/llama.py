"""A Llama of random weights in llama.cpp, for benchmarks: its file, and its steps through the C interface.

Needs `llama_cpp` and `gguf`, which are no dependencies of ours:

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python gguf
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


class Llama:
    """A Llama of random weights in llama.cpp, through its C interface."""

    def __init__(self, path: Path, context: int, threads: int, vocabulary: int):
        import llama_cpp

        self.c, self.vocabulary = llama_cpp, vocabulary
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch = context + 4096, 512
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.model or not self.context:
            raise RuntimeError("llama.cpp cannot open its model")
        ids = np.random.default_rng(0).integers(0, vocabulary, context)
        for first in range(0, context, 512):
            self._feed(ids[first : first + 512])
        self.token = 1

    def _feed(self, ids: Any) -> None:
        tokens = (self.c.llama_token * len(ids))(*map(int, ids))
        if self.c.llama_decode(self.context, self.c.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp cannot decode")

    def __call__(self) -> None:
        self._feed((self.token,))
        logits = np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, -1), (self.vocabulary,))
        self.token = int(logits.argmax())

    def close(self) -> None:
        self.c.llama_free(self.context)
        self.c.llama_model_free(self.model)


def write_llama(config: Any, bits: str, path: Path) -> None:
    """A GGUF file of a Llama of the size of ``config``, with random weights of a type such as Q8_0."""
    import gguf

    H, G, _, D = config.heads
    C, inner, kind = config.hidden_size, config.intermediate_size, gguf.GGMLQuantizationType[bits]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(65536)
    writer.add_embedding_length(C)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_key_length(D)
    writer.add_value_length(D)
    writer.add_rope_dimension_count(D)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        if len(shape) == 1:
            return writer.add_tensor(name, np.ones(shape, np.float32))
        x = random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        x = gguf.quants.quantize(x, kind)
        writer.add_tensor(name, x, raw_dtype=kind)

    add("token_embd.weight", config.vocab_size, C)  # and the head: there is no output.weight
    add("output_norm.weight", C)
    for i in range(config.num_hidden_layers):
        add(f"blk.{i}.attn_norm.weight", C)
        add(f"blk.{i}.attn_q.weight", H * D, C)
        add(f"blk.{i}.attn_k.weight", G * D, C)
        add(f"blk.{i}.attn_v.weight", G * D, C)
        add(f"blk.{i}.attn_output.weight", C, H * D)
        add(f"blk.{i}.ffn_norm.weight", C)
        add(f"blk.{i}.ffn_gate.weight", inner, C)
        add(f"blk.{i}.ffn_up.weight", inner, C)
        add(f"blk.{i}.ffn_down.weight", C, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_is_here() -> bool:
    try:
        import gguf  # noqa: F401
        import llama_cpp
    except (ImportError, OSError) as error:
        print(f"without llama.cpp: {error}")
        return False
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_is_here.kept = silent  # type: ignore[attr-defined]  # C holds no reference
    llama_cpp.llama_log_set(silent, None)
    return True
