"""The client half: FedLab's trainer over any loader, one client after the other, nothing kept between them.

The closed form used below (case E9): a scalar w, loss (w - y)^2, one step of lr 0.25: w <- w - 0.5 (w - y). From w = 1
the clients y = 2, 3, 0 end at 1.5, 2 and 0.5, whose mean is 4/3.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SubsetRandomSampler, TensorDataset

from fedmpi.core.exactsum import ExactSum
from fedmpi.errors import ModelError
from fedmpi.fedlab.trainer import Batches, ClientSGDTrainer

TARGETS = [2.0, 3.0, 0.0]


class Scalar(nn.Module):
    """w, whatever the input."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x))


def one_sample(client_id: int) -> Batches:
    return [(torch.zeros(1), torch.tensor([TARGETS[client_id]]))]


def scalar_trainer(momentum: float = 0.0, epochs: int = 1) -> ClientSGDTrainer:
    model = Scalar()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=momentum)
    return ClientSGDTrainer(model, one_sample, epochs, optimizer, nn.MSELoss())


def visit(trainer: ClientSGDTrainer, client_id: int, start: Tensor, round_idx: int = 0) -> Tensor:
    trainer.begin_client(round_idx, client_id)
    trainer.train(start)
    return trainer.model_parameters.detach().clone()


def test_each_client_starts_from_the_server_and_the_mean_is_four_thirds() -> None:
    trainer = scalar_trainer()
    start = torch.tensor([1.0])
    exact = ExactSum(start, 3, 1)
    ends, losses = [], []
    for client_id in range(3):
        ends.append(visit(trainer, client_id, start).item())
        losses.append(trainer.loss)
        exact.add(trainer.model_parameters.detach(), 1)
    assert ends == [1.5, 2.0, 0.5]
    assert losses == [1.0, 4.0, 1.0]
    assert float(start + exact.mean()) == pytest.approx(4 / 3, rel=1e-7)
    assert start.item() == 1.0, "the received model is left alone"


def test_momentum_does_not_go_from_client_to_client() -> None:
    """Two steps with momentum 0.9 from w = 1 towards 0: velocity 2 -> w 0.5; velocity 1.8 + 1 = 2.8 -> w -0.2."""
    start = torch.tensor([1.0])
    alone = visit(scalar_trainer(0.9, epochs=2), 2, start)
    trainer = scalar_trainer(0.9, epochs=2)
    for client_id in (0, 1):
        visit(trainer, client_id, start)
    assert torch.equal(visit(trainer, 2, start), alone)
    assert alone.item() == pytest.approx(-0.2, abs=1e-6)


def test_adam_state_does_not_go_from_client_to_client_either() -> None:
    def adam() -> ClientSGDTrainer:
        model = Scalar()
        return ClientSGDTrainer(model, one_sample, 3, torch.optim.Adam(model.parameters(), lr=0.1), nn.MSELoss())

    start = torch.tensor([1.0])
    trainer = adam()
    visit(trainer, 0, start)
    assert torch.equal(visit(trainer, 2, start), visit(adam(), 2, start))


def test_a_learning_rate_that_the_users_train_changed_comes_back() -> None:
    trainer = scalar_trainer()
    trainer.optimizer.param_groups[0]["lr"] = 100.0
    assert visit(trainer, 0, torch.tensor([1.0])).item() == 1.5


def test_epochs_of_the_call_win_over_those_of_the_trainer() -> None:
    trainer = scalar_trainer(epochs=1)
    trainer.begin_client(0, 2)
    trainer.train(torch.tensor([1.0]), epochs=3)
    assert trainer.model_parameters.item() == 0.125
    trainer.begin_client(0, 2)
    trainer.train(torch.tensor([1.0]), epochs=0)
    assert trainer.model_parameters.item() == 1.0
    assert math.isnan(trainer.loss)


def test_one_loader_means_one_client_of_its_own() -> None:
    model = Scalar()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    own = ClientSGDTrainer(model, one_sample(1), 1, optimizer, nn.MSELoss())
    assert own.single_client
    assert not scalar_trainer().single_client
    assert list(own.data_loader) == one_sample(1)
    assert own.num_samples(np.array([0])).tolist() == [1]


DATA = TensorDataset(torch.arange(20.0).unsqueeze(1), torch.zeros(20))


class Backwards(Sampler[int]):
    """A user's own sampler: three samples, last first."""

    def __iter__(self) -> Iterator[int]:
        return iter((2, 1, 0))

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("loader", "count"),
    [
        (DataLoader(DATA, batch_size=8), 20),
        (DataLoader(DATA, batch_size=8, sampler=SubsetRandomSampler(range(7))), 7),
        (DataLoader(DATA, batch_size=2, sampler=Backwards()), 3),
        ([(torch.zeros(4, 1), torch.zeros(4)), (torch.zeros(3, 1), torch.zeros(3))], 7),
    ],
)
def test_samples_are_counted_by_the_sampler(loader: Batches, count: int) -> None:
    model = Scalar()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    trainer = ClientSGDTrainer(model, lambda _: loader, 1, optimizer, nn.MSELoss())
    counts = trainer.num_samples(np.array([5, 6]))
    assert counts.tolist() == [count, count]
    assert counts.dtype == np.int64


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(one_sample(0))


def test_the_weight_of_a_client_is_what_its_loader_yields() -> None:
    data = TensorDataset(torch.zeros(10, 2), torch.zeros(10, dtype=torch.int64))
    loaders = [
        DataLoader(data, 4),
        DataLoader(data, 4, drop_last=True),
        DataLoader(data, 4, sampler=SubsetRandomSampler(range(6)), drop_last=True),
        DataLoader(data, batch_sampler=[[0, 1, 2], [5]]),
    ]
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = ClientSGDTrainer(model, loaders.__getitem__, 1, optimizer, nn.CrossEntropyLoss())
    assert trainer.num_samples(np.arange(4)).tolist() == [10, 8, 4, 4]
    assert [sum(len(y) for _, y in loader) for loader in loaders] == [10, 8, 4, 4]


@pytest.mark.parametrize(
    "loader",
    [lambda _: iter(one_sample(0)), lambda _: (pair for pair in one_sample(0)), DataLoader(Stream()), Stream()],
)
def test_a_loader_without_a_length_wants_num_samples_overridden(loader: Any) -> None:
    model = Scalar()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    trainer = ClientSGDTrainer(model, loader, 1, optimizer, nn.MSELoss())
    with pytest.raises(ModelError, match=r"^cannot tell the samples of a \w+, .* override num_samples\(client_ids\)$"):
        trainer.num_samples(np.array([0]))


@pytest.mark.parametrize("of_client", [True, False])
def test_loaders_with_workers_are_refused(of_client: bool) -> None:
    model = Scalar()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    loader = DataLoader(DATA, num_workers=2)
    trainer = ClientSGDTrainer(model, (lambda _: loader) if of_client else loader, 1, optimizer, nn.MSELoss())
    for ask in (lambda: trainer.num_samples(np.array([0])), lambda: trainer.begin_client(0, 0)):
        with pytest.raises(ModelError, match=r"^DataLoader\(num_workers=2\) starts processes"):
            ask()


class Recorder(nn.Module):
    """Notes the samples it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x[:, 0].tolist()
        return (x * self.w).squeeze(1)


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(99)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(DATA, batch_size=4, shuffle=True),
        lambda: DataLoader(DATA, batch_size=4, shuffle=True, generator=own_generator()),
        lambda: DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, generator=own_generator())),
        lambda: DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler(range(20), generator=own_generator())),
        lambda: DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler(range(20))),
    ],
    ids=["global", "loader", "random_sampler", "subset_sampler", "subset_sampler_global"],
)
def test_batches_depend_on_round_and_client_and_not_on_who_came_before(make: Callable[[], Batches]) -> None:
    """Also with a generator of the loader's own, whose state would otherwise go from client to client."""

    def order(visits: list[tuple[int, int]], seed: int = 0) -> list[float]:
        model, loader = Recorder(), make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = ClientSGDTrainer(model, lambda _: loader, 1, optimizer, nn.MSELoss())
        trainer.seed = seed
        for round_idx, client_id in visits:
            model.seen = []
            visit(trainer, client_id, torch.zeros(1), round_idx)
        return model.seen

    usual = order([(1, 3)])
    assert sorted(usual) == list(range(20))
    torch.manual_seed(5)
    assert order([(1, 0), (1, 2), (1, 3)]) == usual
    assert order([(2, 3)]) != usual
    assert order([(1, 4)]) != usual
    assert order([(1, 3)], seed=1) != usual


def test_dropout_draws_the_same_for_a_client_wherever_it_is_trained() -> None:
    def trained(before: list[int]) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Flatten(0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        loader = DataLoader(DATA, batch_size=4)
        trainer = ClientSGDTrainer(model, lambda _: loader, 1, optimizer, nn.MSELoss())
        start = trainer.model_parameters.detach().clone()
        for client_id in [*before, 7]:
            trainer.model.eval()  # as an evaluation may have left it
            result = visit(trainer, client_id, start)
        return result

    assert torch.equal(trained([]), trained([1, 2]))


class Shared(nn.Module):
    """A frozen layer, a tied one, a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(1, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.up = nn.Linear(4, 4)
        self.down = nn.Linear(4, 4)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(self.frozen(x)))).sum(1)


def test_frozen_tied_and_batch_norm_tensors_start_afresh_with_each_client() -> None:
    torch.manual_seed(1)
    model = Shared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loaders = [[(torch.randn(6, 1), torch.randn(6))] * 2 for _ in range(3)]
    trainer = ClientSGDTrainer(model, lambda k: loaders[k], 2, optimizer, nn.MSELoss())
    start = trainer.model_parameters.detach().clone()
    frozen = model.frozen.weight.clone()
    alone = visit(trainer, 2, start)
    assert model.norm.running_mean.abs().min() > 0
    for client_id in (0, 1):
        assert not torch.equal(visit(trainer, client_id, start), alone)
    assert torch.equal(visit(trainer, 2, start), alone), "running statistics too: they are in the vector"
    assert torch.equal(model.frozen.weight, frozen)
    assert model.down.weight is model.up.weight
    assert len(start) == 4 + 4 + 16 + 4 + 4 + 4 + 4


def test_batch_norm_statistics_of_one_step_are_the_closed_form() -> None:
    """One batch from (mean 0, variance 1): 0.1 x its mean, and 0.9 + 0.1 x its unbiased variance."""
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Flatten(0))
    batch = torch.tensor([[1.0], [2.0], [6.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = ClientSGDTrainer(model, lambda _: [(batch, torch.zeros(3))], 1, optimizer, nn.MSELoss())
    start = trainer.model_parameters.detach().clone()
    for _ in range(2):
        end = visit(trainer, 0, start)
    assert end[2:].tolist() == pytest.approx([0.1 * 3, 0.9 + 0.1 * 7])


def test_what_a_client_does_is_logged_with_its_number(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("users.own")
    model = Scalar()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    trainer = ClientSGDTrainer(model, one_sample, 1, optimizer, nn.MSELoss(), logger=logger)
    with caplog.at_level(logging.DEBUG, logger="users.own"):
        visit(trainer, 2, torch.tensor([1.0]), round_idx=4)
    assert caplog.messages == ["client 2 trains in round 4"]
    assert (trainer.client_id, trainer.round_idx) == (2, 4)


def test_models_that_are_not_float32_are_refused() -> None:
    model = nn.Linear(1, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with pytest.raises(ModelError, match="'weight' is float64"):
        ClientSGDTrainer(model, one_sample, 1, optimizer, nn.MSELoss())
