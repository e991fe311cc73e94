"""Updates that travel as rows give the bits of updates that are summed on the way, for models of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedmpi.core.exactsum import ExactSum
from fedmpi.fedlab.handler import SyncParameterServerHandler
from fedmpi.fedlab.trainer import ClientSGDTrainer

SIZES = [2, 11, 5, 8]
CLIENTS = range(len(SIZES))


class Odd(nn.Module):
    """A scalar, an empty parameter, one of three axes, one that no gradient reaches, and a buffer that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.mix = nn.Parameter(torch.randn(2, 6, 4))
        self.unused = nn.Parameter(torch.ones(1, 1, 1))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.shift.mul_(0.5).add_(x.detach().mean())
        return self.gain * torch.einsum("ni,kij->nj", x, self.mix) + self.shift


class Tied(nn.Module):
    """One weight in two places, beside a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.second(self.first(x).relu()))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)),
    "LayerNorm": lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 4)),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2)), nn.TransformerEncoderLayer(2, 2, 8, 0.1, batch_first=True), nn.Flatten(1),
        nn.Linear(6, 4),
    ),
    "conv": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2, bias=False), nn.Flatten(), nn.PReLU(),
                                  nn.Linear(6, 4)),
    "frozen and tied": Tied,
    "odd shapes": Odd,
}  # fmt: skip


def loader_of(client_id: int) -> DataLoader[Any]:
    rng = np.random.default_rng(client_id)
    x = torch.from_numpy(rng.normal(3 * client_id, 1, (SIZES[client_id], 6)).astype(np.float32))
    return DataLoader(TensorDataset(x, x.sum(1).long() % 4), batch_size=3, shuffle=True, drop_last=SIZES[client_id] > 3)


def trained(make: Callable[[], nn.Module]) -> tuple[SyncParameterServerHandler, list[Tensor]]:
    """Return a server whose cohort is everybody, and what its clients came to in round 0."""
    torch.manual_seed(0)
    server = SyncParameterServerHandler(make(), len(SIZES))
    server.client_sizes = np.array(SIZES)
    server.sample_clients()
    torch.manual_seed(0)
    model = make()
    trainer = ClientSGDTrainer(
        model, loader_of, 2, torch.optim.SGD(model.parameters(), 0.1, 0.9), nn.CrossEntropyLoss()
    )
    rows = []
    for client_id in CLIENTS:
        trainer.begin_client(0, client_id)
        trainer.train(server.model_parameters)
        rows.append(trainer.model_parameters.detach().clone())
    return server, rows


def summed(start: Tensor, rows: list[Tensor], placement: list[list[int]]) -> Tensor:
    """Return what the server gets when rank i adds the clients `placement[i]` and the ranks' integers are added."""
    ranks = [ExactSum(start, sum(SIZES), max(SIZES)) for _ in placement]
    for exact, client_ids in zip(ranks, placement, strict=True):
        for client_id in client_ids:
            exact.add(rows[client_id], SIZES[client_id])
    num_bins = max(exact.num_bins for exact in ranks)
    server = ExactSum(start, sum(SIZES), max(SIZES))
    for exact in ranks:
        for total, part in zip(server.buffers(num_bins), exact.buffers(num_bins), strict=True):
            total += part
    return server.mean()


@pytest.mark.parametrize("factor", [1, 2**50], ids=["as trained", "one client beyond the finest bin"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_and_sums_of_any_placement_are_the_same_bits(name: str, factor: int) -> None:
    server, rows = trained(MODELS[name])
    start = server.model_parameters.clone()
    assert all(not torch.equal(row, start) for row in rows)
    rows[1] = start + factor * (rows[1] - start)
    mean = summed(start, rows, [list(CLIENTS)])
    for placement in ([[3, 1], [], [2, 0]], [[0], [1], [2], [3]], [[2, 3, 0, 1]]):
        assert torch.equal(summed(start, rows, placement), mean)
    server.update_model(rows)
    whole = server.model_parameters.clone()
    server.model_parameters.copy_(start)
    server.step(mean)
    assert torch.equal(server.model_parameters, whole)
    assert torch.isfinite(whole).all()
