"""What a job takes: memory of the server, cores of ranks without work, messages beyond 2 GiB. Minutes and gigabytes."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MANY = "--dataset synthetic --num-clients 1000 --batch-size 0 --eval-every 1000".split()


def memory_mb(pid: int, key: str) -> float:
    """VmRSS or VmHWM of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_of_server(running) -> float:
    """VmHWM of rank 0 just before it leaves, in MB."""
    peak, server = 0.0, 0
    while running.process.poll() is None:
        ranks = running.ranks()
        server = server or (ranks[0] if len(ranks) == 3 else 0)  # the first to leave may be the server
        with contextlib.suppress(OSError, StopIteration):
            peak = max(peak, memory_mb(server, "VmHWM"))
        time.sleep(0.1)
    result = running.end()
    assert result.code == 0, result.text
    return peak


BY_COLUMNS = """
from fedmpi.fedavg import FedAvg

class ByColumns(FedAvg):
    def round(self, s):
        cohort = s.sample(self.config.clients_per_round)
        s.model.w.copy_(s.columns(cohort, self.client_update, lambda rows, sent: rows.mean(0)).w)
"""


@pytest.mark.parametrize("algorithm", ["fedavg", "columns:ByColumns"])
def test_the_servers_memory_does_not_grow_with_the_cohort(start, tmp_path, algorithm):
    """490 further models of 6.7 MB would be 3.3 GB, summed or by columns."""
    (tmp_path / "columns.py").write_text(BY_COLUMNS)
    args = (*MANY, "--model", "cnn", "--rounds", "2")
    peaks = {}
    for size in ("10", "500"):
        folder = ("--run-dir", str(tmp_path / size))
        running = start(3, *args, "--cohort-size", size, *folder, program=("-m", "fedmpi", algorithm), name=size)
        peaks[size] = peak_of_server(running)
    few, many = peaks["10"], peaks["500"]
    assert many - few < 30, (few, many)


def test_memory_does_not_grow_with_time(start):
    running = start(3, *MANY, "--model", "2nn", "--cohort-size", "10", "--rounds", "321")
    used = {}
    for number in (20, 320):
        running.wait_for_round(number, limit_s=600)
        used[number] = [memory_mb(pid, "VmRSS") for pid in running.ranks()]
    assert running.end().code == 0
    growth = [after - before for before, after in zip(used[20], used[320], strict=True)]
    assert max(growth) < 15, used


def test_ranks_without_work_leave_the_cores_alone(start):
    """One client a round: six of seven trainers wait. The fastest rounds are compared: the machine may be shared."""
    args = "--dataset mnist --model cnn --cohort-size 1 --rounds 5 --eval-every 100".split()
    seconds = {}
    for num_ranks in (2, 8):
        running = start(num_ranks, *args, name=f"n{num_ranks}")
        running.wait_for_round(1)
        begun, spent = time.monotonic(), {pid: -cpu_seconds(pid) for pid in running.ranks()}
        running.wait_for_round(4)
        for_s = time.monotonic() - begun
        shares = sorted((spent[pid] + cpu_seconds(pid)) / for_s for pid in spent)
        ended = running.end()
        assert ended.code == 0, ended.text
        timings = [row["timings"] for row in ended.rows()[:-1]]  # the last has the evaluation
        seconds[num_ranks] = min(each["round_s"] for each in timings)
        idle = sum(not any(busy) for busy in zip(*(each["busy_s"] for each in timings), strict=True))
        assert idle >= num_ranks - 1 - len(timings)
        assert all(share < 0.05 for share in shares[:idle]), shares
    assert seconds[8] < 1.2 * seconds[2], seconds


LARGE = """
import sys
import numpy as np
import fedmpi
net = fedmpi.PackageProcessor()
with fedmpi.abort_on_crash(net):
    for count, dtype in ((2**29 + 16, np.float32), (2**31 + 16, np.int8)):
        probes = [0, 2**28 - 1, 2**28, 2**29 - 1, 2**29, count - 1]
        vector = np.zeros(count, dtype)
        if net.is_server:
            vector[probes] = range(1, 7)
        net.bcast_vector(vector)
        assert vector[probes].tolist() == [1, 2, 3, 4, 5, 6], vector[probes]
        assert np.count_nonzero(vector) == 6
    sums = np.full(2**28 + 16, 2**40, np.int64)
    net.reduce_sum(sums)
    assert not net.is_server or (sums == net.size * 2**40).all()
    del sums
    rows = np.full((1, 2**28 + 16), net.rank, np.float32)
    arrived = net.gather_rows(rows)
    assert not net.is_server or (arrived == np.arange(net.size, dtype=np.float32)[:, None]).all()
sys.exit(0)
"""


def test_buffers_beyond_2_gib(job, tmp_path):
    (tmp_path / "large.py").write_text(LARGE)
    result = job(2, program=("large.py",), limit_s=600)
    assert result.code == 0, result.text
