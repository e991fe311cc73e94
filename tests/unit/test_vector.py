"""The model as one vector: what is in it, in which order, and that writing to it is writing to the model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedmpi.core import vector as flat
from fedmpi.core.vector import SerializationTool
from fedmpi.errors import ModelError


class Mixed(nn.Module):
    """A frozen layer, a tied one, a BatchNorm, and a bool buffer: everything the layout has a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.first = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.second = nn.Linear(3, 2)
        self.second.weight = self.first.weight
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(self.frozen(x))) + self.second(x)


TRAINABLE = ("first.weight", "first.bias", "norm.weight", "norm.bias", "second.bias")
FLOAT_BUFFERS = ("norm.running_mean", "norm.running_var")


def by_hand(model: nn.Module) -> Tensor:
    state = model.state_dict()
    return torch.cat([state[name].reshape(-1) for name in (*TRAINABLE, *FLOAT_BUFFERS)])


def test_layout_is_trainable_parameters_once_then_float_buffers() -> None:
    model = Mixed()
    expected = by_hand(model)
    assert torch.equal(SerializationTool.serialize_model(model), expected)
    assert torch.equal(flat.flatten(model), expected)
    assert len(expected) == 6 + 2 + 2 + 2 + 2 + 2 + 2
    assert flat.num_trainable(model) == 14


def test_vector_and_model_are_one_memory() -> None:
    model = Mixed()
    vector = flat.flatten(model)
    vector.copy_(torch.arange(len(vector)))
    assert model.first.weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert model.second.weight is model.first.weight
    assert model.norm.running_var.tolist() == [16, 17]
    with torch.no_grad():
        model.norm.running_mean.fill_(-1)
        model.second.bias.fill_(-2)
    assert vector[14:16].tolist() == [-1, -1]
    assert vector[12:14].tolist() == [-2, -2]


def test_an_optimizer_made_before_still_steps_the_vector() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    vector = flat.flatten(model)
    before = vector.clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(vector, before - 0.5)


def test_batch_norm_writes_its_statistics_into_the_vector() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    vector = flat.flatten(model)
    model(torch.tensor([[1.0], [3.0]]))
    assert vector.tolist() == pytest.approx([1, 0, 0.1 * 2, 0.9 + 0.1 * 2])


def test_flattening_twice_is_harmless() -> None:
    model = Mixed()
    first = flat.flatten(model).clone()
    second = flat.flatten(model)
    assert torch.equal(first, second)
    second.zero_()
    assert not model.first.weight.any()


def test_serialize_copies_and_deserialize_writes_in_place() -> None:
    model = Mixed()
    vector = flat.flatten(model)
    start = SerializationTool.serialize_model(model)
    delta = torch.linspace(-1, 1, len(start))
    SerializationTool.deserialize_model(model, delta, mode="add")
    assert torch.equal(vector, start + delta)
    SerializationTool.deserialize_model(model, delta, mode="sub")
    assert torch.equal(vector, (start + delta) - delta)
    SerializationTool.deserialize_model(model, delta)
    assert torch.equal(vector, delta)
    assert not torch.equal(start, delta)


@pytest.mark.parametrize("length", [0, 17, 19])
def test_deserialize_refuses_another_length(length: int) -> None:
    model = Mixed()
    before = SerializationTool.serialize_model(model)
    with pytest.raises(ModelError, match=rf"^the model has 18 vector entries, the vector {length}$"):
        SerializationTool.deserialize_model(model, torch.zeros(length))
    assert torch.equal(SerializationTool.serialize_model(model), before)


def test_gradients_stand_in_the_vectors_order_with_zeros_where_there_is_none() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    model[0](torch.tensor([[2.0, 3.0]])).sum().backward()
    assert SerializationTool.serialize_model_gradients(model).tolist() == [2, 3, 1, 0, 0]


def empty(_: nn.Module) -> nn.Module:
    return nn.Sequential(nn.ReLU())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.half(), "'first.weight' is float16; fedmpi trains float32: return model.float()"),
        (lambda m: m.bfloat16(), "'first.weight' is bfloat16; fedmpi trains float32: return model.float()"),
        (lambda m: m.double(), "'first.weight' is float64; fedmpi trains float32: return model.float()"),
        (lambda m: m.norm.half() and m, "'norm.weight' is float16; fedmpi trains float32: return model.float()"),
        (lambda m: m.requires_grad_(False), "the model has no trainable parameter (requires_grad=True)"),
        (empty, "the model has no trainable parameter (requires_grad=True)"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_by_name(
    change: Callable[[nn.Module], nn.Module], message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        flat.flatten(change(Mixed()))
    assert str(caught.value) == message


def test_complex_half_buffer_and_lazy_tensors_are_refused() -> None:
    odd = nn.Linear(1, 1)
    odd.register_parameter("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    with pytest.raises(ModelError, match=r"^'phase' is complex64; "):
        flat.flatten(odd)
    cached = nn.Linear(1, 1)
    cached.register_buffer("table", torch.zeros(2, dtype=torch.float16))
    with pytest.raises(ModelError, match=r"^'table' is float16; "):
        flat.flatten(cached)


def test_lazy_modules_are_refused() -> None:
    lazy = nn.LazyLinear(2)
    with pytest.raises(ModelError, match=r"^'weight' has no shape yet \(a lazy module\)"):
        flat.flatten(lazy)


def test_frozen_half_parameters_do_not_matter() -> None:
    model = Mixed()
    model.frozen.half()
    assert len(flat.flatten(model)) == 18


def test_integer_buffers_travel_as_int64_and_keep_their_dtype() -> None:
    model = Mixed()
    state = flat.integer_state(model)
    assert state.dtype == np.int64
    assert state.tolist() == [1, 0, 1, 0], "the mask, then num_batches_tracked, in the order of model.buffers()"
    flat.load_integer_state(model, np.array([0, 0, 1, 7], np.int64))
    assert model.norm.num_batches_tracked.dtype == torch.int64
    assert int(model.norm.num_batches_tracked) == 7
    assert model.mask.dtype == torch.bool
    assert model.mask.tolist() == [False, False, True]
    assert flat.integer_state(model).tolist() == [0, 0, 1, 7]
    assert state.tolist() == [1, 0, 1, 0], "a snapshot, not a view"


def test_integer_state_is_a_snapshot_also_of_a_single_counter() -> None:
    model = nn.BatchNorm1d(1)
    state = flat.integer_state(model)
    model(torch.ones(2, 1))
    assert state.tolist() == [0]
    assert flat.integer_state(model).tolist() == [1]


def test_a_model_without_integer_buffers_has_no_integer_state() -> None:
    model = nn.Linear(2, 2)
    assert flat.integer_state(model).shape == (0,)
    flat.load_integer_state(model, np.empty(0, np.int64))


def test_facts_tell_models_apart_by_layout_and_frozen_values_only() -> None:
    torch.manual_seed(0)
    model, other = Mixed(), Mixed()
    other.frozen.load_state_dict(model.frozen.state_dict())
    assert flat.model_facts(model) == flat.model_facts(other), "trainable values come with the first broadcast"
    assert flat.model_facts(model)["parameter count"] == 18
    with torch.no_grad():
        other.frozen.bias[1] += 1
    assert flat.model_facts(model) != flat.model_facts(other)
    wide, tall = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    assert flat.model_facts(wide)["parameter count"] == flat.model_facts(tall)["parameter count"]
    assert flat.model_facts(wide)["model layout"] != flat.model_facts(tall)["model layout"]


def test_vector_hash_depends_on_every_value_and_not_on_the_order_of_keys() -> None:
    state = Mixed().state_dict()
    usual = flat.vector_hash(state)
    assert len(usual) == 16
    assert flat.vector_hash(dict(reversed(state.items()))) == usual
    for name, tensor in state.items():
        changed = {**state, name: torch.logical_not(tensor) if tensor.dtype == torch.bool else tensor + 1}
        assert flat.vector_hash(changed) != usual, name
