"""What killed jobs leave in shared memory, and containers in which ranks may not read each other's memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, mpiexec

pytestmark = pytest.mark.slow

SLEEPER = """
import time
import fedmpi
net = fedmpi.PackageProcessor()
print(".", end="", flush=True)
time.sleep(300)
"""
LARGE = """
import numpy as np
import fedmpi
net = fedmpi.PackageProcessor()
with fedmpi.abort_on_crash(net):
    for size in (10, 10_000, 3_000_000):
        vector = net.bcast_vector(np.full(size, net.rank + 1, np.float32))
        assert (vector == 1).all()
        sums = np.full(size, net.rank + 1)
        net.reduce_sum(sums)
        assert not net.is_server or (sums == 6).all()
    print("fine", flush=True)
"""


def family(pid: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def files_of(job) -> set[Path]:
    """The job's segments in shared memory, and Open MPI's session folder."""
    found = {Path(tempfile.gettempdir()) / f"ompi.{job.process.pid}"}
    for pid in family(job.process.pid):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        found |= {Path(line.split()[-1]) for line in lines if "/dev/shm/" in line}
    return {path for path in found if path.exists()}


@pytest.fixture
def sleeper(start, tmp_path):
    """`sleeper()` starts a job of three ranks that does nothing; returns it and its files."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)

    def sleeper():
        job = start(3, program=("sleeper.py",))
        assert job.process.stdout.read(3) == "..."  # a dot of each rank
        return job, files_of(job)

    return sleeper


def test_a_killed_jobs_files_are_gone_once_another_starts_and_a_running_ones_are_not(sleeper):
    running, kept = sleeper()
    dead, left = sleeper()
    assert kept
    assert left
    for pid in sorted(family(dead.process.pid)):  # as at the end of a container: the launcher too, so nobody tidies up
        os.kill(pid, signal.SIGKILL)
    dead.process.communicate(timeout=30)
    assert all(path.exists() for path in left)
    _, made = sleeper()
    assert not [path for path in left if path.exists()]
    assert made
    assert all(path.exists() for path in kept | made)
    assert running.process.poll() is None


@pytest.mark.parametrize("forbidden", ["by a filter", "by user namespaces"])
def test_ranks_that_may_not_read_each_others_memory_send_large_messages(job, tmp_path, forbidden):
    (tmp_path / "large.py").write_text(LARGE)
    own_users = ["unshare", "--user", "--map-root-user"]
    if forbidden == "by a filter":
        launcher = (sys.executable, str(Path(__file__).with_name("forbid_reading.py")), mpiexec(), "-n", "3")
    elif subprocess.run([*own_users, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    else:
        launcher = (mpiexec(), "-n", "3", *own_users)
    result = job(3, program=("large.py",), launcher=launcher)
    assert result.code == 0, result.text
    assert result.out.count("fine") == 3
    assert "ERROR" not in result.text


def test_a_run_where_reading_is_forbidden_has_the_same_bits(job):
    launcher = (sys.executable, str(Path(__file__).with_name("forbid_reading.py")), mpiexec(), "-n", "3")
    forbidden = job(3, *SMALL, name="forbidden", launcher=launcher)
    free = job(3, *SMALL, name="free")
    assert (forbidden.code, free.code) == (0, 0), forbidden.text
    assert forbidden.bits() == free.bits()
