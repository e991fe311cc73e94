"""A case's rounds, fedmpi's and the floor's in turns, on the same ranks in the same run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fedmpi.bench.cases import Case
from fedmpi.bench.floor import BareLoop
from fedmpi.bench.records import Records
from fedmpi.core.cohort import sample_cohort
from fedmpi.core.memory_format import memory_format_of
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.core.session import Session
from fedmpi.core.vector import SerializationTool
from fedmpi.data.client_data import ClientData, Samples, test_evaluator
from fedmpi.data.datasets import load_dataset
from fedmpi.engines.steps import Steps
from fedmpi.fedavg import FedAvg
from fedmpi.halves.algorithm_server import AlgorithmServer
from fedmpi.job import Halves, build_halves, initial_model, one_step_groups, share_partition, start
from fedmpi.machine.placement import find_machine
from fedmpi.mpi.buffers import Form
from fedmpi.mpi.comm import Comm
from fedmpi.mpi.setup import on_all, on_every_rank

FLOOR_RANKS = (1, 2)


@dataclass(frozen=True)
class Rounds:
    """Figures of a case, on the server; times are seconds per round.

    Attributes:
        fedmpi_s: fedmpi's, one for each block.
        floor_s: the floor's, one for each block.
        grouped_s: the floor's of clients of one step, 32 at a time, one for each block; empty: clients take more steps.
        accuracy: test accuracy after a block: fedmpi's, the floor's.
        evaluate_s: seconds of an evaluation, medians: fedmpi's, the floor's.
        idle_share: fedmpi's, in [0, 1].
        client_ms: what a client costs beside its steps: read, shuffle, reset, accumulate, report.
        engine: what took fedmpi's steps.
        floor: the fastest form of the floor's step.
    """

    fedmpi_s: list[float]
    floor_s: list[float]
    grouped_s: list[float]
    accuracy: tuple[float, float]
    evaluate_s: tuple[float, float]
    idle_share: float
    client_ms: float
    engine: str
    floor: str

    @property
    def ratios(self) -> list[float]:
        """Time of fedmpi over the floor's, block by block."""
        return [mine / floor for mine, floor in zip(self.fedmpi_s, self.floor_s, strict=True)]

    @property
    def grouped_ratios(self) -> list[float]:
        """Time of fedmpi over the grouped floor's, block by block."""
        return [own / floor for own, floor in zip(self.fedmpi_s, self.grouped_s, strict=False)]

    @property
    def noisy(self) -> bool:
        """Return True if the floor's own times differ by more than a quarter."""
        return max(self.floor_s) > 1.25 * min(self.floor_s)


class _NoSteps:
    """An engine that does nothing, to see what is left."""

    runs_model = False
    groups = None

    def begin(self, **settings: object) -> None: ...

    def steps(self) -> Steps:
        return Steps(0, 0.0)

    def epoch(self, inputs: torch.Tensor, labels: torch.Tensor, batch_size: int) -> torch.Tensor:
        return torch.zeros(1)


class CaseBench:
    """One case, ready to run on all ranks."""

    def __init__(self, net: Comm, pair: Comm, case: Case, device: Literal["auto", "cpu", "cuda"]) -> None:
        """Collective.

        Args:
            net: all ranks.
            pair: among `FLOOR_RANKS`, the two of them.
            case: what to run.
            device: --device.
        """
        self._net, self._config = net, case.config(device)
        machine = find_machine(net, self._config.device, self._config.threads)
        self._dataset = on_all(net, lambda: load_dataset("mnist", None))
        self._partition, _ = share_partition(net, self._config, self._dataset)
        self._device = machine.device
        self._halves = build_halves(net, FedAvg, self._config, self._dataset, self._partition, machine.device)
        self._initial = SerializationTool.serialize_model(self._halves.model)
        self._evaluator = test_evaluator(self._dataset, machine.device, memory_format_of(self._halves.model), None)
        self._floor = self._bare_loop(pair, machine.device) if net.rank in FLOOR_RANKS else None

    def run(self, pairs: int) -> Rounds:
        """Collective. `pairs` timed blocks of each in turns, after one of each that is not counted."""
        fedmpi_s, floor_s, grouped_s, evaluate_s, records = [], [], [], [], Records()
        one_step = int(self._partition.sizes.max()) <= self._config.batch_size
        for pair in range(pairs + 1):
            mine, records = self._block()
            floor, floor_evaluate_s, floor_accuracy = self._floor_block()
            if pair:
                fedmpi_s.append(mine)
                floor_s.append(floor)
                evaluate_s.append((_evaluate_s(records), floor_evaluate_s))
            if one_step:
                grouped, *_ = self._floor_block(grouped=True)
                grouped_s += [grouped] * bool(pair)
        visitor = self._halves.visitor
        client_ms = 0.0
        if visitor is not None:
            kept = visitor.engine, visitor.groups
            visitor.engine, visitor.groups = _NoSteps(), None  # type: ignore[assignment]  # one that does nothing
        _, empty = self._block()
        if visitor is not None:
            visitor.engine, visitor.groups = kept
        if self._net.is_server:
            clients = -(-self._config.clients_per_round // self._net.num_trainers)
            client_ms = 1e3 * float(np.median([record.timings["train_s"] for record in empty])) / clients
        notes = on_every_rank(self._net, visitor.engine_note if visitor else "")
        forms = on_every_rank(self._net, self._floor.form if self._floor else "")
        return Rounds(
            fedmpi_s,
            floor_s,
            grouped_s,
            ((records[-1].accuracy or 0.0) if records else 0.0, floor_accuracy),
            (float(np.median([mine for mine, _ in evaluate_s])), float(np.median([floor for _, floor in evaluate_s]))),
            float(np.mean([record.timings["idle_share"] for record in records])) if records else 0.0,
            client_ms,
            notes[-1],
            " / ".join(sorted({form for form in forms if form})),
        )

    def _block(self) -> tuple[float, Records]:
        """Collective. fedmpi's rounds from the initial weights: seconds a round and the records, on the server."""
        records, server, visitor = Records(), self._halves.server, self._halves.visitor
        if server is not None:
            SerializationTool.deserialize_model(server.model, self._initial)
            server = AlgorithmServer(server.algorithm, server.model, self._config)
        grouped = min(on_every_rank(self._net, visitor.groups is not None if visitor else True))
        session = Session(
            self._net,
            server,
            visitor,
            device=self._device,
            evaluator=self._evaluator,
            eval_every=self._config.eval_every,
            observers=[records],
            grouping=one_step_groups(self._config) if grouped else None,
        )
        start(session, Halves(server, visitor), self._config)
        session.run()
        self._net.over = False  # the job goes on
        return sum(record.timings["round_s"] for record in records) / self._config.rounds, records

    def _floor_block(self, grouped: bool = False) -> tuple[float, float, float]:
        """Collective. The floor's rounds with the same cohorts: seconds a round and an evaluation, and the accuracy."""
        self._net.barrier()
        spent_ns, evaluate_ns, accuracy = 0, 0, 0.0
        if self._floor is not None:
            self._floor.vector.copy_(self._initial)
            play = self._floor.grouped_round if grouped else self._floor.round
            begun = time.perf_counter_ns()
            for round_idx in range(self._config.rounds):
                seed = derive_seed(self._config.seed, Stream.COHORT, round_idx)
                cohort = sample_cohort(seed, self._config.num_clients, self._config.clients_per_round)
                play(cohort.tolist())
                trained = time.perf_counter_ns()
                accuracy = self._floor.evaluate()
                evaluate_ns += time.perf_counter_ns() - trained
            spent_ns = time.perf_counter_ns() - begun
        seconds, evaluate_s = (self._net.max_of(each) / 1e9 / self._config.rounds for each in (spent_ns, evaluate_ns))
        return seconds, evaluate_s, self._net.max_of(round(1e6 * accuracy)) / 1e6

    def _bare_loop(self, pair: Comm, device: torch.device) -> BareLoop:
        data = ClientData(self._dataset, self._partition, device)
        return BareLoop(
            initial_model(self._config, self._dataset).to(device),
            [data.load(client_id) for client_id in range(self._partition.num_clients)],
            Samples(self._dataset, self._dataset.test, device).take(np.arange(len(self._dataset.test))),
            FLOOR_RANKS.index(self._net.rank),
            len(FLOOR_RANKS),
            lambda values: pair.sum_all(values, Form(str(values.dtype), values.shape)),  # no comparing: it is a floor
            self._config.client_lr,
            self._config.batch_size,
        )


def _evaluate_s(records: Records) -> float:
    """Seconds of an evaluation; 0 where there are no records."""
    return float(np.mean([record.timings["evaluate_s"] for record in records])) if records else 0.0
