"""Layout of a batch of images in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmpi.core.hooks import module_reason, process_reason


def memory_format_of(model: nn.Module) -> torch.memory_format:
    """Channels last for convolutional stacks of torch's own layers, which run a sixth faster on CPU so; else as it is.

    A user's `forward` or hook may call `.view` on an activation, which channels last would break, so it gets the plain
    layout.
    """
    layers = list(model.modules())
    own = all(type(layer).__module__.startswith("torch.nn.") for layer in layers)
    own = own and process_reason() is None and all(module_reason("", layer) is None for layer in layers)
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    safe = not any(needs_plain_layout(layer) for layer in convolutions)
    return torch.channels_last if own and convolutions and safe else torch.preserve_format


def needs_plain_layout(layer: nn.Conv2d) -> bool:
    """Return True if channels last spoils its weight gradient on CPU: 1 x 1, strided, fewer than 8 input channels.

    There oneDNN writes past a buffer of its own (uxlfoundation/oneDNN#6035).
    """
    return max(layer.kernel_size) == 1 and max(layer.stride) > 1 and layer.in_channels < 8 * layer.groups


def laid_out(inputs: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`inputs` in that layout; only (n, C, H, W) has two."""
    return inputs.to(memory_format=memory_format) if inputs.dim() == 4 else inputs
