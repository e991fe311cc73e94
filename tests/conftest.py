"""One suite, two ways to run it: `pytest` (unit, e2e) and `mpiexec -n 3 pytest` (unit, spmd).

Under mpiexec every rank runs every test, and after each test the ranks tell each other how it went: a test that fails
on one rank fails on all, and rank 0 reports it with the rank's name. A rank that cannot be reached any more, because
it waits inside a collective that the failed rank never entered, ends the run after `PATIENCE_S`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from fedmpi.core.launcher import announced

if TYPE_CHECKING:
    from fedmpi.core.comm import PackageProcessor

PATIENCE_S = 20.0
UNDER_MPI = any(one.size > 1 for one in announced())

settings.register_profile(
    "fedmpi",
    deadline=None,
    derandomize=True,  # all ranks try the same examples, and a failure comes again
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fedmpi")

if UNDER_MPI:
    from fedmpi.core.comm import PackageProcessor

    NET = PackageProcessor()
    REPORTS = PackageProcessor()  # apart from NET, whose collectives a failed test may leave half done


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    # A root of its own for tmp_path: pytest tidies the common one up, and two processes that do so at once trip over
    # each other.
    os.environ["PYTEST_DEBUG_TEMPROOT"] = root = tempfile.mkdtemp(prefix="fedmpi-tests-")
    config.add_cleanup(lambda: shutil.rmtree(root, ignore_errors=True))
    if UNDER_MPI:
        config.option.with_mpi = True
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and not NET.is_server:  # rank 0 reports for all
            reporter._tw._file = Path(os.devnull).open("w")  # noqa: SIM115  # open as long as the process lives


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if UNDER_MPI and collection_path.name in ("e2e", "slurm"):
        return True  # they start processes, which a process under MPI must not
    if not UNDER_MPI and collection_path.name == "spmd":
        return True  # they want several ranks
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "spmd" in item.path.parts:
            item.add_marker(pytest.mark.mpi)


if UNDER_MPI:

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        outcome: Any = yield
        report: pytest.TestReport = outcome.get_result()
        if report.when == "call" or (report.when == "setup" and report.failed):
            _tell_others(report)

    def _tell_others(report: pytest.TestReport) -> None:
        """Collective. Fail `report` if the test failed on any rank, and say where."""
        mine = str(report.longrepr) if report.failed else ""
        if report.failed and not _all_arrive(PATIENCE_S):
            _give_up(report, mine)
        elif not report.failed:
            _all_arrive(None)
        told = REPORTS.on_every_rank(mine)
        failed = [rank for rank, text in enumerate(told) if text]
        if failed:
            report.outcome = "failed"
            first = told[failed[0]]
            ranks = ", ".join(map(str, failed))
            report.longrepr = f"failed on rank {ranks} of {NET.size}; rank {failed[0]} says:\n{first}"

    def _all_arrive(patience_s: float | None) -> bool:
        """Collective. Whether all ranks come to the end of this test within `patience_s`."""
        return REPORTS.try_barrier(patience_s)

    def _give_up(report: pytest.TestReport, text: str) -> None:
        sys.stderr.write(
            f"\n{report.nodeid} failed on rank {NET.rank} of {NET.size}; others wait for it in a collective:\n{text}\n"
        )
        REPORTS.abort(1)


@pytest.fixture
def net() -> PackageProcessor:
    """This rank's end of the communicator; for tests under tests/spmd."""
    return NET


@pytest.fixture
def agree(net: PackageProcessor) -> Callable[[bool, object], None]:
    """Collective. `agree(ok, detail)` fails on every rank, naming those where `ok` is false and their details."""

    def agree(ok: bool, detail: object = "") -> None:
        told = enumerate(net.on_every_rank((ok, str(detail))))
        wrong = [f"rank {rank}: {text}" for rank, (fine, text) in told if not fine]
        if wrong:
            pytest.fail("; ".join(wrong), pytrace=False)

    return agree
