"""A job inside MPI: device -> data -> the algorithm's halves -> run folder -> session -> rounds.

Every function that communicates is collective; only `build_halves` looks at the role of a rank.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmpi.algorithm import Algorithm, make
from fedmpi.config import RunConfig
from fedmpi.core.coordinator import Grouping
from fedmpi.core.isolation import put_back_note
from fedmpi.core.memory_format import memory_format_of
from fedmpi.core.order import IntArray
from fedmpi.core.seeding import Stream, derive_seed, seed_everything
from fedmpi.core.session import Session
from fedmpi.data.client_data import ClientData, test_evaluator
from fedmpi.data.datasets import Dataset, load_dataset
from fedmpi.data.job_split import resolve_partition
from fedmpi.data.split import PartitionIndex, map_split
from fedmpi.engines import groups
from fedmpi.errors import EXIT_DONE
from fedmpi.halves.algorithm_server import AlgorithmServer
from fedmpi.halves.visitor import ClientVisitor
from fedmpi.imports import import_name
from fedmpi.lifecycle.exits import say
from fedmpi.lifecycle.policies import CheckpointPolicy, StopPolicy
from fedmpi.lifecycle.signals import Deadline, StopSignals
from fedmpi.lifecycle.watchdog import Watchdog
from fedmpi.logs import SUMMARY
from fedmpi.machine.placement import Machine, find_machine
from fedmpi.models import build_model, model_function
from fedmpi.mpi.comm import Comm, library_version
from fedmpi.mpi.setup import on_all, on_every_rank, on_root
from fedmpi.mpi.timeline import chrome_trace
from fedmpi.mpi.tree import bcast_vector
from fedmpi.options import result_hash
from fedmpi.outcome import Outcome, outcome_of
from fedmpi.report.banner import banner
from fedmpi.report.identity import functions_of, identity, sources
from fedmpi.report.progress import Progress
from fedmpi.report.provenance import input_record, split_record
from fedmpi.report.run_folder import RunFolder
from fedmpi.version import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Halves:
    """Parts of the algorithm on this rank; a lone rank has both."""

    server: AlgorithmServer | None
    visitor: ClientVisitor | None

    @property
    def model(self) -> torch.nn.Module:
        """The server's, else the trainer's."""
        half = self.server or self.visitor
        assert half
        return half.model


def run_job(
    comm: Comm,
    algorithm: str,
    config: RunConfig,
    watchdog: Watchdog | None,
    signals: StopSignals | None = None,
    deadline: Deadline | None = None,
) -> Outcome:
    """Collective. Train as `config` says.

    Args:
        comm: this rank's end of the communicator.
        algorithm: "module:Class" of an `Algorithm`.
        config: its options, the same on every rank.
        watchdog: of this rank, which has begun; None: nobody watches.
        signals: of this process, which end the job early.
        deadline: the end of the job's time, as rank 0 knows it.

    Raises:
        FedmpiError: a mistake of the user's, on every rank alike.
    """
    cls: type[Algorithm[Any]] = import_name(f"algorithm {algorithm}", algorithm)
    machine = find_machine(comm, config.device, config.threads)
    dataset = on_all(comm, lambda: load_dataset(config.dataset, config.data_dir))
    partition, split = share_partition(comm, config, dataset)
    halves = on_all(comm, lambda: build_halves(comm, cls, config, dataset, partition, machine.device))
    server, visitor = halves.server, halves.visitor
    data = {"dataset_sha256": dataset.sha256, "partition_sha256": split}
    folder = on_root(comm, lambda: RunFolder(config, data, identity(algorithm, halves.model), __version__), share=False)
    try:
        if on_root(comm, lambda: folder is not None and nothing_to_do(folder, server, config.rounds)):
            return outcome_of(EXIT_DONE, folder.path if folder else None, halves.model)
        engines = on_every_rank(comm, visitor.engine_note if visitor else None)
        changed = on_every_rank(comm, list(visitor.changed_attributes) if visitor else [])[-1]
        users = on_every_rank(comm, sources(_functions(cls, config, halves.model)))
        record = _provenance(comm, algorithm, machine, engines[-1], data, dataset, users)
        on_root(comm, lambda: folder.begin(config, record | split_record(config, split)) if folder else None)
        progress = Progress(config.rounds, folder.elapsed_s if folder else 0.0)
        policy = StopPolicy(CheckpointPolicy(folder, config.checkpoint_every), signals, deadline)
        memory_format = memory_format_of(halves.model)
        grouped = min(on_every_rank(comm, visitor.groups is not None if visitor else True))
        session = Session(
            comm,
            server,
            visitor,
            device=machine.device,
            evaluator=on_all(comm, lambda: test_evaluator(dataset, machine.device, memory_format, config.eval_samples)),
            facts={
                "options": result_hash(config),
                "data set": dataset.sha256,
                "threads": machine.threads,
                "engine": engines[comm.rank] or engines[-1],
            },
            schedule=config.schedule,
            eval_every=config.eval_every,
            observers=[observer for observer in (folder, progress) if observer],
            policy=policy,
            signals=signals,
            cuda_aware=config.cuda_aware,
            grouping=one_step_groups(config) if grouped else None,
        )
        start(session, halves, config)
        on_root(comm, lambda: resume(folder, session))
        if machine.warning:
            logger.warning("%s", machine.warning)
        if server is not None and folder is not None:
            size = len(server.flat[server.layout.vector])
            title = cls.__name__
            for line in banner(title, config, machine.places, dataset, partition, size, record, folder.path):
                logger.info("%s", line)
            if changed:
                logger.info("%s", put_back_note(changed))
            if deadline is not None:
                logger.info("time:   %.0f s left of %s", max(0.0, deadline.left_s()), deadline.what)
        if config.timeline:
            comm.barrier()
            comm.timeline.begin()
        if signals is not None:
            signals.catch_interrupt(say if comm.is_server else None)
        if watchdog is not None:
            watchdog.begin_rounds(policy if comm.is_server else None)
        code = session.run()
        if watchdog is not None:
            watchdog.stop()
        if config.timeline:
            spans = on_every_rank(comm, comm.timeline.end())
            on_root(comm, lambda: folder.write_timeline(chrome_trace(spans)) if folder else None)
        failure = session.loop.failure if session.loop else None
        outcome = outcome_of(code, folder.path if folder else None, halves.model, failure)
        if folder is not None and code == EXIT_DONE:
            logger.log(SUMMARY, "%s", progress.summary(outcome.model_hash, folder.path))
        return outcome
    finally:
        if folder is not None:
            folder.close()


def start(session: Session, halves: Halves, config: RunConfig) -> None:
    """Collective. Set a session up; the server's half learns of its exchanges."""
    on_server, visitor = halves.server is not None, halves.visitor
    num_clients, seed = (config.num_clients, config.seed) if on_server else (0, 0)
    session.set_up(num_clients, seed, visitor.num_samples if visitor else None, single=False)
    if halves.server is not None:
        halves.server.coordinator = session.coordinator


def nothing_to_do(folder: RunFolder, server: AlgorithmServer | None, rounds: int) -> bool:
    """Return True, on the server, if the run in the folder has all the rounds that are asked for; says so."""
    if folder.stored is None or server is None:
        return False
    with folder.fits():
        server.load_state_dict(folder.stored["server"]["half"])
        at_its_end = server.finished()
    done = server.round_idx
    if done > rounds:
        logger.info("%s has %d rounds, --rounds asks for %d: nothing to do", folder.path, done, rounds)
    elif at_its_end and folder.finished:
        logger.info("this very run is finished already, after round %d: nothing to do", done)
    else:
        return False
    return True


def resume(folder: RunFolder | None, session: Session) -> None:
    """On the server, go on from what the folder holds, if anything."""
    if session.loop is not None and folder is not None and folder.stored is not None:
        with folder.fits():
            session.loop.load_state_dict(folder.stored["server"])


def share_partition(comm: Comm, config: RunConfig, dataset: Dataset) -> tuple[PartitionIndex, str]:
    """Collective. The split, found or made by the server, and its SHA-256.

    A large one is mapped by all ranks from one file if they can see it; else the server sends the arrays.
    """
    held: list[PartitionIndex] = []

    def resolve() -> tuple[str, int, int, Path | None]:
        index, sha256, _ = resolve_partition(config, dataset, config.data_dir)
        held.append(index)
        return sha256, len(index.offsets), len(index.indices), index.file

    sha256, num_offsets, num_indices, file = on_root(comm, resolve)
    mapped = held[0] if held else map_split(file, whole=False) if file else None
    fits = mapped is not None and (len(mapped.offsets), len(mapped.indices)) == (num_offsets, num_indices)
    if file and comm.max_of(int(not fits)) == 0:
        assert mapped is not None
        return mapped, sha256
    offsets = held[0].offsets if held else np.empty(num_offsets, np.int64)
    indices = held[0].indices if held else np.empty(num_indices, np.int64)
    return PartitionIndex(bcast_vector(comm, offsets), bcast_vector(comm, indices)), sha256


def build_halves(
    comm: Comm,
    cls: type[Algorithm[Any]],
    config: RunConfig,
    dataset: Dataset,
    partition: PartitionIndex,
    device: torch.device,
) -> Halves:
    """The server half on rank 0, the client half on the others, both on a lone rank."""
    server = visitor = None
    if comm.is_server:
        server = AlgorithmServer(make(cls, config), initial_model(config, dataset), config)
    if not comm.is_server or comm.size == 1:
        data = ClientData(dataset, partition, device)
        visitor = ClientVisitor(make(cls, config), initial_model(config, dataset), data, config, device)
    return Halves(server, visitor)


def initial_model(config: RunConfig, dataset: Dataset) -> torch.nn.Module:
    """The model of round 0: the same weights on every rank, frozen ones too."""
    seed_everything(derive_seed(config.seed, Stream.INIT))
    return build_model(config.model, dataset.input_shape, dataset.num_classes)


def one_step_groups(config: RunConfig) -> Grouping:
    """Return how clients of one step are grouped."""

    def grouping(client_ids: IntArray, sizes: IntArray) -> list[IntArray]:
        one_step = (sizes > 0) & (sizes <= (config.batch_size or sizes)) & (config.local_epochs == 1)
        places = np.flatnonzero(one_step)
        return [places[part] for part in groups.cut(client_ids[places], sizes[places], config.group_clients)]

    return grouping


def _functions(cls: type[Algorithm[Any]], config: RunConfig, model: torch.nn.Module) -> dict[str, list[object]]:
    """Return what of this job may be a user's own code, by role."""
    function = model_function(config.model) if ":" in config.model else None
    return {"model": functions_of(function, model), "algorithm": [cls]}


def _provenance(
    comm: Comm,
    algorithm: str,
    machine: Machine,
    engine: str | None,
    data: dict[str, str],
    dataset: Dataset,
    users: list[dict[str, dict[str, str]]],
) -> dict[str, Any]:
    """Return the record of what decides the result beside the options."""
    return {
        "algorithm": algorithm,
        "fedmpi": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "mpi": library_version(),
        "ranks": comm.size,
        "threads": machine.threads,
        "engine": engine,
        "capability": sorted({capability for _, _, capability in machine.places[1:] or machine.places}),
        "server_capability": machine.places[0][2],
        **data,
        **input_record(dataset),
        "sources": {role: file for found in users for role, file in found.items()},
    }
