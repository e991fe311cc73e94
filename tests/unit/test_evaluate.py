"""Evaluation: any split of the chunks among ranks gives the same integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmpi.core.evaluate import CHUNK_SIZE, Evaluator, metrics_of

NUM_SAMPLES = 3 * CHUNK_SIZE + 37
INPUTS = torch.randn(NUM_SAMPLES, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (NUM_SAMPLES,), generator=torch.Generator().manual_seed(1))


def load(start: int, stop: int) -> tuple[Tensor, Tensor]:
    return INPUTS[start:stop], LABELS[start:stop]


@pytest.fixture
def model() -> nn.Module:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(2)))
        layer.bias.zero_()
    return layer


def test_any_split_into_shares_gives_the_same_integers(model: nn.Module) -> None:
    evaluator = Evaluator(NUM_SAMPLES, load)
    assert evaluator.num_chunks == 4
    whole = evaluator.evaluate(model, 0, 1)
    assert whole.dtype == np.int64
    for num_shares in (2, 3, 4, 10):
        parts = [Evaluator(NUM_SAMPLES, load).evaluate(model, share, num_shares) for share in range(num_shares)]
        assert np.array_equal(sum(parts), whole), num_shares
        assert all(not part.any() for part in parts[4:])


def test_metrics_are_those_of_the_whole_set_and_the_remainder_counts(model: nn.Module) -> None:
    metrics = metrics_of(Evaluator(NUM_SAMPLES, load).evaluate(model, 0, 1))
    logits = model(INPUTS).detach()
    assert metrics.num_samples == NUM_SAMPLES
    assert metrics.accuracy == int((logits.argmax(1) == LABELS).sum()) / NUM_SAMPLES
    assert metrics.loss == pytest.approx(float(functional.cross_entropy(logits.double(), LABELS)), rel=1e-6)


@pytest.mark.parametrize(("num_samples", "chunks"), [(1, 1), (99, 1), (100, 1), (101, 2), (300, 3)])
def test_chunks_cover_every_sample_once(num_samples: int, chunks: int, model: nn.Module) -> None:
    asked = []

    def noted(start: int, stop: int) -> tuple[Tensor, Tensor]:
        asked.append((start, stop))
        return load(start, stop)

    evaluator = Evaluator(num_samples, noted)
    assert evaluator.num_chunks == chunks
    assert evaluator.evaluate(model, 0, 1)[0] == num_samples
    assert [start for start, _ in asked] == [CHUNK_SIZE * i for i in range(chunks)]
    assert [stop for _, stop in asked] == [*(start for start, _ in asked[1:]), num_samples]
    evaluator.evaluate(model, 0, 1)
    assert len(asked) == chunks, "loaded once, kept for the next evaluation"


class Poisoned(nn.Module):
    """Gives NaN (or another value) for the samples of one chunk."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), 3)
        if len(x) != CHUNK_SIZE:
            logits[:, 0] = self.value
        return logits


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30])
def test_a_loss_that_is_not_finite_is_inf_and_the_accuracy_stays(value: float) -> None:
    sums = Evaluator(NUM_SAMPLES, load).evaluate(Poisoned(value), 0, 1)
    assert 0 < sums[3] <= NUM_SAMPLES % CHUNK_SIZE, "samples of the last chunk"
    metrics = metrics_of(sums)
    assert metrics.loss == math.inf
    assert 0 < metrics.accuracy < 1
    healthy = metrics_of(Evaluator(NUM_SAMPLES, load).evaluate(Poisoned(0.0), 0, 1))
    assert healthy.loss == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_and_no_random_number_is_drawn(training: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluator = Evaluator(NUM_SAMPLES, load)
    assert np.array_equal(evaluator.evaluate(model, 0, 1), evaluator.evaluate(model, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_chunks_beyond_a_bound_are_read_again(model: nn.Module) -> None:
    """Samples of 1 MB, of which 64 are kept; the result is the same."""
    wide, reads = torch.zeros(2**18), []

    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return layer(x[:, :4])

    def load_wide(start: int, stop: int) -> tuple[Tensor, Tensor]:
        reads.append(start)
        return wide.expand(stop - start, -1), LABELS[start:stop]

    layer, evaluator = model, Evaluator(NUM_SAMPLES, load_wide)
    first = evaluator.evaluate(Narrow(), 0, 1)
    assert np.array_equal(evaluator.evaluate(Narrow(), 0, 1), first)
    assert len(reads) == 2 * 4 - 1, "the last chunk, of 37 samples, has room"
