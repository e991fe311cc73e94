"""Rounds of an algorithm on this process alone, over toy data whose numbers fit on paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import mpi4py.MPI
import numpy as np
import torch
from torch import Tensor, nn

from fedmpi.algorithm import Algorithm, make
from fedmpi.core.record import RoundRecord
from fedmpi.core.session import Session
from fedmpi.data.client_data import ClientData
from fedmpi.data.datasets import Dataset, Split
from fedmpi.data.split import PartitionIndex
from fedmpi.halves.algorithm_server import AlgorithmServer
from fedmpi.halves.visitor import ClientVisitor
from fedmpi.job import Halves, one_step_groups, start
from fedmpi.mpi.comm import Comm

CPU = torch.device("cpu")


def points(x: Sequence[float], y: Sequence[int]) -> Dataset:
    """Samples of one number each, with label 0 or 1."""
    split = Split(np.array(x, np.float32).reshape(-1, 1), np.array(y, np.int64))  # type: ignore[arg-type]  # not images
    return Dataset("points", split, split, 2, (0.0,), (1.0,), "")


def noise(num_samples: int = 60) -> Dataset:
    """Samples of six random numbers, with four labels."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(num_samples, 6)).astype(np.float32), rng.integers(0, 4, num_samples)
    split = Split(x, y)  # type: ignore[arg-type]  # not images
    return Dataset("noise", split, split, 4, (0.0,), (1.0,), "")


def two_weights(w: float = 0.0) -> nn.Module:
    """Logits (w x, -w x): with p = 1 / (1 + exp(-2 w x)) a sample of label 0 has the gradient -(1 - p) x for w.

    Its loss is -log p; with label 1 they are p x and -log(1 - p). The second weight mirrors the first.
    """
    layer = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[w], [-w]]))
    return layer


def stack() -> nn.Module:
    """Two layers with BatchNorm and dropout."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4))


@dataclasses.dataclass
class Played:
    """What some rounds came to."""

    server: AlgorithmServer
    records: list[RoundRecord]

    @property
    def w(self) -> Tensor:
        return self.server.flat[self.server.layout["w"].columns]

    @property
    def vector(self) -> Tensor:
        return self.server.flat[self.server.layout.vector]


class Recorder:
    """Keeps the records of a run."""

    def __init__(self) -> None:
        self.records: list[RoundRecord] = []

    def on_round(self, record: RoundRecord) -> None:
        self.records.append(dataclasses.replace(record, timings={}))

    def on_end(self, half: Any) -> None:
        pass


def play(
    cls: type[Algorithm[Any]],
    dataset: Dataset,
    sizes: Sequence[int],
    make_model: Callable[[], nn.Module] = two_weights,
    **options: Any,
) -> Played:
    """Run a job of rounds; client k has the next `sizes[k]` samples. By default one step per round of all clients."""
    split = {"num_clients": len(sizes), "dataset": "synthetic"}
    config = cls.Config(**{**split, "cohort_size": len(sizes), "batch_size": 0, "rounds": 1, **options})
    config.check()
    partition = PartitionIndex(np.cumsum([0, *sizes]), np.arange(sum(sizes)))
    server = AlgorithmServer(make(cls, config), make_model(), config)
    visitor = ClientVisitor(make(cls, config), make_model(), ClientData(dataset, partition, CPU), config, CPU)
    recorder = Recorder()
    grouping = one_step_groups(config) if visitor.groups is not None else None
    session = Session(Comm(mpi4py.MPI.COMM_SELF), server, visitor, observers=[recorder], grouping=grouping)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a job; threads of busy machines wait for each other
    try:
        start(session, Halves(server, visitor), config)
        assert session.run() == 0
    finally:
        torch.set_num_threads(threads)
    return Played(server, recorder.records)
