"""The suite under mpiexec: every rank runs every test, and an error on one rank, in any phase, is told by rank 0.

Ranks meet after the collection, after each test's set-up, call and teardown, and when they exit. A rank that fails, or
leaves, says so at the meeting; where the others do not come to one, because they wait inside a collective that it never
entered, it ends the run by itself after `PATIENCE_S`. Before MPI starts ranks look for each other in the process table:
`MPI_Init` would wait for ever for a rank that ended over a plugin that is missing, or over an import.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import pytest

from fedmpi.mpi.comm import Comm
from fedmpi.mpi.setup import on_every_rank

PATIENCE_S = 20.0
START_S = 30.0
_TIMEOUT_S = 330.0  # more than pytest-timeout lets a test take
_LAUNCH_S = 2.0  # a launcher has started all its ranks by then
_READY = b"mpi-suite-ready"
_LAUNCHERS = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)
"""Where a launcher says a process's rank, the number of ranks, and how many of them are on its node."""


class Ranks:
    """One rank's part in the meetings; a plugin of pytest.

    Attributes:
        net: for the tests.
        plugins: pytest's, once it has any.
    """

    def __init__(self) -> None:
        """Collective. Starts MPI."""
        self.net = Comm()
        self._meetings = Comm()  # apart from `net`, whose collectives a failed test may leave half done
        self.plugins: pytest.PytestPluginManager | None = None
        self._parted = False  # some rank has left: no more meetings
        self._errors: list[str] = []  # of the collection
        self._status = "no session"
        self._last_words = ""
        self._exit, self._excepthook, self._pid = os._exit, sys.excepthook, os.getpid()
        os._exit = self._leave_by_exit
        sys.excepthook = self._note_exception
        atexit.register(self._end)

    def pytest_configure(self, config: pytest.Config) -> None:
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and not self.net.is_server:  # rank 0 reports for all
            reporter._tw._file = Path(os.devnull).open("w")  # noqa: SIM115  # open as long as the process lives

    # The phases of a session.

    def pytest_internalerror(self, excrepr: object) -> None:
        self._last_words = str(excrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._errors.append(report.longreprtext)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> Iterator[None]:
        """Ranks must have collected the same tests in the same order, and met the same errors."""
        try:
            result = yield
        except BaseException:
            self._errors.append(traceback.format_exc(limit=-3))
            raise
        finally:
            self._compare_collections(session, "\n".join(self._errors))
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report: pytest.TestReport = yield
        text = "" if report.passed else str(report.longrepr)
        said = self._meet(f"{report.when} of {report.nodeid}", report.outcome, text)
        if said:
            report.outcome, report.longrepr = "failed", said
            if self._parted:
                item.session.shouldstop = "a rank has left"
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Iterator[None]:
        try:
            return (yield)
        except (session.Interrupted, session.Failed):  # -x, --maxfail: on all ranks
            raise
        except BaseException:
            said = self._meet("the end of the tests", "left", traceback.format_exc(limit=-3))
            session.config.get_terminal_writer().line(f"\n{said}")
            raise

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, exitstatus: int) -> Iterator[None]:
        self._status = f"exit status {int(exitstatus)}"
        return (yield)

    # Meetings.

    def _meet(self, stage: str, outcome: str, text: str, patience_s: float | None = None) -> str:
        """Collective. Say how `stage` went here; returns what is to be said about all ranks, if they differ.

        Args:
            stage: where this rank is; if others are elsewhere, the ranks part.
            outcome: one word.
            text: the error, if there is one.
            patience_s: how long to wait for the others; None: as long as a test may take, if all is well here.
        """
        if self._parted:
            return ""
        if patience_s is None:
            patience_s = _TIMEOUT_S if outcome == "passed" else PATIENCE_S
        # pytest-timeout's alarm is for tests: it must not end the waiting for a rank whose test has run into it
        alarm = signal.signal(signal.SIGALRM, signal.SIG_IGN)
        alike = self._meetings.try_alike(zlib.crc32(f"{stage} {outcome}".encode()), patience_s)
        signal.signal(signal.SIGALRM, alarm)
        if alike is None:
            self._give_up(f"{stage} {outcome} on {self._name}; others are not here yet\n{text}")
        if alike:
            return ""
        told = on_every_rank(self._meetings, (stage, outcome, text))
        places = {place for place, _, _ in told}
        self._parted = len(places) > 1 or "left" in (word for _, word, _ in told)
        failed = [rank for rank, (_, _, words) in enumerate(told) if words]
        if failed and len(places) == 1:
            said = f"{stage} failed on rank {', '.join(map(str, failed))} of {self.net.size}"
        else:
            lines = (f"rank {rank} of {self.net.size}: {place}: {word}" for rank, (place, word, _) in enumerate(told))
            said = "\n".join(["the ranks have come to different ends", *lines])
        return f"{said}; rank {failed[0]} says:\n{told[failed[0]][2]}" if failed else said

    def _compare_collections(self, session: pytest.Session, error: str) -> None:
        """Collective.

        Raises:
            UsageError: on rank 0, if the ranks have not collected alike.
            Exit: on the others.
        """
        names = [item.nodeid for item in getattr(session, "items", [])]
        digest = zlib.crc32("\n".join(names).encode())
        outcome = f"{len(names)} tests ({digest:08x}){', failed' if error else ''}"
        said = self._meet("the collection", outcome, error, START_S)
        if not said:
            return
        if not self._parted and not any(told := on_every_rank(self._meetings, error)):
            told = on_every_rank(self._meetings, names)
            rank, other = next((rank, other) for rank, other in enumerate(told) if other != told[0])
            pairs = zip([*told[0], "nothing"], [*other, "nothing"], strict=False)
            first, second = next(pair for pair in pairs if pair[0] != pair[1])
            said += f"\nthe first difference is {first} on rank 0, {second} on rank {rank}"
        self._parted = True
        if self.net.is_server:
            raise pytest.UsageError(said)
        pytest.exit(said, returncode=pytest.ExitCode.USAGE_ERROR)

    # Ways to leave.

    @property
    def _name(self) -> str:
        return f"rank {self.net.rank} of {self.net.size}"

    def _give_up(self, text: str) -> NoReturn:
        capture: Any = self.plugins and self.plugins.get_plugin("capturemanager")
        if capture:
            capture.suspend_global_capture(in_=True)
        os.write(2, f"\n{text}\n".encode(errors="backslashreplace"))
        time.sleep(0.3)  # until the launcher has read it
        self._meetings.abort(1)

    def _leave_by_exit(self, status: int) -> NoReturn:
        """`os._exit`, by a test or a plugin, would leave the others waiting, or pass for a success."""
        if not self._parted and os.getpid() == self._pid:
            stack = "".join(traceback.format_stack(limit=4)[:-1])
            self._give_up(f"{self._name} called os._exit({status})\n{stack}")
        self._exit(status)

    def _note_exception(self, kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        self._last_words = "".join(traceback.format_exception(kind, error, where, limit=-3))
        self._excepthook(kind, error, where)

    def _end(self) -> None:
        """Collective, when Python exits: all ranks must do so at the end of the same tests."""
        if os.getpid() != self._pid:
            return
        said = self._meet("exit", f"{self._status}{', crashed' if self._last_words else ''}", self._last_words, START_S)
        if not said and not self._parted:
            return
        if self.net.is_server and said:
            sys.stderr.write(f"\n{said}\n")
            sys.stderr.flush()
        time.sleep(0.5 if self.net.is_server else PATIENCE_S)  # MPI_Finalize might wait for what a rank left half done
        self._meetings.abort(1)


def await_ranks(environ: Mapping[str, str], proc: Path = Path("/proc")) -> None:
    """Return once all ranks are about to start MPI, as far as the process table shows them.

    Raises:
        SystemExit: a rank has ended, or does not come within `START_S`; rank 0, or the lowest there is, says so.
    """
    variables = next((names for names in _LAUNCHERS if set(names) <= set(environ)), None)
    if variables is None:
        return
    rank, size, local_size = (int(environ[name]) for name in variables)
    if local_size != size:
        return  # other nodes have tables of their own
    (proc / "self" / "comm").write_bytes(_READY)  # the process's name is what others can see of it
    begun = time.monotonic()
    while True:
        names, waited_s = _names_of_ranks(variables[0], proc), time.monotonic() - begun
        gone = set(range(size)) - set(names) if waited_s > _LAUNCH_S else set()
        late = {other for other in range(size) if _READY not in names.get(other, ())}
        if not late:
            return
        if gone or waited_s > START_S:
            missing = sorted(gone or late)
            if rank == min(set(range(size)) - set(missing)):
                why = "ended before its tests began: what it said stands above" if gone else f"not here in {START_S} s"
                raise SystemExit(f"\nrank {', '.join(map(str, missing))} of {size}: {why}")
            raise SystemExit(1)
        time.sleep(0.1)


def _names_of_ranks(variable: str, proc: Path) -> dict[int, list[bytes]]:
    """Rank -> names of its processes, for the ranks that were started by what started this one."""
    parents: dict[int, int] = {}
    ranks: dict[int, int] = {}
    names: dict[int, bytes] = {}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            variables = (entry / "environ").read_bytes().split(b"\0")
            name = (entry / "comm").read_bytes().strip()
        except OSError:  # gone, or another user's
            continue
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        found = [one for one in variables if one.startswith(f"{variable}=".encode())]
        if found and fields[0] != b"Z":
            ranks[pid], names[pid] = int(found[0].partition(b"=")[2]), name

    def launcher(pid: int) -> int:
        while pid in ranks:
            pid = parents[pid]
        return pid

    mine = launcher(os.getpid())
    result: dict[int, list[bytes]] = {}
    for pid, rank in ranks.items():
        if launcher(pid) == mine:
            result.setdefault(rank, []).append(names[pid])
    return result
