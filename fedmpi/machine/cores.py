"""Number of cores that this job's processes have on this node, which is rarely how many the machine has.

Three things take cores away without changing `os.cpu_count()`: an affinity mask (taskset, a launcher that binds), a
cgroup quota (containers), and a Slurm allocation that nothing enforces.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedmpi.mpi.processes import PROC
from fedmpi.mpi.slurm import in_slurm_task

CGROUPS = Path("/sys/fs/cgroup")


def affinity() -> frozenset[int]:
    """The cores this process may run on. A launcher may have bound it to one: the job has the union over its ranks."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))  # macOS has no masks: all of them


def available_cores() -> int:
    """The cores this process alone may use, at least 1."""
    return cores_of_node([affinity()], cgroup_quota(), slurm_allocation())


def cores_of_node(masks: Sequence[frozenset[int]], quota: float | None, allocation: int | None) -> int:
    """The cores a node's ranks have together, at least 1.

    Args:
        masks: `affinity()` of each rank of the node.
        quota: `cgroup_quota()` of any of them, in cores; None: no limit.
        allocation: `slurm_allocation()` of any of them; None: no Slurm.
    """
    limits = [len(frozenset().union(*masks))]
    if quota is not None:
        limits.append(math.ceil(quota))
    if allocation is not None:
        limits.append(allocation)
    return max(1, min(limits))


def threads_per_trainer(threads: int | str, cores: int, ranks_on_node: int) -> int:
    """`threads` as given; "auto": the node's cores shared evenly among its ranks, at least 1."""
    return int(threads) if threads != "auto" else max(1, cores // ranks_on_node)


def oversubscription_warning(cores: int, num_trainers: int, threads: int, with_server: bool) -> str | None:
    """One line if the trainers of a node want more cores than they have, else None. The server sleeps while they work.

    Args:
        cores: `cores_of_node()`.
        num_trainers: ranks of this node that train.
        threads: of each of them.
        with_server: whether a rank that only serves is on this node too.
    """
    if num_trainers * threads <= cores or not num_trainers:
        return None
    have = f"{cores} core{'s' if cores != 1 else ''} (affinity, cgroup quota, Slurm)"
    if num_trainers == 1:
        return f"{threads} threads share {have}: use --threads {cores} or less for full speed"
    most = max(1, cores // threads)
    fit = f"at most {most} trainer{'s' if most != 1 else ''} ({most + with_server} ranks)"
    if threads == 1:
        return f"{num_trainers} trainers share {have}: use {fit} for full speed"
    if threads > cores:
        fit = f"--threads {max(1, cores // num_trainers)} or fewer trainers"
    return f"{num_trainers} trainers with {threads} threads each share {have}: use {fit} for full speed"


def slurm_allocation(environ: Mapping[str, str] = os.environ, proc: Path = PROC) -> int | None:
    """The CPUs Slurm gave the job on this node; None outside a Slurm task, whatever variables are left over.

    SLURM_CPUS_ON_NODE counts all of the job's tasks here. SLURM_CPUS_PER_TASK is not asked: it is the request of one
    task, set only with -c, and survives from `sbatch` into steps that were started with another.
    """
    cpus = environ.get("SLURM_CPUS_ON_NODE", "")
    return int(cpus) if cpus.isdigit() and int(cpus) > 0 and in_slurm_task(environ, proc) else None


def cgroup_quota(root: Path = CGROUPS, membership: Path = PROC / "self" / "cgroup") -> float | None:
    """The smallest CPU quota, in cores, of this process's cgroup and of those above it; None: no limit.

    Args:
        root: where the cgroup file systems are mounted.
        membership: the file of lines `number:controllers:path` that tells the cgroups of this process.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None  # not Linux
    quotas: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            tops, read = [root, root / "unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            tops, read = [root / controllers, root / "cpu"], _quota_v1
        else:
            continue
        quotas += [quota for top in tops for folder in _upwards(top, path) if (quota := read(folder)) is not None]
    return min(quotas, default=None)


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """The cgroup `path` below `top`, then those above it; of a host's path in a container only `top` exists."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for length in range(len(parts), -1, -1):
        yield top.joinpath(*parts[:length])


def _quota_v2(folder: Path) -> float | None:
    return _ratio(_words(folder / "cpu.max"))


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _ratio(words: list[str]) -> float | None:
    """`["150000", "100000"]` is 1.5 cores; "max", "-1" and anything unexpected are no limit."""
    if len(words) != 2 or not all(word.isdigit() and int(word) > 0 for word in words):
        return None
    return int(words[0]) / int(words[1])
