"""What cannot be one vector, or cannot be saved at the end, is refused by name at the start."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedmpi.core.model_checks import check_model
from fedmpi.core.vector import flatten, model_facts, model_state, vector_hash
from fedmpi.errors import ModelError


def pair(act: Callable[[Any], object]) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    act(model)
    return model


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it goes; models of users have it
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


class Counting(nn.Linear):
    def get_extra_state(self) -> object:
        return {"steps": 1}

    def set_extra_state(self, state: object) -> None: ...


class Dictionary(nn.Linear):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().state_dict(*args, **kwargs), "note": "text"}


class Failing(nn.Linear):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("not now\nnor later")


def frozen(value: Tensor) -> Callable[[nn.Module], None]:
    return lambda m: m.register_parameter("extra", nn.Parameter(value, requires_grad=False))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: setattr(m[1], "weight", nn.Parameter(m[0].weight.t())), "'[01].weight' and '[01].weight' share"),
        (lambda m: setattr(m[1], "bias", nn.Parameter(m[0].weight[1])), "'0.weight' and '1.bias' share memory"),
        (lambda m: m.register_buffer("table", m[0].weight.detach()[:2]), "'0.weight' and 'table' share memory"),
        (lambda m: frozen(m[0].weight.detach()[:, 0])(m), "'extra' and '0.weight' share memory"),
        (lambda m: setattr(m[0], "bias", nn.Parameter(torch.zeros(1).expand(4))), "'0.bias' repeats its own memory"),
        (lambda m: m.register_buffer("row", torch.ones(1, 3).expand(2, 3)), "'row' repeats its own memory"),
        (lambda m: setattr(m, "kept", m[0].weight.t()), "attribute 'kept' shares memory with '0.weight'"),
        (lambda m: setattr(m, "kept", {"w": {"t": m[0].weight.data}}), "attribute 'kept' shares memory with '0.w"),
        (lambda m: setattr(m, "kept", [SimpleNamespace(t=m[0].bias.data)]), "attribute 'kept' shares memory with '0.b"),
        (lambda m: setattr(m[1], "kept", [m[0].weight.data]), "attribute '1.kept' shares memory with '0.weight'"),
        (lambda m: m.append(Counting(4, 4)), r"module '2' \(Counting\) has get_extra_state\(\)"),
        (lambda m: m.append(nn.LazyLinear(4)), "'2.weight' has no shape yet"),
        (lambda m: setattr(m.append(nn.LazyLinear(4))[2].weight, "requires_grad", False), "'2.weight' has no"),
        (lambda m: m.append(nn.LazyBatchNorm1d()), "'2.weight' has no shape yet"),
        (lambda m: m.append(nn.Linear(4, 4, device="meta")), "'2.weight' is on the meta device"),
        (lambda m: frozen(torch.eye(3).to_sparse())(m), "'extra' is sparse coo"),
        (lambda m: m.register_buffer("table", quantized()), "'table' is quantized"),
    ],
)  # fmt: skip
def test_parts_that_cannot_travel_are_named(act: Callable[[Any], object], message: str) -> None:
    with pytest.raises(ModelError, match=f"^{message}") as caught:
        flatten(pair(act))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Dictionary, "'note', a str"), (Failing, r"not now nor later \(test_model_checks.py, line")],
)
def test_a_state_that_cannot_be_saved_is_refused_at_the_start(kind: type[nn.Module], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        flatten(kind(2, 2))


def test_memory_that_is_shared_without_overlap_is_fine() -> None:
    """Parts of one large tensor, also interleaved ones; one parameter object in two places; a plain copy kept."""
    whole = torch.arange(40.0).view(4, 10)
    model = pair(lambda m: setattr(m[1], "weight", m[0].weight))
    model.register_parameter("even", nn.Parameter(whole[:, ::2]))
    model.register_parameter("odd", nn.Parameter(whole[:, 1::2]))
    model.kept = model[0].weight.detach().clone()
    model.weights = [model[0].weight]
    vector = flatten(model)
    assert len(vector) == 40 + 16 + 4 + 4
    assert torch.equal(model.odd, whole[:, 1::2])
    check_model(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.float64, torch.complex64, torch.int8, torch.bool])
@pytest.mark.parametrize("value", [torch.ones(()), torch.ones(0, 3), torch.ones(3, 2).t()])
def test_frozen_parameters_of_any_dtype_come_to_the_end(dtype: torch.dtype, value: Tensor) -> None:
    """The layout's facts, the state that is saved, and its hash; which tells values apart that differ in one bit."""
    model = pair(frozen(value.to(dtype)))
    flatten(model)
    state = model_state(model)
    assert state["extra"].dtype == dtype
    assert torch.equal(state["extra"], model.extra)
    assert state["extra"].data_ptr() != model.extra.data_ptr() or not value.numel()
    before = model_facts(model), vector_hash(state)
    if value.numel():
        with torch.no_grad():
            model.extra.zero_()
        assert model_facts(model)["model layout"] != before[0]["model layout"]
        assert vector_hash(model_state(model)) != before[1]


def test_the_hash_is_that_of_the_values_bytes() -> None:
    state = {"b": torch.tensor([[1.0, math.nan], [2.0, 3.0]]).t(), "a": torch.tensor(7)}
    data = state["a"].numpy().tobytes() + state["b"].numpy().tobytes()
    assert vector_hash(state) == hashlib.sha256(data).hexdigest()[:16]
