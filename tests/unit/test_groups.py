"""Groups of clients of one step: their weighted update is that of the clients one by one, and of float64.

Shapes: T trainable entries, M clients, N samples.
"""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedmpi.core.vector import flatten
from fedmpi.engines import groups
from fedmpi.engines.fused import FusedEngine
from fedmpi.engines.groups import cut, group_engine
from fedmpi.errors import ModelError

LR = 0.1
NAN, INF = float("nan"), float("inf")


def stack(*widths, bias=True):
    layers = [nn.Flatten()]
    for i, (width, out) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(width, out, bias=bias)]
    return nn.Sequential(*layers)


def engine_of(model, lr=LR, weight_decay=0.0):
    engine = group_engine(list(model), lr, weight_decay)
    assert engine is not None
    return engine


def exact_update(model, lr, weight_decay, inputs, labels, sizes, weights):
    """sum a_k (w_k - w), (T,) in float64 by autograd, and the losses; one client after the other."""
    model = copy.deepcopy(model).double()
    params = list(model.parameters())
    start = torch.cat([param.detach().reshape(-1) for param in params])
    update, losses = torch.zeros_like(start), []
    for x, y, weight in zip(torch.split(inputs.double(), sizes), torch.split(labels, sizes), weights, strict=True):
        loss = functional.cross_entropy(model(x), y)
        gradient = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, params)])
        update += weight * -lr * (gradient + weight_decay * start)
        losses.append(loss.item())
    return update, losses


def one_by_one(model, vector, lr, weight_decay, inputs, labels, sizes):
    """(M, T) updates by the fused engine, each client's own."""
    start, updates = vector.clone(), []
    engine = FusedEngine(model, lr, 0.9, weight_decay)  # momentum has no part in a first step
    for x, y in zip(torch.split(inputs, sizes), torch.split(labels, sizes), strict=True):
        vector.copy_(start)
        engine.begin()
        engine.epoch(x, y, len(y))
        updates.append(vector.double() - start)
    vector.copy_(start)
    return torch.stack(updates)


def samples(count, width=36, classes=5, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator), torch.randint(classes, (count,), generator=generator)


def setting(sizes, *widths, seed=0):
    torch.manual_seed(seed)
    model = stack(*(widths or (36, 40, 12, 5)))
    return model, flatten(model), *samples(sum(sizes))


@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0, 1, 2, 7, 2**30])), min_size=1, max_size=32),
    st.sampled_from([(36, 5), (36, 33, 5), (36, 40, 12, 5)]),
    st.booleans(),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([2**18, 100]),
    st.integers(0, 100),
)
def test_a_group_is_the_sum_over_its_clients(clients, widths, bias, weight_decay, block, seed):
    """To 16 x 2^-24 of what adds up to it, against float64."""
    sizes, weights = [size for size, _ in clients], [weight for _, weight in clients]
    torch.manual_seed(seed)
    model = stack(*widths, bias=bias)
    vector, (inputs, labels) = flatten(model), samples(sum(sizes), seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_BLOCK", block)
        step = engine_of(model, LR, weight_decay).run(vector, inputs, labels, sizes, weights)
    wanted, losses = exact_update(model, LR, weight_decay, inputs, labels, sizes, weights)
    assert (step.update.shape, step.update.dtype, step.finite) == (vector.shape, torch.float64, True)
    parts = one_by_one(model, vector, LR, weight_decay, inputs, labels, sizes).abs().amax(1)
    assert (step.update - wanted).abs().max() <= 16 * 2**-24 * (parts @ torch.tensor(weights, dtype=torch.float64))
    assert step.losses == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_the_error_is_a_few_roundings_of_the_groups_own_update(weight_decay):
    sizes = [6] * 32
    torch.manual_seed(0)
    model = stack(784, 200, 200, 10)
    vector, (inputs, labels) = flatten(model), samples(192, 784, 10)
    step = engine_of(model, LR, weight_decay).run(vector, inputs, labels, sizes, sizes)
    wanted, _ = exact_update(model, LR, weight_decay, inputs, labels, sizes, sizes)
    assert (step.update - wanted).abs().max() <= 8 * 2**-24 * wanted.abs().max()
    assert (step.update - wanted).norm() <= 8 * 2**-24 * wanted.norm()


@pytest.mark.parametrize("size", [1, 6, 100, 127])
def test_large_updates_are_those_of_the_clients_one_by_one(size):
    """Mean updates of about `size`: a client's own vector is rounded to float32, the group's sum is not."""
    sizes, weights = [3, 1, 5, 2], [3, 1, 5, 2]
    model, vector, inputs, labels = setting(sizes)
    unit = one_by_one(model, vector, 1.0, 0.0, inputs, labels, sizes)
    lr = float(size / (torch.tensor(weights, dtype=torch.float64) @ unit / sum(weights)).abs().max())
    step = engine_of(model, lr).run(vector, inputs, labels, sizes, weights)
    alone = torch.tensor(weights, dtype=torch.float64) @ one_by_one(model, vector, lr, 0.0, inputs, labels, sizes)
    assert float(step.update.abs().max()) / sum(weights) == pytest.approx(size, rel=1e-5)
    assert (step.update - alone).abs().max() <= 16 * 2**-24 * alone.abs().max()


def test_weights_that_are_no_sample_counts_by_hand():
    """One weight w = (0, 0), two classes: g = (p - e) x with p = 1/2; lr 1, decay 0.5 of w = 0 adds nothing.

    Client 0 (weight 3): x = 2, class 0 and x = 4, class 1: mean g of row 0 = (-1 + 2) / 2 = 0.5. Client 1 (weight 0)
    has x = 100. Client 2 (weight 5): x = 6, class 0: g of row 0 = -3. Sum: -(3 x 0.5 + 0 + 5 x -3) = 13.5.
    """
    model = nn.Sequential(nn.Linear(1, 2, bias=False))
    vector = flatten(model)
    vector.zero_()
    inputs = torch.tensor([[2.0], [4.0], [100.0], [6.0]])
    step = engine_of(model, 1.0, 0.5).run(vector, inputs, torch.tensor([0, 1, 1, 0]), [2, 1, 1], [3, 0, 5])
    assert step.update.tolist() == [13.5, -13.5]
    assert step.losses == pytest.approx([np.log(2)] * 3)


def test_weight_decay_by_hand():
    """Inputs of 0 and no bias leave the decay: -lr d A w = -0.5 x 0.25 x (3 + 1) w = -0.5 w."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    vector = flatten(model)
    step = engine_of(model, 0.5, 0.25).run(vector, torch.zeros(3, 2), torch.tensor([0, 1, 0]), [1, 2], [3, 1])
    assert torch.equal(step.update, -0.5 * vector.double())


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
@pytest.mark.parametrize("weight", [0, 4])
def test_a_client_that_is_not_finite_makes_the_group_not_finite(broken, weight):
    sizes = [2, 3, 1]
    model, vector, inputs, labels = setting(sizes, 36, 40, 5)
    engine = engine_of(model)
    assert engine.run(vector, inputs, labels, sizes, [2, weight, 1]).finite
    inputs[3, 7] = broken
    assert not engine.run(vector, inputs, labels, sizes, [2, weight, 1]).finite
    assert not engine.run(vector, inputs[2:5], labels[2:5], [3], [weight]).finite
    assert engine.run(vector, inputs[:2], labels[:2], [2], [2]).finite


def test_a_feature_that_no_unit_passes_on_is_found():
    """The loss is finite where each hidden unit is cut off at 0, and the client's model is not."""
    model = stack(2, 3, 2)
    vector = flatten(model)
    model[1].weight.data.fill_(-1.0)
    step = engine_of(model).run(vector, torch.tensor([[INF, 1.0], [1.0, 1.0]]), torch.tensor([0, 1]), [1, 1], [0, 1])
    assert np.isfinite(step.losses).all()
    assert not step.finite


def test_an_update_too_large_for_float32_through_its_weight_is_not_finite():
    model, vector, inputs, labels = setting([1], 36, 5)
    assert not engine_of(model, 1e20).run(vector, inputs * 1e18, labels, [1], [2**30]).finite


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_the_bits_do_not_depend_on_addresses(offset):
    sizes = [6, 1, 9, 3]
    model, vector, _, labels = setting(sizes, 48, 41, 13, 5)
    inputs = samples(sum(sizes), 48)[0]
    engine = engine_of(model, LR, 0.01)

    def shifted(tensor):
        memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
        return memory[offset:].view(tensor.shape).copy_(tensor)

    steps = [
        engine.run(vector, inputs, labels, sizes, sizes),
        engine.run(shifted(vector), shifted(inputs), shifted(labels), sizes, sizes),
    ]
    assert torch.equal(steps[0].update, steps[1].update)
    assert steps[0].losses == steps[1].losses


def test_the_model_and_the_samples_are_left_alone():
    sizes = [4, 2]
    model, vector, inputs, labels = setting(sizes)
    before = vector.clone(), inputs.clone()
    start = vector + 1
    engine_of(model).run(start, inputs, labels, sizes, sizes)
    assert torch.equal(vector, before[0])
    assert torch.equal(inputs, before[1])
    assert torch.equal(start, before[0] + 1)


def test_only_stacks_of_linear_and_relu_have_groups():
    for layers in (
        [nn.ReLU(), nn.Linear(3, 2)],
        [nn.Linear(3, 2), nn.ReLU(), nn.ReLU()],
        [nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(3, 2)],
    ):
        assert group_engine(layers, LR, 0.0) is None
    model = stack(36, 5)
    flatten(model)
    assert FusedEngine(model, LR, 0.9, 0.0).groups is not None


def tied_in_the_vector(model):
    """As many entries as the layers have, but a weight counts twice and another parameter not at all."""
    model[3].weight = model[1].weight
    model.register_parameter("other", nn.Parameter(torch.ones(16)))


def bias_first(model):
    weight = model[1].weight
    del model[1].weight
    model[1].weight = weight


def frozen_and_buffer(model):
    model[1].bias.requires_grad_(False)
    model.register_buffer("temperature", torch.ones(4))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.register_buffer("temperature", torch.ones(1)),
        lambda m: m[1].bias.requires_grad_(False),
        lambda m: m.register_parameter("other", nn.Parameter(torch.ones(2))),
        frozen_and_buffer,
        tied_in_the_vector,
        bias_first,
    ],
)
def test_layers_that_are_not_the_whole_vector_are_refused(change):
    model = stack(4, 4, 4)
    change(model)
    vector = flatten(model)
    engine = engine_of(model)
    with pytest.raises(ModelError, match=f"not the {len(vector)} of the vector"):
        engine.run(vector, torch.ones(1, 4), torch.tensor([0]), [1], [1])


def sizes_of_groups(sizes):
    return [sizes[part] for part in cut(np.arange(len(sizes)) * 3, np.array(sizes, np.int64))]


def test_groups_are_cut_at_32_clients_256_samples_and_large_clients():
    assert sizes_of_groups([]) == []
    assert sizes_of_groups([1] * 70) == [[1] * 32, [1] * 32, [1] * 6]
    assert sizes_of_groups([60] * 9) == [[60] * 4, [60] * 4, [60]]
    assert sizes_of_groups([64, 64, 64, 64, 1]) == [[64, 64, 64, 64], [1]]
    assert sizes_of_groups([2, 2, 65, 2, 2]) == [[2, 2], [65], [2, 2]]
    assert sizes_of_groups([600, 65, 1]) == [[600], [65], [1]]


@given(st.lists(st.one_of(st.integers(1, 12), st.integers(50, 300)), max_size=100))
def test_every_client_is_in_one_group(sizes):
    parts = sizes_of_groups(sizes)
    assert [size for part in parts for size in part] == sizes
    for part in parts:
        assert len(part) == 1 or (len(part) <= 32 and sum(part) <= 256 and max(part) <= 64)
