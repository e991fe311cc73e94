"""This machine's limits: matrix products, messages, memory."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from fedmpi.machine.cores import affinity, cgroup_quota, cores_of_node, slurm_allocation
from fedmpi.mpi.comm import Comm, library_version
from fedmpi.mpi.setup import agree_on_buffer, on_every_rank
from fedmpi.mpi.tree import bcast_vector, reduce_sum

_TURNS = 30
_VECTOR = 1_663_370  # entries of the CNN's vector


def facts(net: Comm) -> dict[str, object]:
    """Collective. What the figures were measured on, on the server."""
    cores = cores_of_node(on_every_rank(net, affinity()), cgroup_quota(), slurm_allocation())
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    return {
        "cpu": cpu or platform.processor(),
        "cores": cores,
        "vector unit": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "mpi": library_version(),
        "ranks": net.size,
        "load before": round(os.getloadavg()[0], 2),
    }


def limits(net: Comm) -> dict[str, float]:
    """Collective. Rates of products (all trainers at once, one thread each) and of messages, on the server.

    Returns:
        GFLOP/s of a large product and of the 2NN's first layer at batch 10, per trainer; microseconds of an 8 byte
        broadcast; GB/s of the broadcast (float32) and of the reduction (int64) of the CNN's vector.
    """
    trains = not net.is_server or net.size == 1
    shapes = {"large product GFLOP/s": (512, 512, 512), "2nn layer GFLOP/s": (10, 784, 200)}
    rates = {name: _product_rate(*shape) if trains else float("inf") for name, shape in shapes.items()}
    slowest = {name: min(rate) for name, rate in _by_name(on_every_rank(net, rates)).items()}
    order, vector = np.zeros(1, np.int64), np.zeros(_VECTOR, np.float32)
    sums = np.zeros(_VECTOR, np.int64)
    short, long, whole = (agree_on_buffer(net, "limits", array, written=True) for array in (order, vector, sums))
    return {
        **slowest,
        "broadcast of 8 B, us": 1e6 * _median_s(net, lambda: bcast_vector(net, order, short)),
        "broadcast GB/s": vector.nbytes / 1e9 / _median_s(net, lambda: bcast_vector(net, vector, long)),
        "reduction GB/s": sums.nbytes / 1e9 / _median_s(net, lambda: reduce_sum(net, sums, whole)),
    }


def pss_mb(net: Comm) -> list[float]:
    """Collective. Proportional set size of every rank in MB: pages shared by k processes count 1 / k in each."""
    lines = _lines("/proc/self/smaps_rollup")
    mine = next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)
    return on_every_rank(net, round(mine, 1))


def _product_rate(m: int, k: int, n: int) -> float:
    left, right = torch.randn(m, k), torch.randn(k, n)
    repeats = max(1, int(2e7 / (m * k * n)))
    spent = []
    for _ in range(_TURNS):
        begun = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right)
        spent.append((time.perf_counter() - begun) / repeats)
    return float(2e-9 * m * k * n / np.median(spent))


def _median_s(net: Comm, call: Callable[[], object]) -> float:
    spent = []
    for _ in range(_TURNS):
        net.barrier()
        begun = time.perf_counter()
        call()
        spent.append(net.max_of(int(1e9 * (time.perf_counter() - begun))) / 1e9)
    return float(np.median(spent))


def _by_name(held: list[dict[str, float]]) -> Mapping[str, list[float]]:
    return {name: [each[name] for each in held] for name in held[0]}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
