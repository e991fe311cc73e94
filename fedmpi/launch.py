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
from fedmpi.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_MISTAKE, ConfigError, FedmpiError, LaunchError
from fedmpi.lifecycle.exits import abort_on_crash, end_all, say_error
from fedmpi.lifecycle.signals import Deadline, StopSignals, earlier, slurm_deadline
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

ALGORITHMS = {"fedavg": ("fedmpi.fedavg:FEDAVG", "federated averaging (McMahan et al. 2017)")}
"""Name -> "module:NAME" of an `Algorithm`, and one line about it."""

_OPEN_FILES = 64
"""A rank holds about 30."""

_READ_S = 5.0
"""At the end: a log of which nobody takes anything for so long is not read."""


def main(algorithm: str, config_class: type[RunConfig] = RunConfig, argv: Sequence[str] | None = None) -> int:
    """Run a job from the command line; collective if started by mpirun.

    Args:
        algorithm: "module:NAME" of an `Algorithm`; imported only once the options are right.
        config_class: its options.
        argv: arguments without the program's name; default: the process's.

    Returns:
        The exit code: 0 done, 2 a mistake of the user's, 3 diverged; a crash ends all ranks with 1.
    """
    words = sys.argv[1:] if argv is None else argv
    module = algorithm.partition(":")[0]
    started = time.monotonic() - process_age_s()
    signals = StopSignals()
    signals.catch()

    def prepare() -> tuple[RunConfig, Deadline | None]:
        config = parse(
            config_class, words, f"python -m {module}", f"{module}: one federated training run as one MPI job"
        )
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
            if config.max_seconds is not None:
                what = f"--max-seconds {config.max_seconds:g}"
                own = Deadline(started + config.max_seconds, what, "raise --max-seconds")
                deadline = earlier(own, deadline)
            return run_job(net, algorithm, config, watchdog, signals, deadline).exit_code

    return start(words, prepare, job)


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
    if {"-h", "--help"} & set(argv) and not speaks():
        return EXIT_DONE
    prepared, mistake = None, None
    with interrupt.Raising():
        try:
            prepared = prepare()
        except FedmpiError as error:
            mistake = error
    try:
        net = connect()
    except LaunchError as error:
        return leave(mistake or error)
    set_up_logging(net.rank, None)
    interrupt.call(lambda: end_all(net, "interrupted (Ctrl-C) before the first round", EXIT_INTERRUPTED))
    with abort_on_crash(net):
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
    """What must be known, or done, before MPI starts."""
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
