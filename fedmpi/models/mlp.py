"""Models that see a sample as one row of numbers."""

from __future__ import annotations

import math

from torch import nn


def two_nn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two hidden layers of 200 ReLU units; 199,210 parameters on MNIST.

    Source: McMahan et al., AISTATS 2017, arXiv 1602.05629, section 3, "MNIST 2NN".
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(input_shape), 200),
        nn.ReLU(),
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, num_classes),
    )


def logistic(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Multinomial logistic regression: one linear layer; 7,850 parameters on MNIST."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))
