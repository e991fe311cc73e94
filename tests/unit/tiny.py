"""A data set of 25 samples, models for it, visits to its clients, and whole jobs of an algorithm on a lone rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmpi.algorithm import Algorithm, make
from fedmpi.config import RunConfig
from fedmpi.core.order import IntArray, MessageCode, Order
from fedmpi.core.record import RoundRecord
from fedmpi.core.session import Session
from fedmpi.core.worker import Visit
from fedmpi.data.client_data import ClientData, test_evaluator
from fedmpi.data.datasets import Dataset, Split
from fedmpi.data.split import PartitionIndex
from fedmpi.fedavg import FedAvg
from fedmpi.halves.algorithm_object import visits_of
from fedmpi.halves.algorithm_server import AlgorithmServer
from fedmpi.halves.visitor import ClientVisitor
from fedmpi.job import Halves, one_step_groups, start

CPU = torch.device("cpu")
SIZES = [8, 1, 12, 4]


def tiny() -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (25, 2, 3, 3), np.uint8)
    y = rng.integers(0, 4, 25).astype(np.int64)
    return Dataset("tiny", Split(x, y), Split(x[:9], y[:9]), 4, (0.4, 0.6), (0.2, 0.3), "")


def partition(sizes: Sequence[int] = SIZES) -> PartitionIndex:
    return PartitionIndex(np.cumsum([0, *sizes]), np.random.default_rng(1).permutation(sum(sizes)))


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def pictures() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 4))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, 4))


def visitor(
    model: nn.Module | None = None,
    seed: int = 0,
    cls: type[Algorithm[Any]] = FedAvg,
    sizes: Sequence[int] | None = None,
    **options: Any,
) -> ClientVisitor:
    """Return a visitor over the tiny data set; clients of a model with BatchNorm have two samples or more."""
    model = model or dense()
    if sizes is None:
        sizes = [8, 2, 11, 4] if any(isinstance(part, nn.BatchNorm1d) for part in model.modules()) else SIZES
    config = cls.Config(**options)
    made = ClientVisitor(make(cls, config), model, ClientData(tiny(), partition(sizes), CPU), config, CPU)
    made.seed = seed
    return made


def server_of(model: nn.Module) -> AlgorithmServer:
    """Return the server's half of FedAvg over a model."""
    return AlgorithmServer(make(FedAvg, RunConfig()), model, RunConfig())


def order_of(
    visitor: ClientVisitor, cohort: Sequence[int], round_idx: int = 0, method: str = "client_update", **fields: Any
) -> Order:
    """Return an order to visit a cohort, with the sample counts as weights."""
    ids = np.array(cohort, np.int64)
    weights = visitor.num_samples(ids)
    more: dict[str, Any] = {
        "cohort": ids, "ranks": ids * 0, "groups": np.arange(len(ids)), "weights": weights,
        "unit_max": np.array([weights.sum()]), **fields,
    }  # fmt: skip
    visit_idx = visits_of(type(visitor.algorithm)).index(method)
    return Order(MessageCode.PARAMETER_UPDATE, round_idx, visit_idx=visit_idx, **more)


def visited(
    visitor: ClientVisitor, client_id: int, start: Tensor, round_idx: int = 0, may_defer: bool = False, **more: Any
) -> Visit:
    return visitor.visit(order_of(visitor, [client_id], round_idx, **more), client_id, start, may_defer)


def visit(visitor: ClientVisitor, client_id: int, start: Tensor, round_idx: int = 0, **more: Any) -> Tensor:
    """Return what a client sends back."""
    visited(visitor, client_id, start, round_idx, **more)
    return visitor.back.clone()


class Recorder:
    """Keeps the records of rounds."""

    def __init__(self) -> None:
        self.records: list[RoundRecord] = []

    def on_round(self, record: RoundRecord) -> None:
        self.records.append(record)

    def on_end(self, half: Any) -> None:
        pass


@dataclass
class Job:
    """A job that has ended.

    Attributes:
        code: exit code.
        server: the server's half.
        visitor: the trainer's half.
        records: of its rounds.
        failure: why it diverged.
    """

    code: int
    server: AlgorithmServer
    visitor: ClientVisitor
    records: list[RoundRecord]
    failure: Exception | None

    @property
    def bits(self) -> bytes:
        return self.server.flat.numpy().tobytes()

    @property
    def integers(self) -> IntArray:
        return self.server.integer_state()


def play(
    cls: type[Algorithm[Any]],
    make_model: Callable[[], nn.Module] = plain,
    sizes: Sequence[int] = SIZES,
    prepare: Callable[[AlgorithmServer], None] = lambda server: None,
    block_bytes: int = 2**24,
    **options: Any,
) -> Job:
    """Run a job on this rank alone.

    Args:
        cls: the algorithm.
        make_model: a function that returns the initial model.
        sizes: samples of each client.
        prepare: called with the server's half before the first round.
        block_bytes: of rows that the server holds at a time.
        options: of the job.
    """
    import mpi4py.MPI

    from fedmpi.mpi.comm import Comm

    config: RunConfig = cls.Config(**{"num_clients": len(sizes), "cohort_size": len(sizes), "rounds": 2, **options})
    server = AlgorithmServer(make(cls, config), make_model(), config)
    data = ClientData(tiny(), partition(sizes), CPU)
    visitor = ClientVisitor(make(cls, config), make_model(), data, config, CPU)
    recorder = Recorder()
    grouping = one_step_groups(config) if visitor.groups is not None else None
    session = Session(
        Comm(mpi4py.MPI.COMM_SELF), server, visitor, evaluator=test_evaluator(tiny(), CPU, torch.preserve_format, None),
        eval_every=config.eval_every, observers=[recorder], grouping=grouping, block_bytes=block_bytes,
    )  # fmt: skip
    start(session, Halves(server, visitor), config)
    prepare(server)
    code = session.run()
    return Job(code, server, visitor, recorder.records, session.loop.failure if session.loop else None)
