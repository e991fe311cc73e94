"""From the command line to a running job: what happens before MPI starts, the start itself, and the exit code.

What may start a child process (fetching a data set) happens before MPI: a process must not fork afterwards. What loads
torch happens last, in `job`, so that `--help` and a wrong option need not wait for it.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from fedmpi import interrupt
from fedmpi.config import RunConfig
from fedmpi.data.install import install
from fedmpi.data.partitioners import check_partition_options
from fedmpi.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_MISTAKE, ConfigError, FedmpiError, LaunchError, shown
from fedmpi.imports import import_name
from fedmpi.lifecycle.exits import abort_on_crash, end_all, say_error
from fedmpi.lifecycle.signals import Deadline, StopSignals, job_deadline, slurm_deadline
from fedmpi.lifecycle.watchdog import Watchdog
from fedmpi.logs import finish_logging, set_up_logging
from fedmpi.mpi import streams
from fedmpi.mpi.launcher import missing_mpi_advice, speaks
from fedmpi.mpi.processes import process_age_s
from fedmpi.mpi.setup import agree
from fedmpi.options import parse

if TYPE_CHECKING:
    from fedmpi.mpi.comm import Comm

T = TypeVar("T")

_OPEN_FILES = 64
"""A rank holds about 30."""

_READ_S = 5.0
"""At the end: a log of which nobody takes anything for so long is not read."""


def main(algorithm: str, config_class: type[RunConfig] | None = None, argv: Sequence[str] | None = None) -> int:
    """Run a job from the command line; collective if started by mpirun.

    Args:
        algorithm: "module:Class" of an `Algorithm`.
        config_class: its options; then it is imported only once they are right. None: it is asked.
        argv: arguments without the program's name; default: the process's.

    Returns:
        The exit code: 0 done, 2 a mistake of the user's, 3 diverged; a crash ends all ranks with 1.
    """
    words = sys.argv[1:] if argv is None else argv
    module = algorithm.partition(":")[0]
    program = module if module.startswith("fedmpi.") else f"fedmpi {algorithm}"
    started = time.monotonic() - process_age_s()
    signals = StopSignals()
    signals.catch()

    def prepare() -> tuple[RunConfig, Deadline | None]:
        options = config_of(algorithm) if config_class is None else config_class
        config = parse(options, words, f"python -m {program}", f"{program}: one federated training run as one MPI job")
        before_mpi(config)
        return config, slurm_deadline(os.environ) if speaks() else None

    def job(net: Comm, prepared: tuple[RunConfig, Deadline | None]) -> int:
        begun = time.monotonic()
        signals.catch()  # again: libraries that MPI loads take signals for themselves
        config, slurm = prepared
        set_up_logging(net.rank, config)
        with Watchdog(net, config.stall_timeout) as watchdog:
            from fedmpi.job import run_job

            # Slurm's limit is for the end of all processes, which takes no longer than to load them did
            deadline = slurm.less(time.monotonic() - begun) if slurm else None
            deadline = job_deadline(started, config.max_seconds, deadline)
            return run_job(net, algorithm, config, watchdog, signals, deadline).exit_code

    return start(words, prepare, job)


def config_of(algorithm: str) -> type[RunConfig]:
    """Return the options of an algorithm.

    Raises:
        ConfigError: "module:Class" is no algorithm.
    """
    cls = import_name(f"algorithm {algorithm}", algorithm)
    from fedmpi.algorithm import Algorithm  # here: it loads torch

    config_class = getattr(cls, "Config", None)
    if not (isinstance(cls, type) and issubclass(cls, Algorithm)):
        raise ConfigError(f"algorithm {algorithm} must be a class derived from fedmpi.Algorithm, got {shown(cls)}")
    if not (isinstance(config_class, type) and issubclass(config_class, RunConfig)):
        raise ConfigError(f"algorithm {algorithm}: Config must be a class derived from RunConfig")
    return config_class


def start(argv: Sequence[str], prepare: Callable[[], T], job: Callable[[Comm, T], int]) -> int:
    """Collective if started by mpirun. Prepare without MPI, start MPI, agree on mistakes, run the job.

    Args:
        argv: the arguments; for `--help` only one process prepares.
        prepare: what to do before MPI starts; a FedmpiError of any rank ends all with one line.
        job: what to do then, with the result of `prepare`; returns the exit code.

    Returns:
        The exit code.
    """
    streams.reserve()
    interrupt.end_at_once()
    try:
        return _start(argv, prepare, job)
    except KeyboardInterrupt:  # before MPI started
        return interrupt.leave()
    finally:
        finish_logging(_READ_S)
        streams.settle(_READ_S)


def _start(argv: Sequence[str], prepare: Callable[[], T], job: Callable[[Comm, T], int]) -> int:
    alone = bool({"-h", "--help"} & set(argv))
    if alone and not speaks():
        return EXIT_DONE
    prepared, mistake, crash = None, None, None
    with interrupt.Raising():
        try:
            prepared = prepare()
        except FedmpiError as error:
            mistake = error
        except Exception as error:
            if alone:
                raise
            crash = error  # of a module of the user's: told once, by `abort_on_crash`
    if alone and mistake is not None:
        return leave(mistake)
    try:
        net = connect()
    except LaunchError as error:
        if crash is not None:
            raise crash from None
        return leave(mistake or error)
    set_up_logging(net.rank, None)
    interrupt.call(lambda: end_all(net, "interrupted (Ctrl-C) before the first round", EXIT_INTERRUPTED))
    with abort_on_crash(net):
        if crash is not None:
            raise crash
        agree(net, mistake)
        assert prepared is not None
        return job(net, prepared)
    raise AssertionError("abort_on_crash does not return after a crash")


def connect() -> Comm:
    """Collective if started by mpirun. Start MPI, unless it is started; this rank's end of the communicator.

    Raises:
        LaunchError: no MPI library is there, or it does not belong to the launcher.
    """
    try:
        from fedmpi.mpi.comm import Comm
    except (ImportError, RuntimeError) as error:  # mpi4py raises either when it finds no library to load
        if "mpi" not in str(error).lower():
            raise
        raise LaunchError(missing_mpi_advice()) from error
    return Comm()


def leave(error: FedmpiError) -> int:
    """Without MPI to tell ranks apart, one process speaks and the rest go quietly.

    They leave with 0, because a launcher ends the job at the first other code, perhaps before the speaker spoke.
    """
    if not speaks():
        return EXIT_DONE
    say_error(str(error))
    return EXIT_MISTAKE


def before_mpi(config: RunConfig) -> None:
    """Check and prepare all that must be ready before MPI starts."""
    _allow_open_files()
    check_partition_options(config)
    if config.ethernet is not None:
        names = [name for _, name in socket.if_nameindex()]
        if config.ethernet not in names:
            raise ConfigError(
                f"--ethernet must be an interface of this host ({', '.join(names)}), got {config.ethernet}"
            )
        for variable in ("FI_TCP_IFACE", "FI_SOCKETS_IFACE", "UCX_NET_DEVICES", "OMPI_MCA_btl_tcp_if_include"):
            os.environ.setdefault(variable, config.ethernet)
    install(config.dataset, config.data_dir)


def _allow_open_files() -> None:
    """As many as a rank among many needs: MPI and Python fail in odd ways when they may open no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _OPEN_FILES:
        raise LaunchError(f"ulimit -n must be {_OPEN_FILES} or more (files that a process may open), got {hard}")
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, hard))
