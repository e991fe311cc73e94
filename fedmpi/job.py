"""A job inside MPI: device -> data -> the algorithm's halves -> run folder -> manager -> run.

Every function that communicates is collective; only `build_manager` and `build_halves` look at the role of a rank.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmpi.config import RunConfig
from fedmpi.core.client_manager import ClientPassiveManager
from fedmpi.core.evaluate import Evaluator
from fedmpi.core.handler import SyncParameterServerHandler
from fedmpi.core.manager import NetworkManager, Observer
from fedmpi.core.memory_format import memory_format_of
from fedmpi.core.seeding import Stream, derive_seed, seed_everything
from fedmpi.core.server_manager import ServerManager
from fedmpi.core.trainer import ClientTrainer
from fedmpi.core.visits import put_back_note
from fedmpi.data.client_data import ClientData, test_evaluator
from fedmpi.data.datasets import Dataset, load_dataset
from fedmpi.data.job_split import resolve_partition
from fedmpi.data.split import PartitionIndex, map_split
from fedmpi.errors import EXIT_DONE
from fedmpi.lifecycle.exits import say
from fedmpi.lifecycle.policies import Boundary
from fedmpi.lifecycle.signals import Deadline, StopSignals
from fedmpi.lifecycle.watchdog import Watchdog
from fedmpi.logs import SUMMARY
from fedmpi.machine.placement import find_machine
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
class Algorithm:
    """A federated algorithm: its two halves.

    Attributes:
        name: for the banner.
        trainer: (model, data, config, device) -> the client half.
        handler: (model, config) -> the server half.
    """

    name: str
    trainer: Callable[[torch.nn.Module, ClientData, Any, torch.device], ClientTrainer]
    handler: Callable[[torch.nn.Module, Any], SyncParameterServerHandler]


@dataclass(frozen=True)
class Halves:
    """What this rank has of the algorithm; a lone rank has both."""

    handler: SyncParameterServerHandler | None
    trainer: ClientTrainer | None

    @property
    def memory_format(self) -> torch.memory_format:
        """In which the model likes its images."""
        return memory_format_of(self.model)

    @property
    def model(self) -> torch.nn.Module:
        """The server's, else the trainer's."""
        half = self.handler or self.trainer
        assert half
        return half.model


def run_job(
    net: Comm,
    algorithm: str,
    config: RunConfig,
    watchdog: Watchdog | None,
    signals: StopSignals | None = None,
    deadline: Deadline | None = None,
) -> Outcome:
    """Collective. Train as `config` says.

    Args:
        net: this rank's end of the communicator.
        algorithm: "module:NAME" of an `Algorithm`.
        config: its options, the same on every rank.
        watchdog: of this rank, which has begun; None: nobody watches.
        signals: of this process, which end the job early.
        deadline: the end of the job's time, as rank 0 knows it.

    Raises:
        FedmpiError: a mistake of the user's, on every rank alike.
    """
    module, _, name = algorithm.partition(":")
    recipe: Algorithm = getattr(importlib.import_module(module), name)
    machine = find_machine(net, config.device, config.threads)
    dataset = on_all(net, lambda: load_dataset(config.dataset, config.data_dir))
    partition, split = share_partition(net, config, dataset)
    halves = on_all(net, lambda: build_halves(net, recipe, config, dataset, partition, machine.device))
    data = {"dataset_sha256": dataset.sha256, "partition_sha256": split}
    folder = on_root(net, lambda: RunFolder(config, data, identity(algorithm, halves.model), __version__), share=False)
    try:
        if on_root(net, lambda: folder is not None and nothing_to_do(folder, halves.handler, config.rounds)):
            return outcome_of(EXIT_DONE, folder.path if folder else None, halves.handler)
        engines = on_every_rank(net, halves.trainer.engine_note if halves.trainer else None)
        changed = on_every_rank(net, list(halves.trainer.changed_attributes) if halves.trainer else [])[-1]
        functions: dict[str, list[object]] = {
            "model": functions_of(model_function(config.model) if ":" in config.model else None, halves.model),
            "trainer": [recipe.trainer, type(halves.trainer)],
            "handler": [recipe.handler, type(halves.handler)],
            "algorithm": [importlib.import_module(module)],
        }
        users = {role: where for found in on_every_rank(net, sources(functions)) for role, where in found.items()}
        provenance: dict[str, Any] = {
            "algorithm": algorithm,
            "fedmpi": __version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "mpi": library_version(),
            "ranks": net.size,
            "threads": machine.threads,
            "engine": engines[-1],
            "capability": sorted({capability for _, _, capability in machine.places[1:] or machine.places}),
            "server_capability": machine.places[0][2],
            **data,
            **input_record(dataset),
            "sources": users,
        }
        on_root(net, lambda: folder.begin(config, provenance | split_record(config, split)) if folder else None)
        facts = {
            "options": result_hash(config),
            "data set": dataset.sha256,
            "threads": machine.threads,
            "engine": engines[net.rank] or engines[-1],
        }
        layout = halves.memory_format
        evaluator = on_all(net, lambda: test_evaluator(dataset, machine.device, layout, config.eval_samples))
        progress = Progress(config.rounds, folder.elapsed_s if folder else 0.0)
        boundary = Boundary(folder, config.checkpoint_every, signals, deadline)
        observers = [each for each in (folder, progress) if each]
        manager = on_all(
            net, lambda: build_manager(net, config, halves, evaluator, facts, observers, boundary, signals)
        )
        on_root(net, lambda: resume(folder, manager))
        if machine.warning:
            logger.warning("%s", machine.warning)
        if halves.handler is not None and folder is not None:
            size = len(halves.handler.model_parameters)
            for line in banner(recipe.name, config, machine.places, dataset, partition, size, provenance, folder.path):
                logger.info("%s", line)
            if changed:
                logger.info("%s", put_back_note(changed))
            if deadline is not None:
                logger.info("time:   %.0f s left of %s", max(0.0, deadline.left_s()), deadline.what)
        if config.timeline:
            net.barrier()
            net.timeline.begin()
        if signals is not None:
            signals.catch_interrupt(say if net.is_server else None)
        if watchdog is not None:
            watchdog.begin_rounds(boundary if net.is_server else None)
        code = manager.run()
        if watchdog is not None:
            watchdog.stop()
        if config.timeline:
            spans = net.gather_timeline()
            on_root(net, lambda: folder.write_timeline(chrome_trace(spans)) if folder else None)
        failure = manager.failure if isinstance(manager, ServerManager) else None
        outcome = outcome_of(code, folder.path if folder else None, halves.handler, failure)
        if folder is not None and code == EXIT_DONE:
            logger.log(SUMMARY, "%s", progress.summary(outcome.model_hash, folder.path))
        return outcome
    finally:
        if folder is not None:
            folder.close()


def nothing_to_do(folder: RunFolder, handler: SyncParameterServerHandler | None, rounds: int) -> bool:
    """On the server: whether the run in the folder has all the rounds that are asked for; says so."""
    if folder.stored is None or handler is None:
        return False
    with folder.fits():
        handler.load_state_dict(folder.stored["server"]["handler"])
        at_its_end = handler.stop_condition()
    done = handler.round_idx
    if done > rounds:
        logger.info("%s has %d rounds, --rounds asks for %d: nothing to do", folder.path, done, rounds)
    elif at_its_end and folder.finished:
        logger.info("this very run is finished already, after round %d: nothing to do", done)
    else:
        return False
    return True


def resume(folder: RunFolder | None, manager: NetworkManager) -> None:
    """On the server: go on from what the folder holds, if anything."""
    if isinstance(manager, ServerManager) and folder is not None and folder.stored is not None:
        with folder.fits():
            manager.load_state_dict(folder.stored["server"])


def share_partition(net: Comm, config: RunConfig, dataset: Dataset) -> tuple[PartitionIndex, str]:
    """Collective. The split, found or made by the server, and its SHA-256.

    A large one is mapped by all ranks from one file if they can see it; else the server sends the arrays.
    """
    held: list[PartitionIndex] = []

    def resolve() -> tuple[str, int, int, Path | None]:
        index, sha256, _ = resolve_partition(config, dataset, config.data_dir)
        held.append(index)
        return sha256, len(index.offsets), len(index.indices), index.file

    sha256, num_offsets, num_indices, file = on_root(net, resolve)
    mapped = held[0] if held else map_split(file, whole=False) if file else None
    fits = mapped is not None and (len(mapped.offsets), len(mapped.indices)) == (num_offsets, num_indices)
    if file and net.max_of(int(not fits)) == 0:
        assert mapped is not None
        return mapped, sha256
    offsets = held[0].offsets if held else np.empty(num_offsets, np.int64)
    indices = held[0].indices if held else np.empty(num_indices, np.int64)
    return PartitionIndex(bcast_vector(net, offsets), bcast_vector(net, indices)), sha256


def build_halves(
    net: Comm,
    recipe: Algorithm,
    config: RunConfig,
    dataset: Dataset,
    partition: PartitionIndex,
    device: torch.device,
) -> Halves:
    """The server half on rank 0, the client half on the others, both on a lone rank."""
    handler = recipe.handler(initial_model(config, dataset), config) if net.is_server else None
    trainer = None
    if not net.is_server or net.size == 1:
        trainer = recipe.trainer(initial_model(config, dataset), ClientData(dataset, partition, device), config, device)
    return Halves(handler, trainer)


def initial_model(config: RunConfig, dataset: Dataset) -> torch.nn.Module:
    """The model of round 0: the same weights on every rank, frozen ones too."""
    seed_everything(derive_seed(config.seed, Stream.INIT))
    return build_model(config.model, dataset.input_shape, dataset.num_classes)


def build_manager(
    net: Comm,
    config: RunConfig,
    halves: Halves,
    evaluator: Evaluator,
    facts: Mapping[str, object],
    observers: Sequence[Observer],
    boundary: Boundary | None = None,
    signals: StopSignals | None = None,
) -> NetworkManager:
    """The manager of this rank's role; the only other place that looks at it."""
    local = None
    if halves.trainer is not None:
        local = ClientPassiveManager(
            net,
            halves.trainer,
            evaluator,
            facts,
            cuda_aware=config.cuda_aware,
            signals=signals,
            leak_check=config.leak_check == "on",
        )
    if halves.handler is None:
        assert local is not None
        return local
    return ServerManager(
        net,
        halves.handler,
        local,
        eval_every=config.eval_every,
        collect=config.collect,
        schedule=config.schedule,
        observers=observers,
        facts=facts,
        boundary=boundary,
    )
