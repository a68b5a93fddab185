"""A small Doge whose every vector does something, and text for it."""

import torch

from small_doge.models import DogeForCausalLM, config_for


def tiny_doge():
    """The model, ids (2, 40), and positions by which the second row is two documents and the first is one."""
    torch.manual_seed(0)
    model = DogeForCausalLM(config_for("tiny", vocab_size=300, num_hidden_layers=2))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) if p.dim() == 1 else 0
    positions = torch.stack([torch.arange(40), torch.cat([torch.arange(15), torch.arange(25)])])
    return model, torch.randint(300, (2, 40)), positions
