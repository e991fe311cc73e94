"""One suite, two ways to run it: `pytest` (unit, e2e) and `mpiexec -n 3 pytest` (unit, spmd).

Under mpiexec every rank runs every test, and ranks tell each other how it went (`mpi_plugin`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from fedmpi.mpi.launcher import announced
from fedmpi.mpi.setup import on_every_rank

if TYPE_CHECKING:
    from fedmpi.mpi.comm import Comm

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
    from tests.mpi_plugin import Ranks, await_ranks

    await_ranks(os.environ)
    RANKS = Ranks()


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    if UNDER_MPI:
        RANKS.plugins = pluginmanager


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    # A root of its own for tmp_path: pytest tidies the common one up, and two processes that do so at once trip over
    # each other.
    os.environ["PYTEST_DEBUG_TEMPROOT"] = root = tempfile.mkdtemp(prefix="fedmpi-tests-")
    config.add_cleanup(lambda: shutil.rmtree(root, ignore_errors=True))
    config.option.with_mpi = True  # without ranks there are no such tests, but pytest-mpi takes a folder `mpi` for one
    if UNDER_MPI:
        config.pluginmanager.register(RANKS, "ranks")


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


@pytest.fixture
def net() -> Comm:
    """This rank's end of the communicator; for tests under tests/spmd."""
    return RANKS.net


@pytest.fixture
def agree(net: Comm) -> Callable[[bool, object], None]:
    """Collective. `agree(ok, detail)` fails on every rank, naming those where `ok` is false and their details."""

    def agree(ok: bool, detail: object = "") -> None:
        told = enumerate(on_every_rank(net, (ok, str(detail))))
        wrong = [f"rank {rank}: {text}" for rank, (fine, text) in told if not fine]
        if wrong:
            pytest.fail("; ".join(wrong), pytrace=False)

    return agree
