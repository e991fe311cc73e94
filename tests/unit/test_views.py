"""A tensor that leaves the vector in training is found, by name; one that is written in place is not taken for that."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedmpi.core.vector import flatten
from fedmpi.core.views import check_views
from fedmpi.errors import ModelError


class Net(nn.Module):
    """Does something to itself in each forward pass."""

    def __init__(self, act: Callable[[Net], object]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.frozen = nn.Parameter(torch.full((2,), 3.0), requires_grad=False)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("count", torch.ones(3, dtype=torch.int64))
        self.kept: object = None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.act(self)
        return self.layer(x)


def after(act: Callable[[Net], object]) -> nn.Module:
    model = Net(act)
    flatten(model)
    check_views(model)
    model(torch.ones(2, 4))
    return model


def replace(**parts: object) -> Callable[[Net], None]:
    def act(model: Net) -> None:
        for name, value in parts.items():
            setattr(model, name, value)

    return act


@pytest.mark.parametrize(
    "act",
    [
        lambda m: m.scale.add_(1),
        lambda m: m.layer.weight.mul_(0.5),
        lambda m: m.layer.weight.data.mul_(0.5),
        lambda m: replace(scale=m.scale.view(3))(m),
        lambda m: replace(count=m.count + 1)(m),  # not in the vector: copied in and out
        lambda m: m.frozen.mul_(1),
        replace(kept=torch.ones(5)),
    ],
)
def test_what_stays_in_the_vector_is_fine(act: Callable[[Net], object]) -> None:
    check_views(after(act))


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda m: replace(scale=m.scale * 0.9)(m), "scale"),
        (lambda m: setattr(m.layer.weight, "data", m.layer.weight.renorm(2, 0, 1)), "layer.weight"),
        (lambda m: setattr(m.layer.weight, "data", m.layer.weight.t()), "layer.weight"),
        (lambda m: setattr(m.layer, "weight", nn.Parameter(m.layer.weight.data)), "layer.weight"),  # same memory
        (lambda m: setattr(m.layer, "bias", None), "layer.bias"),
        (replace(layer=nn.Linear(4, 4)), "layer"),
        (replace(frozen=nn.Parameter(torch.ones(2), requires_grad=False)), "frozen"),
        (lambda m: m.frozen.mul_(0.9), "frozen"),
        (lambda m: m.frozen.data.mul_(0.9), "frozen"),
        (lambda m: m.layer.weight.requires_grad_(False), "layer.weight"),
        (lambda m: m.layer.register_parameter("more", nn.Parameter(torch.ones(2))), "layer.more"),
        (lambda m: m.register_buffer("more", torch.ones(2)), "more"),
        (replace(count=torch.ones(4, dtype=torch.int64)), "count"),
    ],
)
def test_what_leaves_it_is_named(act: Callable[[Net], object], name: str) -> None:
    model = after(act)
    with pytest.raises(ModelError, match=rf"^training (replaced|changed|set|added).*{name}"):
        check_views(model)


def test_another_model_than_the_flattened_one_is_refused() -> None:
    model = after(lambda m: None)
    with pytest.raises(ModelError, match="another Net than the one it was made with"):
        check_views(copy.deepcopy(model))
    flatten(model)
    check_views(model)
