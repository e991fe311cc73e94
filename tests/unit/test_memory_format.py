"""Channels last is chosen where it is right, and only there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedmpi.core.memory_format import laid_out, memory_format_of


class Own(nn.Sequential):
    """A user's module may call `.view` on an activation."""


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), torch.channels_last),
        (nn.Sequential(nn.Linear(4, 4)), torch.preserve_format),
        (Own(nn.Conv2d(1, 4, 3)), torch.preserve_format),
        (nn.Sequential(nn.Conv2d(8, 4, 1, stride=2)), torch.channels_last),
        (nn.Sequential(nn.Conv2d(3, 4, 1, stride=2)), torch.preserve_format),
        (nn.Sequential(nn.Conv2d(16, 4, 1, stride=2, groups=4)), torch.preserve_format),
    ],
)
def test_which_models_get_channels_last(model, expected):
    assert memory_format_of(model) is expected


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_gradients_in_the_chosen_layout_are_those_of_float64(channels, kernel, stride):
    """oneDNN gets some of them wrong in channels last, which nothing else would notice."""
    torch.manual_seed(channels)
    model = nn.Sequential(nn.Conv2d(channels, 4, kernel, stride), nn.ReLU(), nn.Conv2d(4, 4, kernel, stride))
    exact = copy.deepcopy(model).double()
    inputs = torch.randn(3, channels, 12, 12)
    model(laid_out(inputs, memory_format_of(model))).square().sum().backward()
    exact(inputs.double()).square().sum().backward()
    for mine, wanted in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=1e-4, atol=1e-3)
