"""A run inside another program: `fedmpi.run(dataset="digits", model="2nn")` in a notebook, or a search over options.

The program goes on in any case: what is wrong is raised, and signal handlers, logging, random generators and torch's
settings are put back. One process is one rank; under `mpirun` all ranks call `run` alike, and a crash of one ends all.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmpi.algorithms import ALGORITHMS
from fedmpi.config import RunConfig
from fedmpi.errors import ConfigError, FedmpiError, LaunchError
from fedmpi.launch import before_mpi, config_of, connect
from fedmpi.lifecycle.exits import abort_on_crash
from fedmpi.lifecycle.signals import Deadline, StopSignals, job_deadline, slurm_deadline
from fedmpi.lifecycle.watchdog import Watchdog
from fedmpi.logs import finish_logging, kept_logging, set_up_logging
from fedmpi.mpi.launcher import announced, speaks
from fedmpi.mpi.setup import agree, on_root
from fedmpi.options import parse

if TYPE_CHECKING:
    from fedmpi.mpi.comm import Comm
    from fedmpi.outcome import Outcome

_busy = threading.Lock()


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes:
        history: one dict per round, as in history.jsonl.
        model_hash: of the global model.
        folder: of the run; model.pt is there if the run is finished.
        exit_code: 0: finished; 75: stopped early, the same call goes on with the same `run_dir`.
    """

    history: list[dict[str, Any]]
    model_hash: str
    folder: Path
    exit_code: int


def run(algorithm: str = "fedavg", config_class: type[RunConfig] | None = None, /, **options: object) -> Run:
    """Train, and return what came out. Collective under mpirun.

    A signal (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP) stops the run after the round at hand and its checkpoint, then goes to
    the program's own handler: Ctrl-C is a KeyboardInterrupt, at once when it is pressed again. Outside the main thread
    no signal is caught. A lone rank has no watchdog.

    Args:
        algorithm: a name that `python -m fedmpi` lists, or "module:NAME" of an `Algorithm`.
        config_class: its options; None: as the algorithm says.
        **options: as on the command line, with underscores: `client_lr=0.05`. `config="run.yaml"` reads a file.

    Raises:
        FedmpiError: a mistake in options, data or launch, or a run that diverged.
        Exception: that of the user's own code.
    """
    if not _busy.acquire(blocking=False):
        raise LaunchError("another fedmpi.run is under way in this process: wait until it has ended")
    signals = StopSignals() if threading.current_thread() is threading.main_thread() else None
    try:
        with kept_logging():
            done = _run(algorithm, config_class, options, signals)
    finally:
        _busy.release()
        if signals is not None:
            signals.restore()
    if signals is not None and signals.received:
        signal.raise_signal(signals.received)
    return done


def _run(
    algorithm: str, config_class: type[RunConfig] | None, options: dict[str, object], signals: StopSignals | None
) -> Run:
    started = time.monotonic()
    if signals is not None:
        signals.catch()
    prepared, mistake = None, None
    try:
        recipe = _recipe(algorithm)
        values = {name: _plain(value) for name, value in options.items()}
        file = values.pop("config", None)
        words = [] if file is None else ["--config", str(file)]
        config = parse(config_class or config_of(recipe), words, "fedmpi.run", "", values)
        set_up_logging(0, config, own=False)
        before_mpi(config)
        prepared = recipe, config, slurm_deadline(os.environ) if speaks() else None
    except FedmpiError as error:
        mistake = error
    if mistake is not None and not any(job.size > 1 for job in announced()):
        raise mistake
    net = connect()
    if net.size == 1:
        try:
            assert prepared is not None
            return _train(net, *prepared, signals, started)
        finally:
            net.close()
    with abort_on_crash(net):
        try:
            agree(net, mistake)
            assert prepared is not None
            done = _train(net, *prepared, signals, started)
            net.close()
            return done
        except FedmpiError as error:
            if not error.everywhere:
                raise
            mistake = error
    assert mistake is not None
    raise mistake


def _train(
    net: Comm,
    recipe: str,
    config: RunConfig,
    slurm: Deadline | None,
    signals: StopSignals | None,
    started: float,
) -> Run:
    """Collective. Train, and return the run on every rank."""
    from fedmpi.job import run_job

    set_up_logging(net.rank, config, own=False)
    deadline = job_deadline(started, config.max_seconds, slurm)
    with ExitStack() as stack:
        stack.enter_context(_kept_torch())
        stack.callback(finish_logging, 0.0)
        watchdog = stack.enter_context(Watchdog(net, config.stall_timeout)) if net.size > 1 else None
        outcome = run_job(net, recipe, config, watchdog, signals, deadline)
    return on_root(net, lambda: _run_of(outcome))


def _run_of(outcome: Outcome) -> Run:
    """Return the run, on the server."""
    if outcome.failure is not None:
        raise outcome.failure
    assert outcome.folder is not None
    lines = (outcome.folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return Run([json.loads(line) for line in lines], outcome.model_hash, outcome.folder.absolute(), outcome.exit_code)


def _recipe(algorithm: str) -> str:
    if ":" in algorithm:
        return algorithm
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"no algorithm {algorithm!r}; there are: {', '.join(ALGORITHMS)}")
    return ALGORITHMS[algorithm].spec


def _plain(value: object) -> object:
    """Return a path as text, a number of NumPy's as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


@contextmanager
def _kept_torch() -> Iterator[None]:
    """Give torch a fresh process's settings, then the program's own, and its random generators as they were."""
    import torch

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    flags = [(cudnn, "benchmark"), (cudnn, "deterministic"), (cudnn, "allow_tf32"), (matmul, "allow_tf32")]
    values = [getattr(place, name) for place, name in flags]
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  # the program's own
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002  # as above
        torch.set_rng_state(drawn[2])
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        for (place, name), value in zip(flags, values, strict=True):
            setattr(place, name, value)
