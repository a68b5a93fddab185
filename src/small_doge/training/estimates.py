"""Arithmetic and memory of a training step, counted before it runs."""

from __future__ import annotations

import torch

from ..errors import UserError
from ..models import DogeConfig
from ..ops.linear_cross_entropy import chunk_elements

# Dense peak FLOP/s of the vendors' datasheets in bfloat16 with float32 accumulation; float32 uses no such figure.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, bf16: bool) -> float | None:
    """Peak FLOP/s of a device in the precision trained in, or None where it is not known."""
    if device.type != "cuda" or not bf16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def flops_per_token(config: DogeConfig, row_length: int) -> float:
    """FLOP of forward and backward per token: 6 a weight of every matrix product, and causal attention.

    Attention costs 2 · 2 · D a query, head and key that is seen, three times that with the backward pass; q·k and the
    product with v are what is counted (PaLM, arXiv:2204.02311, appendix B). A query sees T/2 keys on average while T
    is at most the window w, and w − w²/2T beyond. Of N experts a token meets k, each a row of two tables; the balance
    loss multiplies what the router gives for its two axes, N = K · K products a token.
    """
    H, G, M, D = config.heads
    C, layers = config.hidden_size, config.num_hidden_layers
    attention = C * H * D + 2 * C * G * D + G * D * M + H * D * C
    experts = 2 * C * (config.num_experts_per_tok + config.num_keys) + config.num_experts if config.is_moe else 0
    weights = layers * (attention + 3 * C * config.intermediate_size + experts) + C * config.vocab_size
    window = min(row_length, config.keep_window_size)
    return 6.0 * weights + 12.0 * layers * H * D * (window - window**2 / (2 * row_length))


def training_bytes(
    config: DogeConfig,
    parameters: int,
    rows: int,
    row_length: int,
    bf16: bool,
    compiled: bool = False,
    products: bool = False,
) -> int:
    """An estimate of the peak memory of a training step, in bytes.

    Weights, gradients and two AdamW moments in float32 are 16 bytes a parameter, of all experts too: their gradients
    and moments are dense. Logits are made a chunk at a time. For the backward pass a layer keeps of a token some 8 C of
    hidden states, 3 (H + 2G) D of q, k, v in their stages and 4 I of the SwiGLU. Compiled, it keeps the residual stream
    twice in float32, and in the dtype of products what these read: two normed inputs, q, k, v as projected, q and k
    again as attention reads them, its output, and gate and up, whose product is made again. With ``products``
    (``ops.products``) that product is kept, and where they norm it (``ops.residual``) no stream in float32. Of a SwiGLU
    in chunks nothing is kept. With experts, a layer keeps for a token 32 bytes for each of its k and 20 for each of the
    K keys of an axis, and in bfloat16 copies of what it routes and of both tables.
    """
    H, G, _, D = config.heads
    C, width = config.hidden_size, 2 if bf16 else 4
    intermediate = 0 if config.chunk_size_feed_forward else config.intermediate_size
    if compiled:
        heads = (H + 2 * G) * D + (H + G) * D + H * D
        layer = width * (2 * C + heads + 2 * intermediate)
        products = products and not config.mlp_bias
        apart = config.is_moe or config.hidden_dropout or config.chunk_size_feed_forward  # as of DogeDecoderLayer
        apart = apart or config.attention_bias or not config.qk_norm
        layer += (width * intermediate if products else 0) + (8 * C if apart or not products else 0)
    else:
        layer = width * (8 * C + 3 * (H + 2 * G) * D + 4 * intermediate)
    tables = 0
    if config.is_moe:
        layer += 32 * config.num_experts_per_tok + 20 * config.num_keys + (2 * 2 * C if bf16 else 0)
        tables = 2 * 2 * config.num_experts * C if bf16 else 0
    head = chunk_elements(torch.device("cuda" if bf16 else "cpu")) * width + 2 * 4 * config.vocab_size * C
    tokens = rows * row_length * (config.num_hidden_layers * layer + 3 * 4 * C)
    return 16 * parameters + config.num_hidden_layers * tables + tokens + head


# So many tokens at once keep a GPU busy, and with more a CPU leaves its caches. A narrow model, it
# seems, is done with them before Python has launched its kernels (20M on an H200: 37 ms and 41), so it sees more.
_ENOUGH = {"cuda": 1 << 17, "cpu": 1 << 11}
_ENOUGH_ELEMENTS = 1 << 26  # of the residual stream, on a GPU
_SHARE = 0.9  # of the free memory: the estimate is within 6 % of the peak where it was measured


def largest_micro_batch(
    config: DogeConfig,
    parameters: int,
    rows: int,
    row_length: int,
    bf16: bool,
    compiled: bool,
    free: int | None,
    products: bool = False,
) -> int:
    """The most rows to see at once: a divisor of ``rows`` whose step fits into ``free`` bytes, and is worth it.

    Args:
        rows: how many a device sees in an optimiser step.
        free: bytes that are there for the step; None on a CPU.
        products: as of :func:`training_bytes`.

    Raises:
        UserError: if not even one row fits.
    """
    enough = _ENOUGH["cpu"] if free is None else max(_ENOUGH["cuda"], _ENOUGH_ELEMENTS // config.hidden_size)
    for count in sorted((n for n in range(1, rows + 1) if rows % n == 0), reverse=True):
        if count > 1 and count * row_length > enough:
            continue
        needed = training_bytes(config, parameters, count, row_length, bf16, compiled, products)
        if free is None or needed <= _SHARE * free:
            return count
    assert free is not None
    raise UserError(
        f"one row of {row_length:,} tokens needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free; "
        "expected a smaller model or shorter rows, gradient_checkpointing, or several devices"
    )
