"""Convolutional models for images."""

from __future__ import annotations

from torch import nn

from fedmpi.errors import ModelError


def cnn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two 5x5 convolutions (32, 64; "same" padding), each with 2x2 max-pooling, then 512 ReLU units.

    1,663,370 parameters on MNIST.

    Source: McMahan et al., AISTATS 2017, arXiv 1602.05629, section 3, "CNN".
    """
    channels, height, width = _image(input_shape, "cnn", smallest=4)
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.ReLU(),
        nn.Linear(512, num_classes),
    )


def cnn_fedlab(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """FedLab's CNN_MNIST: no padding and no ReLU after the convolutions; 582,026 parameters on MNIST."""
    channels, height, width = _image(input_shape, "cnn_fedlab", smallest=16)
    pooled = [((side - 4) // 2 - 4) // 2 for side in (height, width)]
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * pooled[0] * pooled[1], 512),
        nn.ReLU(),
        nn.Linear(512, num_classes),
    )


def _image(input_shape: tuple[int, ...], model: str, smallest: int) -> tuple[int, int, int]:
    """(C, H, W).

    Raises:
        ModelError: the samples are not images of at least `smallest` x `smallest`.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise ModelError(
            f"--model {model} wants images (channels, height, width) of at least {smallest}x{smallest}, got samples of"
            f" shape {input_shape}; 2nn and logistic fit any shape"
        )
    return input_shape[0], input_shape[1], input_shape[2]
