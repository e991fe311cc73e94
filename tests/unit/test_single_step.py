"""Clients of one step together: each gets what it would get alone, and what the fused engine would give it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmpi.core.exactsum import ExactSum
from fedmpi.core.vector import flatten
from fedmpi.engines import single_step
from fedmpi.engines.fused import FusedEngine
from fedmpi.errors import ModelError


@st.composite
def stacks(draw):
    """(model, input shape) of one to three Linear layers, with and without ReLU and bias."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    shape = draw(st.sampled_from([(7,), (1, 5, 5), (33,), (1, 28, 28)]))
    layers, width = [nn.Flatten()], int(np.prod(shape))
    for _ in range(draw(st.integers(0, 2))):
        out = draw(st.integers(1, 40))
        layers += [nn.Linear(width, out, bias=draw(st.booleans())), *([nn.ReLU()] if draw(st.booleans()) else [])]
        width = out
    layers += [nn.Linear(width, draw(st.integers(2, 10))), *([nn.ReLU()] if draw(st.booleans()) else [])]
    return nn.Sequential(*layers), shape


def vectors(steps, clients, size):
    """The trained vectors, put together from their pieces."""
    held = np.full((max(clients) + 1, size), np.nan, np.float32)
    for i, columns, values in steps.pieces(clients):
        held[i, columns] = values
    return held[clients]


@given(
    stacks(),
    st.lists(st.integers(1, 12), min_size=1, max_size=9),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([1, 100, 2**15]),
)
def test_a_client_gets_the_same_alone_together_and_by_the_fused_engine(stack, sizes, weight_decay, piece):
    model, shape = stack
    vector = flatten(model)
    start = vector.clone()
    engine = FusedEngine(model, 0.1, 0.9, weight_decay)
    inputs, labels = torch.randn(sum(sizes), *shape), torch.randint(model_outputs(model), (sum(sizes),))
    everybody = list(range(len(sizes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_step, "_PIECE", piece)
        steps = engine.single_steps.run(start, inputs, labels, sizes)
        together = vectors(steps, everybody, len(start))
        for i, (x, y) in enumerate(zip(torch.split(inputs, sizes), torch.split(labels, sizes), strict=True)):
            alone = engine.single_steps.run(start, x, y, [sizes[i]])
            assert np.array_equal(vectors(alone, [0], len(start))[0], together[i])
            assert alone.losses[0] == steps.losses[i]
            assert alone.largest[0] == steps.largest[i]
            assert abs(together[i]).max() <= steps.largest[i]
            vector.copy_(start)
            engine.begin()
            loss = engine.epoch(x, y, sizes[i])
            np.testing.assert_allclose(together[i], vector.numpy(), rtol=1e-4, atol=1e-5)
            assert steps.losses[i] == pytest.approx(float(loss[0]), rel=1e-4, abs=1e-5)


def model_outputs(model):
    return [layer for layer in model if isinstance(layer, nn.Linear)][-1].out_features


def test_pieces_of_some_clients_add_up_to_the_sum_of_their_vectors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 60), nn.ReLU(), nn.Linear(60, 10))
    start = flatten(model).clone()
    steps = FusedEngine(model, 0.1, 0.0, 0.0).single_steps.run(
        start, torch.randn(9, 1, 28, 28), torch.randint(10, (9,)), [2, 3, 4]
    )
    sums = ExactSum(start, 9, 4), ExactSum(start, 9, 4)
    for i, columns, values in steps.pieces([0, 2]):
        sums[0].add_piece(columns, values, [2, 3, 4][i])
    sums[0].count(2)
    for vector, weight in zip(vectors(steps, [0, 2], len(start)), (2, 4), strict=True):
        sums[1].add(torch.from_numpy(vector), weight)
    assert torch.equal(sums[0].mean(), sums[1].mean())


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e30])
def test_the_bound_tells_a_client_that_does_not_fit(broken):
    model = nn.Sequential(nn.Linear(3, 2))
    start = flatten(model).clone()
    inputs = torch.ones(2, 3)
    inputs[1] = broken
    steps = FusedEngine(model, 0.1, 0.0, 0.0).single_steps.run(start, inputs, torch.tensor([0, 1]), [1, 1])
    exact = ExactSum(start, 2, 1)
    assert exact.in_range(steps.largest[0])
    assert not exact.in_range(steps.largest[1])
    exact.count(0)
    assert not exact.mean().any(), "nobody added is no update"


@pytest.mark.parametrize(
    "layers",
    [
        [nn.ReLU(), nn.Linear(3, 2)],
        [nn.Linear(3, 2), nn.ReLU(), nn.ReLU()],
        [nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(3, 2)],
    ],
)
def test_other_stacks_have_none(layers):
    assert single_step.single_step_engine(layers, 0.1, 0.0) is None


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
    "act",
    [
        lambda m: m.register_buffer("temperature", torch.ones(1)),
        lambda m: m[1].bias.requires_grad_(False),
        lambda m: m.register_parameter("other", nn.Parameter(torch.ones(2))),
        frozen_and_buffer,
        tied_in_the_vector,
        bias_first,
    ],
)
def test_pieces_that_are_not_the_whole_vector_are_refused(act):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    act(model)
    vector = flatten(model)
    engine = single_step.single_step_engine([model[i] for i in range(4)], 0.1, 0.0)
    with pytest.raises(ModelError, match=f"not the {len(vector)} of the vector"):
        engine.run(vector, torch.ones(1, 4), torch.tensor([0]), [1])


def test_pieces_of_layers_without_bias_are_the_whole_vector():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2, bias=False))
    start = flatten(model).clone()
    steps = single_step.single_step_engine(list(model), 0.1, 0.0).run(start, torch.ones(1, 4), torch.tensor([0]), [1])
    assert not np.isnan(vectors(steps, [0], len(start))).any()
