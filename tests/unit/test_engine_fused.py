"""The fused engine takes the steps of the eager one, or says why it will not."""

from __future__ import annotations

import copy
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmpi.core.errors import ModelError
from fedmpi.core.layout import laid_out, memory_format_of
from fedmpi.core.vector import flatten
from fedmpi.engines import fused
from fedmpi.engines.choose import choose_engine
from fedmpi.engines.eager import EagerEngine
from fedmpi.engines.fused import FusedEngine, why_not
from fedmpi.engines.graph import GraphEngine
from fedmpi.models import MODELS, build_model

SGD = (0.1, 0.0, 0.0)


@st.composite
def stacks(draw):
    """(model, input shape): zero to two convolutional blocks, then one to three Linear layers."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    channels, side = draw(st.integers(1, 3)), draw(st.integers(6, 12))
    shape, layers = (channels, side, side), []
    for _ in range(draw(st.integers(0, 2))):
        kernel, padding, stride = draw(st.integers(1, 3)), draw(st.integers(0, 1)), draw(st.integers(1, 2))
        out, bias = draw(st.sampled_from([1, 2, 4, 9])), draw(st.booleans())  # 9: the plain layout inside
        layers.append(nn.Conv2d(channels, out, kernel, stride, padding, bias=bias))
        channels, side = out, (side + 2 * padding - kernel) // stride + 1
        if draw(st.booleans()):
            layers.append(nn.ReLU())
        if side >= 4 and draw(st.booleans()):
            layers.append(nn.MaxPool2d(2))
            side //= 2
            if draw(st.booleans()):
                layers.append(nn.ReLU())
    layers.append(nn.Flatten())
    width = channels * side * side
    for _ in range(draw(st.integers(0, 2))):
        out = draw(st.integers(1, 6))
        layers += [nn.Linear(width, out, bias=draw(st.booleans())), *([nn.ReLU()] if draw(st.booleans()) else [])]
        width = out
    layers.append(nn.Linear(width, draw(st.integers(2, 5))))
    return nn.Sequential(*layers), shape


@given(
    stacks(),
    st.lists(st.tuples(st.integers(1, 15), st.integers(1, 7)), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.9]),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([2**18, 16]),
)
def test_fused_equals_eager(stack, epochs, momentum, weight_decay, cached):
    model, shape = stack
    assert why_not(model) is None
    twin = copy.deepcopy(model)
    vectors = flatten(model), flatten(twin)
    with mock.patch.object(fused, "_CACHED", cached):  # 16: a Linear in several blocks
        engines = EagerEngine(model, 0.1, momentum, weight_decay), FusedEngine(twin, 0.1, momentum, weight_decay)
    classes = model[-1].out_features
    for n, batch_size in epochs:  # the last batch of an epoch may be shorter
        inputs = laid_out(torch.randn(n, *shape), memory_format_of(model))
        labels = torch.randint(classes, (n,))
        kept = inputs.clone()
        losses = [engine.epoch(inputs, labels, batch_size) for engine in engines]
        assert torch.equal(inputs, kept), "a client's samples are not to be changed"
        assert losses[0].shape == (-(-n // batch_size),)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-3, atol=1e-5)


def test_reset_forgets_the_momentum():
    model = build_model("2nn", (1, 28, 28), 10)
    vector = flatten(model)
    engine = FusedEngine(model, 0.1, 0.9, 0.0)
    start, batch = vector.clone(), (torch.randn(4, 1, 28, 28), torch.randint(10, (4,)))
    ends = []
    for _ in range(2):
        engine.reset()
        vector.copy_(start)
        engine.epoch(*batch, 4)
        ends.append(vector.clone())
    vector.copy_(start)
    engine.epoch(*batch, 4)
    assert torch.equal(*ends)
    assert not torch.equal(vector, ends[0])


def record_plainly(work):
    """What `record_cuda` does, without a GPU: warm up, and from then on repeat `work` into the same tensor."""
    result = work()
    work()
    return lambda: result.copy_(work()), result


@pytest.mark.parametrize("name", ["2nn", "cnn_fedlab"])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.01)])
def test_recorded_steps_are_the_fused_ones_bit_by_bit(name, momentum, weight_decay):
    model = build_model(name, (1, 28, 28), 10)
    twin = copy.deepcopy(model)
    vectors = flatten(model), flatten(twin)
    start = vectors[0].clone()
    fused_engine = FusedEngine(model, 0.1, momentum, weight_decay)
    recorded = GraphEngine(twin, 0.1, momentum, weight_decay, record_plainly)
    for n in (7, 4, 9):  # clients with remainders of their own: some batch sizes are recorded in mid-run
        inputs, labels = torch.randn(n, 1, 28, 28), torch.randint(10, (n,))
        losses = []
        for engine, vector in zip((fused_engine, recorded), vectors, strict=True):
            vector.copy_(start)
            engine.reset()
            losses.append([engine.epoch(inputs, labels, 4) for _ in range(2)])
        assert torch.equal(*vectors)
        assert all(torch.equal(*each) for each in zip(*losses, strict=True))


def test_graph_wants_a_gpu():
    with pytest.raises(ModelError, match="--engine graph records steps on a GPU"):
        choose_engine("graph", build_model("2nn", (1, 28, 28), 10), (1, 28, 28), *SGD)


@pytest.mark.gpu
def test_a_cuda_graph_takes_the_same_steps():
    model = build_model("2nn", (1, 28, 28), 10).cuda()
    twin = copy.deepcopy(model)
    vectors = flatten(model), flatten(twin)
    inputs, labels = torch.randn(25, 1, 28, 28).cuda(), torch.randint(10, (25,)).cuda()
    for engine in (FusedEngine(model, 0.1, 0.9, 0.0), GraphEngine(twin, 0.1, 0.9, 0.0)):
        engine.epoch(inputs, labels, 10)
    assert torch.equal(*vectors)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_ours_is_fused(name):
    model = build_model(name, (1, 28, 28), 10)
    flatten(model)
    engine, note = choose_engine("auto", model, (1, 28, 28), *SGD)
    assert isinstance(engine, FusedEngine)
    assert note == "fused"


class Shuffled(nn.Module):
    """Its layers are a stack, its forward is not."""

    def __init__(self, mode):
        super().__init__()
        self.a, self.b, self.mode = nn.Linear(4, 4), nn.Linear(4, 4), mode

    def forward(self, x):
        x = x.flatten(1)
        if self.mode == "order":
            return self.a(self.b(x))
        if self.mode == "function":
            return self.b(torch.tanh(self.a(x)))
        if self.mode == "half":
            return self.b(x)
        return self.b(self.a(x))


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def frozen():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (tied(), "it has tied parameters"),
        (frozen(), "it has frozen parameters"),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)), "it has a Dropout"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "it has a BatchNorm1d"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding="same"), nn.Flatten(), nn.Linear(4, 4)), "padding 'same'"),
        (Shuffled("order"), "its forward is not the plain stack of its layers"),
        (Shuffled("function"), "its forward is not the plain stack of its layers"),
        (Shuffled("half"), "its forward is not the plain stack of its layers"),
    ],
)
def test_what_does_not_fit_is_declined_with_the_reason(model, reason):
    flatten(model)
    engine, note = choose_engine("auto", model, (4,), *SGD)
    assert isinstance(engine, EagerEngine)
    assert reason in note
    with pytest.raises(ModelError, match="--engine fused does not fit this model"):
        choose_engine("fused", model, (4,), *SGD)


def test_a_module_whose_forward_is_its_stack_is_fused():
    model = Shuffled("stack")
    flatten(model)
    assert isinstance(choose_engine("auto", model, (4,), *SGD)[0], FusedEngine)


def test_the_trial_leaves_the_model_alone():
    model = build_model("logistic", (1, 28, 28), 10)
    before = flatten(model).clone()
    choose_engine("auto", model, (1, 28, 28), *SGD)
    assert torch.equal(flatten(model), before)
    assert math.isfinite(float(before.sum()))
