"""The fused engine takes the steps of the eager one, or says why it will not."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedmpi.core.memory_format import laid_out, memory_format_of
from fedmpi.core.vector import flatten
from fedmpi.engines.choose import choose_engine
from fedmpi.engines.eager import EagerEngine
from fedmpi.engines.fused import FusedEngine
from fedmpi.engines.graph import GraphEngine
from fedmpi.engines.proof import why_not
from fedmpi.errors import ModelError
from fedmpi.machine.device import open_device, pick_device, visible_gpus
from fedmpi.models import MODELS, build_model

SGD = (0.1, 0.0, 0.0)


@st.composite
def stacks(draw):
    """(model, input shape): zero to two convolutional blocks, then one to three Linear layers."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    channels, side = draw(st.integers(1, 3)), draw(st.integers(6, 12))
    shape, layers = (channels, side, side), []
    for _ in range(draw(st.integers(0, 2))):
        kernel, padding, stride = draw(st.integers(1, min(3, side))), draw(st.integers(0, 1)), draw(st.integers(1, 2))
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
    engines = EagerEngine(model, 0.1, momentum, weight_decay), FusedEngine(twin, 0.1, momentum, weight_decay)
    engines[1].block_entries = cached  # 16: a Linear in several blocks
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
        engine.begin()
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


def test_batch_sizes_beyond_those_recorded_are_taken_unrecorded():
    model = build_model("2nn", (1, 28, 28), 10)
    twin = copy.deepcopy(model)
    vectors = flatten(model), flatten(twin)
    recordings = []

    def record(work):
        recordings.append(work)
        return record_plainly(work)

    engines = FusedEngine(model, 0.1, 0.9, 0.01), GraphEngine(twin, 0.1, 0.9, 0.01, record)
    engines[1].max_recorded = 2
    for n in (5, 3, 7, 2, 5, 7, 3):
        inputs, labels = torch.randn(n, 1, 28, 28), torch.randint(10, (n,))
        losses = [engine.epoch(inputs, labels, n) for engine in engines]
        assert torch.equal(*losses)
        assert torch.equal(*vectors)
    assert len(recordings) == 2, "and none is made again"


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
            engine.begin()
            losses.append([engine.epoch(inputs, labels, 4) for _ in range(2)])
        assert torch.equal(*vectors)
        assert all(torch.equal(*each) for each in zip(*losses, strict=True))


def test_graph_wants_a_gpu():
    with pytest.raises(ModelError, match="--engine graph records steps on a GPU"):
        choose_engine("graph", build_model("2nn", (1, 28, 28), 10), (1, 28, 28), *SGD)


@pytest.mark.gpu
def test_a_cuda_graph_takes_the_same_steps():
    device = open_device(pick_device("cuda", 0, visible_gpus()), 1)  # as a job does: its settings decide what runs
    model = build_model("2nn", (1, 28, 28), 10).to(device)
    twin = copy.deepcopy(model)
    vectors = flatten(model), flatten(twin)
    inputs, labels = torch.randn(25, 1, 28, 28).to(device), torch.randint(10, (25,)).to(device)
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


class Own(nn.Module):
    """Layers that are a stack, and a forward of its own."""

    def __init__(self, mode):
        super().__init__()
        self.a, self.b, self.mode = nn.Linear(4, 4), nn.Linear(4, 4), mode
        self.calls, self.kept = 0, None

    def forward(self, x):
        x = x.flatten(1)
        self.calls += 1
        if self.mode == "order":
            return self.a(self.b(x))
        if self.mode == "function":
            return self.b(torch.tanh(self.a(x)))
        if self.mode == "half":
            return self.b(x)
        if self.mode == "raises":
            raise ValueError(self.mode)
        if self.mode == "clamp":  # no trial sees it
            return self.b(self.a(x)).clamp(-10, 10)
        if self.mode == "late":
            return self.b(self.a(x)) * (0.5 if self.calls > 100 else 1)
        self.kept = self.a(x)  # which no deepcopy survives
        return self.b(self.kept)


class Derived(nn.Sequential):
    pass


class Line(nn.Linear):
    pass


class Weight(nn.Parameter):
    pass


def stack():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))


def changed(act):
    model = stack()
    act(model)
    return model


def shared():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def relu_twice():
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu)


def other_order(model):
    weight = model[2].weight
    del model[2].weight
    model[2].weight = weight


def wider(model):
    model[2].weight = nn.Parameter(torch.randn(5, 4))
    model[2].bias = nn.Parameter(torch.randn(5))


def no_op(*args):
    return None


FALLS_BACK = {
    "tied": (changed(lambda m: setattr(m[2], "weight", m[1][0].weight)), "tied parameters"),
    "frozen bias": (changed(lambda m: m[2].bias.requires_grad_(False)), "frozen parameters"),
    "dropout": (nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)), "a Dropout"),
    "batch norm": (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "a BatchNorm1d"),
    "same": (nn.Sequential(nn.Conv2d(1, 1, 3, padding="same"), nn.Flatten(), nn.Linear(4, 4)), "padding 'same'"),
    "order": (Own("order"), "Own is a class of its own"),
    "clamp": (Own("clamp"), "Own is a class of its own"),
    "derived": (Derived(*stack()), "Derived is a class of its own"),
    "derived layer": (nn.Sequential(Line(4, 4)), "a Line"),
    "float buffer": (changed(lambda m: m.register_buffer("temperature", torch.ones(1))), "buffers"),
    "counter": (changed(lambda m: m[2].register_buffer("steps", torch.zeros(1, dtype=torch.int64))), "buffers"),
    "parameter": (changed(lambda m: m.register_parameter("x", nn.Parameter(torch.ones(1)))), "outside its layers"),
    "layer used twice": (shared(), "used twice"),
    "relu used twice": (relu_twice(), "used twice"),
    "forward hook": (changed(lambda m: m[1][0].register_forward_hook(no_op)), "1.0 has a hook"),
    "with kwargs": (changed(lambda m: m.register_forward_hook(no_op, with_kwargs=True)), "the model has a hook"),
    "pre-hook": (changed(lambda m: m[1].register_forward_pre_hook(no_op)), "1 has a hook"),
    "backward hook": (changed(lambda m: m[2].register_full_backward_hook(no_op)), "2 has a hook"),
    "backward pre-hook": (changed(lambda m: m[2].register_full_backward_pre_hook(no_op)), "2 has a hook"),
    "tensor hook": (changed(lambda m: m[2].weight.register_hook(torch.zeros_like)), "2.weight has a hook"),
    "grad hook": (changed(lambda m: m[2].bias.register_post_accumulate_grad_hook(no_op)), "2.bias has a hook"),
    "instance forward": (changed(lambda m: setattr(m[2], "forward", m[1][0].forward)), "2 has a forward of its own"),
    "compiled": (changed(lambda m: setattr(m, "_compiled_call_impl", m.forward)), "has a _compiled_call_impl"),
    "parametrized": (changed(lambda m: nn.utils.parametrizations.weight_norm(m[2])), "a _WeightNorm"),
    "pruned": (changed(lambda m: prune.l1_unstructured(m[2], "weight", 2)), "buffers"),
    "pruned for good": (
        changed(lambda m: prune.remove(prune.l1_unstructured(m[2], "weight", 2), "weight")),
        "in another order",
    ),
    "derived parameter": (changed(lambda m: setattr(m[2], "bias", Weight(torch.ones(4)))), "2.bias is a Weight"),
    "bias first": (changed(other_order), "in another order"),
    "other shape": (changed(wider), "another shape than its attributes"),
    "no integers": (
        nn.Sequential(nn.MaxPool2d((torch.tensor(2), 2)), nn.Flatten(), nn.Linear(4, 4)),
        "whose sizes are not integers",
    ),
}


@pytest.mark.parametrize("case", FALLS_BACK)
def test_auto_takes_by_hand_only_what_the_tree_proves(case):
    model, reason = FALLS_BACK[case]
    assert reason in why_not(model)
    flatten(model)
    engine, note = choose_engine("auto", model, (4,), *SGD)
    assert isinstance(engine, EagerEngine)
    assert note.startswith("eager (not fused, because ")
    assert reason in note
    assert "\n" not in note


@pytest.mark.parametrize(
    "case", ["tied", "frozen bias", "dropout", "batch norm", "same", "order", "derived layer", "float buffer", "pruned"]
)
def test_fused_as_asked_is_refused_where_it_cannot_be(case):
    model = FALLS_BACK[case][0]
    flatten(model)
    with pytest.raises(ModelError, match=r"^--engine fused does not fit this model: ") as caught:
        choose_engine("fused", model, (4,), *SGD)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["order", "function", "half", "raises"])
def test_a_trial_that_fails_is_one_line(mode):
    model = Own(mode)
    flatten(model)
    with pytest.raises(ModelError, match=r"forward\(\) does more than apply its layers in order"):
        choose_engine("fused", model, (4,), *SGD)
    assert isinstance(choose_engine("auto", model, (4,), *SGD)[0], EagerEngine)


@pytest.mark.parametrize("mode", ["stack", "clamp", "late"])
def test_fused_is_the_users_word_for_a_class_of_his_own(mode):
    """And the engine that auto takes says so. The trial leaves no trace, whatever the model keeps."""
    model = Own(mode)
    before = flatten(model).clone()
    _, note = choose_engine("auto", model, (4,), *SGD)
    assert "return nn.Sequential(Linear, Linear) or take --engine fused" in note
    state = torch.get_rng_state()
    assert isinstance(choose_engine("fused", model, (4,), *SGD)[0], FusedEngine)
    assert (model.calls, model.kept) == (0, None)
    assert torch.equal(flatten(model), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tensor_hook_counts_in_the_trial():
    """A copy of the model would have lost it."""
    model = Own("stack")
    model.a.weight.register_hook(torch.zeros_like)
    flatten(model)
    with pytest.raises(ModelError, match="does more than apply"):
        choose_engine("fused", model, (4,), *SGD)


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def global_hook():
    hook = register_module_forward_hook(no_op)
    yield
    hook.remove()


PROCESS = {
    "global hook": global_hook,
    "forward": lambda: mock.patch.object(nn.Linear, "forward", lambda self, x: functional.linear(x, self.weight)),
    "call": lambda: mock.patch.object(nn.Module, "__call__", lambda self, x: self.forward(x)),
    "linear": lambda: mock.patch.object(functional, "linear", functools.partial(functional.linear)),
    "loss": lambda: mock.patch.object(functional, "cross_entropy", functools.partial(functional.cross_entropy)),
    "relu": lambda: mock.patch.object(torch, "relu", lambda x: x),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    "function mode": Mode,
    "dispatch mode": Dispatch,
}


@pytest.mark.parametrize("process", PROCESS)
def test_auto_falls_back_where_the_process_changes_what_torch_does(process):
    model = stack()
    flatten(model)
    with PROCESS[process]():
        assert why_not(model) is not None
        assert isinstance(choose_engine("auto", model, (4,), *SGD)[0], EagerEngine)
    assert why_not(model) is None


def test_a_default_device_and_plain_attributes_do_no_harm():
    model = stack()
    model.name, model[2].note = "mine", [1, 2]
    with torch.device("cpu"):
        assert why_not(model) is None


def test_the_trial_leaves_the_model_alone():
    model = build_model("logistic", (1, 28, 28), 10)
    before = flatten(model).clone()
    choose_engine("auto", model, (1, 28, 28), *SGD)
    assert torch.equal(flatten(model), before)
    assert math.isfinite(float(before.sum()))
