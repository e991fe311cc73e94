"""What differs among attributes, and putting it back."""

from __future__ import annotations

import array
import collections
import functools
import random
import types
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from fedmpi.core.attributes import Attributes


class Meter:
    """An object of a user's own."""

    def __init__(self) -> None:
        self.total = 0.0
        self.owner: Any = None


class Slotted:
    """The same in slots."""

    __slots__ = ("__hidden", "last", "total")

    def __init__(self) -> None:
        self.total = [0.0]
        self.__hidden = 0

    def hide(self) -> None:
        self.__hidden += 1


class Model(nn.Module):
    """One attribute of each kind that a forward pass may change."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer.calls = 0  # type: ignore[assignment]  # an attribute of a sub-module
        self.register_buffer("seen", torch.zeros(1))
        self.number, self.text, self.flag, self.nan = 1, "a", True, float("nan")
        self.numbers, self.pair, self.by_name = [1, 2], ([0], 3), {"a": [1.0]}
        self.queue, self.counts, self.ids = collections.deque([1], 3), collections.Counter("aab"), {1, 2}
        self.tensor, self.array = torch.zeros(3), np.zeros(2)
        self.raw = bytearray(b"ab")
        self.meter = Meter()
        self.meter.owner = self  # a circle
        self.hidden = [nn.BatchNorm1d(2)]  # not registered, so not in the vector
        self.torch_rng, self.numpy_rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.old_rng, self.python_rng = np.random.RandomState(1), random.Random(1)
        self.kept: Any = None
        self.slotted, self.slotted_too = Slotted(), Slotted()
        self.space, self.user_dict = types.SimpleNamespace(calls=0), collections.UserDict(calls=0)
        self.typed, self.objects = array.array("d", [1.0]), np.array([1, "a"], dtype=object)
        self.partial = functools.partial(print, end={"calls": [0]})
        self.deep: Any = [0]
        for _ in range(40):
            self.deep = [self.deep]

    of_class: ClassVar[list[int]] = []
    count_of_class = 0


def shown(model: Model) -> dict[str, str]:
    """All of it as text."""
    held = {name: repr(value) for name, value in vars(model).items() if not name.startswith("_")}
    held["of_class"], held["count_of_class"] = repr(Model.of_class), repr(Model.count_of_class)
    held["slotted"], held["slotted_too"] = (
        repr([getattr(each, name, None) for name in ("last", "total", "_Slotted__hidden")])
        for each in (model.slotted, model.slotted_too)
    )
    held["calls"], held["meter"], held["hidden"] = map(
        repr, (model.layer.calls, model.meter.total, model.hidden[0].state_dict())
    )
    held["torch_rng"], held["numpy_rng"] = (
        repr(model.torch_rng.get_state().tolist()),
        repr(model.numpy_rng.bit_generator.state),
    )
    held["old_rng"], held["python_rng"] = repr(model.old_rng.get_state()), repr(model.python_rng.getstate())
    return held


def innermost(value: Any) -> Any:
    while isinstance(value[0], list):
        value = value[0]
    return value


CHANGES = {
    "number": lambda m: setattr(m, "number", 2),
    "text": lambda m: setattr(m, "text", "b"),
    "flag": lambda m: setattr(m, "flag", 1),
    "nan": lambda m: setattr(m, "nan", 0.0),
    "numbers": lambda m: m.numbers.append(3),
    "pair": lambda m: m.pair[0].append(1),
    "by_name": lambda m: m.by_name["a"].append(2.0),
    "queue": lambda m: m.queue.append(2),
    "counts": lambda m: m.counts.update("b"),
    "ids": lambda m: m.ids.add(3),
    "tensor": lambda m: m.tensor.data.add_(1),
    "array": lambda m: m.array.__iadd__(1),
    "raw": lambda m: m.raw.append(1),
    "meter": lambda m: setattr(m.meter, "total", 1.0),
    "hidden": lambda m: m.hidden[0](torch.ones(2, 2)),
    "torch_rng": lambda m: torch.rand(1, generator=m.torch_rng),
    "numpy_rng": lambda m: m.numpy_rng.random(),
    "old_rng": lambda m: m.old_rng.rand(),
    "python_rng": lambda m: m.python_rng.random(),
    "layer.calls": lambda m: setattr(m.layer, "calls", 5),
    "of_class": lambda m: m.of_class.append(1),
    "count_of_class": lambda m: setattr(Model, "count_of_class", 7),
    "slotted": lambda m: m.slotted.total.append(1.0),
    "slotted_too": lambda m: setattr(m.slotted_too, "last", 1),
    "space": lambda m: setattr(m.space, "calls", 1),
    "user_dict": lambda m: m.user_dict.update(calls=1),
    "typed": lambda m: m.typed.append(2.0),
    "objects": lambda m: m.objects.__setitem__(0, 2),
    "partial": lambda m: m.partial.keywords["end"]["calls"].append(1),
    "deep": lambda m: innermost(m.deep).append(1),
    "hidden_slot": lambda m: m.slotted.hide(),
    "fresh": lambda m: setattr(m, "fresh", 5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_and_put_back(name: str) -> None:
    model = Model()
    before, attributes = shown(model), Attributes(model)
    assert attributes.changed() == []
    CHANGES[name](model)
    assert attributes.changed() == [{"hidden_slot": "slotted"}.get(name, name)]
    assert shown(model) != before
    attributes.put_back()
    assert attributes.changed() == []
    assert shown(model) == before


@pytest.mark.parametrize(
    "name", [name for name in CHANGES if name not in ("fresh", "hidden_slot", "of_class", "count_of_class")]
)
def test_a_value_that_is_replaced_or_removed_comes_back(name: str) -> None:
    model = Model()
    before, attributes = shown(model), Attributes(model)
    owner, _, key = name.rpartition(".")
    setattr(model.layer if owner else model, key, object())
    assert attributes.changed() == [name]
    attributes.put_back()
    assert shown(model) == before
    delattr(model.layer if owner else model, key)
    assert attributes.changed() == [name]
    attributes.put_back()
    assert shown(model) == before


def test_equal_values_in_new_objects_are_no_change() -> None:
    model = Model()
    attributes = Attributes(model)
    model.numbers, model.pair, model.by_name = [1, 2], ([0], 3), {"a": [1.0]}
    model.tensor, model.array, model.number, model.nan = torch.zeros(3), np.zeros(2), int("1"), float("nan")
    assert attributes.changed() == []


def test_the_model_itself_and_kept_activations_are_no_matter() -> None:
    model = Model()
    attributes = Attributes(model)
    with torch.no_grad():
        model.layer.weight.add_(1)
        model.get_buffer("seen").add_(1)
    model.eval()
    model.kept = model.layer(torch.ones(1, 2))
    model.other = model.kept
    assert attributes.changed() == []
    attributes.put_back()
    assert model.kept is None, "the next client does not see it"
    assert float(model.get_buffer("seen")) == 1.0


def test_generators_are_seeded_for_a_client() -> None:
    """The same numbers for the same client, others for another."""
    model = Model()
    attributes = Attributes(model)

    def draw(seed: int) -> list[float]:
        attributes.put_back(seed)
        first = float(torch.rand(1, generator=model.torch_rng)), float(model.numpy_rng.random())
        return [*first, float(model.old_rng.rand()), model.python_rng.random()]

    one, other = draw(2**62), draw(3)
    assert draw(2**62) == one
    assert not set(one) & set(other)


def test_an_owner_counts_without_what_is_apart_and_without_its_model() -> None:
    class Owner:
        def __init__(self) -> None:
            self.model, self.ours, self.kept = nn.Linear(2, 2), 0, {}
            self.teacher = nn.Linear(2, 2)
            self.momentum = torch.optim.SGD(self.teacher.parameters(), 0.1, momentum=0.9)

    owner = Owner()
    attributes = Attributes(owner.model, owner, frozenset({"ours"}))
    owner.ours = 7
    owner.model.weight.data.add_(1)
    assert attributes.changed() == []
    owner.kept[3] = torch.zeros(1)
    owner.teacher(torch.ones(1, 2)).sum().backward()
    owner.momentum.step()
    assert attributes.changed() == ["kept", "teacher", "momentum"]
    attributes.put_back()
    assert owner.kept == {}
    assert not owner.momentum.state
    assert owner.ours == 7


def test_mapped_files_and_foreign_objects_are_not_copied(tmp_path: Any) -> None:
    np.save(tmp_path / "x.npy", np.zeros(4))

    class Owner:
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")

        def __init__(self) -> None:
            self.x, self.log = self.mapped, pytest.ExceptionInfo

    owner = Owner()
    attributes = Attributes(nn.Linear(1, 1), owner)
    assert attributes.changed() == []
    attributes.put_back()
    assert owner.x is Owner.mapped


def test_hooks_and_what_hangs_on_a_parameter() -> None:
    model = Model()
    attributes = Attributes(model)
    model.layer.register_forward_hook(lambda module, inputs, output: None)
    model.layer.weight.register_hook(lambda gradient: None)
    model.layer.bias.register_post_accumulate_grad_hook(lambda param: None)
    model.layer.weight.calls = 1  # type: ignore[attr-defined]  # that is the point
    assert attributes.changed() == ["layer._forward_hooks", "layer.weight.calls", *HOOKED]
    attributes.put_back()
    assert attributes.changed() == []
    assert not model.layer._forward_hooks
    assert not model.layer.weight._backward_hooks
    assert not hasattr(model.layer.weight, "calls")


HOOKED = ["hooks of layer.weight", "hooks of layer.bias"]
