"""FedAvg's client half on a tiny data set: its arithmetic, and that no client leaves anything to the next."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmpi.config import RunConfig
from fedmpi.core.errors import ConfigError
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.data import client_data
from fedmpi.data.client_data import ClientData, Samples
from fedmpi.data.datasets import Dataset, Split
from fedmpi.data.partition_index import PartitionIndex
from fedmpi.fedavg import FEDAVG, FedAvgTrainer, fedavg_handler

CPU = torch.device("cpu")
SIZES = [8, 1, 12, 4]


def tiny() -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (25, 2, 3, 3), np.uint8)
    y = rng.integers(0, 4, 25).astype(np.int64)
    return Dataset("tiny", Split(x, y), Split(x[:9], y[:9]), 4, (0.4, 0.6), (0.2, 0.3), "")


def partition(sizes: Sequence[int] = SIZES) -> PartitionIndex:
    return PartitionIndex(np.cumsum([0, *sizes]), np.random.default_rng(1).permutation(25))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, 4))


def trainer(model: nn.Module | None = None, seed: int = 0, **options: Any) -> FedAvgTrainer:
    model = model or dense()
    sizes = [8, 2, 11, 4] if any(isinstance(each, nn.BatchNorm1d) for each in model.modules()) else SIZES
    made = FedAvgTrainer(model, ClientData(tiny(), partition(sizes), CPU), RunConfig(**options), CPU)
    made.seed = seed
    return made


def visit(client: FedAvgTrainer, client_id: int, start: Tensor, round_idx: int = 0) -> Tensor:
    client.begin_client(round_idx, client_id)
    client.train(start)
    return client.model_parameters.detach().clone()


def steps(client: FedAvgTrainer) -> list[tuple[int, list[int]]]:
    """Notes the size and labels of each batch that the engine is given from now on."""
    seen: list[tuple[int, list[int]]] = []
    real = client.engine.epoch

    def epoch(inputs: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        seen.extend((len(batch), batch.tolist()) for batch in torch.split(labels, batch_size))
        return real(inputs, labels, batch_size)

    client.engine.epoch = epoch  # type: ignore[method-assign]
    return seen


def test_samples_come_normalised_in_buffers_of_their_own() -> None:
    data, index = tiny(), partition()
    inputs, labels = ClientData(data, index, CPU).load(0)
    mine = index[0]
    mean, std = (np.array(v, np.float64).reshape(1, 2, 1, 1) for v in (data.mean, data.std))
    np.testing.assert_allclose(inputs.numpy(), (data.train.x[mine] / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert labels.tolist() == data.train.y[mine].tolist()
    assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
    inputs.zero_()
    labels.zero_()
    assert data.train.y[mine].any(), "the data set is left alone"
    test_inputs, _ = Samples(data, data.test, CPU).take(np.arange(2, 5))
    assert test_inputs.shape == (3, 2, 3, 3)


def test_sample_counts_are_the_splits() -> None:
    counts = trainer().num_samples(np.array([2, 0]))
    assert counts.tolist() == [12, 8]
    assert counts.dtype == np.int64
    assert not trainer().single_client, "any rank can train any client"


@pytest.mark.parametrize("model", [dense, network])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_result_does_not_depend_on_who_was_trained_before(model: Any, momentum: float) -> None:
    """Dropout, BatchNorm statistics, momentum, order of samples: all of them the client's own."""
    options = {"client_momentum": momentum, "batch_size": 4, "local_epochs": 2}
    client = trainer(model(), **options)
    start = client.model_parameters.detach().clone()
    alone = visit(client, 2, start, round_idx=3)
    loss = client.loss
    for before in ([0], [3, 0, 2]):
        other = trainer(model(), **options)
        torch.rand(5)
        for client_id in before:
            visit(other, client_id, start, round_idx=2)
        other.model.eval()  # as an evaluation leaves it
        assert torch.equal(visit(other, 2, start, round_idx=3), alone)
        assert other.loss == loss
    assert not torch.equal(visit(client, 2, start, round_idx=4), alone)
    assert not torch.equal(visit(trainer(model(), seed=1, **options), 2, start, round_idx=3), alone)


def test_the_received_model_is_left_alone() -> None:
    client = trainer()
    start = client.model_parameters.detach().clone()
    before = start.clone()
    visit(client, 0, start)
    assert torch.equal(start, before)


def test_training_is_algorithm_1_of_the_paper() -> None:
    """The same steps by torch's own optimizer and autograd."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
    reference = copy.deepcopy(model)
    client = trainer(model, batch_size=5, local_epochs=2, client_lr=0.05, client_momentum=0.5, client_weight_decay=0.01)
    start = client.model_parameters.detach().clone()
    end = visit(client, 2, start, round_idx=1)
    inputs, labels = ClientData(tiny(), partition(), CPU).load(2)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.5, weight_decay=0.01)
    generator = torch.Generator().manual_seed(derive_seed(0, Stream.BATCHES, 1, 2))
    losses = []
    for _ in range(2):
        order = torch.randperm(12, generator=generator)
        for batch in order.split(5):
            loss = functional.cross_entropy(reference(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    expected = torch.cat([p.detach().reshape(-1) for p in reference.parameters()])
    torch.testing.assert_close(end, expected, rtol=1e-5, atol=1e-6)
    assert client.loss == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "client_id", "sizes"),
    [(5, 2, [5, 5, 2]), (4, 3, [4]), (5, 1, [1]), (100, 2, [12]), (0, 2, [12]), (0, 1, [1]), (1, 3, [1] * 4)],
)
def test_an_epoch_is_every_sample_once_the_remainder_included(
    batch_size: int, client_id: int, sizes: list[int]
) -> None:
    client = trainer(batch_size=batch_size, local_epochs=2)
    seen = steps(client)
    visit(client, client_id, client.model_parameters.detach().clone())
    assert [size for size, _ in seen] == sizes * 2
    labels = sorted(tiny().train.y[partition()[client_id]].tolist())
    epochs = [[label for _, batch in half for label in batch] for half in (seen[: len(sizes)], seen[len(sizes) :])]
    assert [sorted(epoch) for epoch in epochs] == [labels, labels]
    if len(labels) == 12:
        assert epochs[0] != epochs[1], "shuffled anew"


def test_epochs_of_the_call_win() -> None:
    client = trainer(batch_size=0, local_epochs=1)
    seen = steps(client)
    client.begin_client(0, 2)
    client.train(client.model_parameters.detach().clone(), epochs=3)
    assert len(seen) == 3
    client.begin_client(0, 2)
    client.train(client.model_parameters.detach().clone(), epochs=0)
    assert len(seen) == 3
    assert math.isnan(client.loss)


def test_a_client_without_samples_stays_where_it_was() -> None:
    index = PartitionIndex(np.array([0, 0, 25]), np.arange(25))
    client = FedAvgTrainer(dense(), ClientData(tiny(), index, CPU), RunConfig(), CPU)
    start = torch.linspace(-1, 1, len(client.model_parameters))
    assert torch.equal(visit(client, 0, start), start)
    assert math.isnan(client.loss)


def test_a_derived_trainer_that_draws_has_generators_of_the_client() -> None:
    """Whatever engine takes the steps, and though a single step needs no model: its own `train` is what runs."""

    class Noisy(FedAvgTrainer):
        def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
            super().train(model_parameters, epochs)
            self.model_parameters.add_(torch.randn(len(self.model_parameters)))

    config = RunConfig(batch_size=0)
    ends = []
    for order in ((0, 1), (1, 0)):
        made = Noisy(plain(), ClientData(tiny(), partition(), CPU), config, CPU)
        assert made.engine_note == "fused"
        assert not made.takes_one_step(0)
        start = torch.zeros(len(made.model_parameters))
        held = {client_id: visit(made, client_id, start) for client_id in order}
        ends.append([held[0], held[1]])
    assert all(torch.equal(*each) for each in zip(*ends, strict=True))
    assert trainer(plain(), batch_size=0).takes_one_step(0)
    assert not trainer(dense(), batch_size=0).takes_one_step(0)


def test_batch_norm_of_a_cohort_is_the_closed_form() -> None:
    """Case E1: everybody once, one full batch: the mean of the clients' statistics, weighted by samples.

    running_mean = 0.1 x the mean input over all samples, running_var = 0.9 + 0.1 x the weighted mean of the clients'
    unbiased variances, whatever the step size.
    """
    index = PartitionIndex(np.array([0, 7, 12, 25]), np.random.default_rng(1).permutation(25))
    data = ClientData(tiny(), index, CPU)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(18), nn.Linear(18, 4))
    server = fedavg_handler(copy.deepcopy(model), RunConfig(num_clients=3, cohort_size=3))
    client = FedAvgTrainer(model, data, RunConfig(batch_size=0, client_lr=0.7), CPU)
    server.client_sizes = index.sizes
    cohort = server.sample_clients()
    start = server.model_parameters.clone()
    server.update_model([visit(client, k, start) for k in cohort])
    flat = [data.load(k)[0].flatten(1).double() for k in range(3)]
    mean = torch.cat(flat).mean(0)
    variance = sum(len(x) * x.var(0) for x in flat) / 25
    norm = server.model[1]
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * variance, rtol=0, atol=1e-6)


def test_the_server_half_takes_the_options() -> None:
    config = RunConfig(num_clients=30, cohort_size=4, rounds=9, target_accuracy=0.5, server_lr=0.25, seed=6)
    server = FEDAVG.handler(nn.Linear(1, 1), config)
    assert (server.num_clients, server.cohort_size, server.rounds) == (30, 4, 9)
    assert (server.target_accuracy, server.server_lr, server.seed) == (0.5, 0.25, 6)
    assert server.needs() == "sum"
    assert FEDAVG.trainer is FedAvgTrainer


def test_evaluation_on_some_samples_spreads_them_over_the_test_set() -> None:
    data = tiny()
    total = len(data.test)
    few = client_data.test_evaluator(data, CPU, torch.preserve_format, total // 2)
    assert few.num_samples == total // 2
    every_second, _ = Samples(data, data.test, CPU).take(np.arange(total // 2) * total // (total // 2))
    assert torch.equal(few._load(0, total // 2)[0], every_second)
    with pytest.raises(ConfigError, match=rf"--eval-samples must be in \[1, {total}\]"):
        client_data.test_evaluator(data, CPU, torch.preserve_format, total + 1)
