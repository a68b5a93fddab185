"""Arithmetic and memory of a training step, counted before it runs."""

from __future__ import annotations

import torch

from ..models import DogeConfig

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


def training_bytes(config: DogeConfig, parameters: int, rows: int, row_length: int, bf16: bool) -> int:
    """An estimate of the peak memory of a training step, in bytes.

    Weights, gradients and two AdamW moments in float32 are 16 bytes a parameter, of all experts too: their gradients
    and moments are dense. Kept for the backward pass, a token has some 8 C of hidden states, 3 (H + 2G) D of q, k, v in
    their stages and 4 I in a layer, and three copies of its logits in float32. With experts, a layer keeps for a token
    32 bytes for each of its k and 20 for each of the K keys of an axis, and in bfloat16 copies of what it routes and of
    both tables.
    """
    H, G, _, D = config.heads
    width = 2 if bf16 else 4
    layer = (8 * config.hidden_size + 3 * (H + 2 * G) * D + 4 * config.intermediate_size) * width
    tables = 0
    if config.is_moe:
        layer += 32 * config.num_experts_per_tok + 20 * config.num_keys + (2 * 2 * config.hidden_size if bf16 else 0)
        tables = 2 * 2 * config.num_experts * config.hidden_size if bf16 else 0
    token = config.num_hidden_layers * layer + 3 * 4 * config.vocab_size
    return 16 * parameters + config.num_hidden_layers * tables + rows * row_length * token
