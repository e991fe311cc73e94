"""How a batch of images should lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def memory_format_of(model: nn.Module) -> torch.memory_format:
    """Channels last for convolutional stacks of torch's own layers, which run a sixth faster on CPU so; else as it is.

    A user's `forward` may call `.view` on an activation, which channels last would break, so it gets the plain layout.
    """
    layers = list(model.modules())
    own = all(type(layer).__module__.startswith("torch.nn.") for layer in layers)
    convolutional = any(isinstance(layer, nn.Conv2d) for layer in layers)
    return torch.channels_last if own and convolutional else torch.preserve_format


def laid_out(inputs: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`inputs` in that layout; only (n, C, H, W) has two."""
    return inputs.to(memory_format=memory_format) if inputs.dim() == 4 else inputs
