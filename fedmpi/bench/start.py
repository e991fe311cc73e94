"""Seconds from the launcher to the first round, against a bare `import torch` and a barrier.

Both are jobs of their own, so they run before this job starts MPI, from its first process.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_BARE = """
import torch
from mpi4py import MPI
MPI.COMM_WORLD.Barrier()
if MPI.COMM_WORLD.Get_rank() == 0:
    print("output:", flush=True)
"""
_LAUNCHERS = ("PMI", "OMPI", "PMIX", "PRTE", "MPI", "HYDRA", "SLURM")


def launched_ranks() -> int:
    """Return the number of ranks of this job, as far as its launcher says before MPI starts; else 3."""
    names = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), 3)


def seconds_to_round_0(num_ranks: int, turns: int) -> dict[str, list[float]]:
    """Both times, `turns` of each, one after the other in turns; empty where no launcher stands beside this Python."""
    launcher = Path(sys.executable).with_name("mpiexec")
    if not launcher.exists():
        return {}
    kept = ("OMPI_ALLOW", "PRTE_MCA_rmaps")
    environ = {k: v for k, v in os.environ.items() if k.startswith(kept) or not k.startswith(_LAUNCHERS)}
    start = [str(launcher), "-n", str(num_ranks), sys.executable]
    spent: dict[str, list[float]] = {"fedmpi": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        job = ["-m", "fedmpi.fedavg", "--dataset", "mnist", "--model", "2nn", "--rounds", "1", "--cohort-size", "1"]
        for turn in range(turns + 1):  # the first turn warms the page cache
            for name, words in (("bare", ["-c", _BARE]), ("fedmpi", [*job, "--run-dir", f"{folder}/{turn}"])):
                seconds = _seconds_to_line([*start, *words], "output:", environ)
                if turn:
                    spent[name].append(seconds)
    return spent


def _seconds_to_line(command: list[str], begins: str, environ: dict[str, str]) -> float:
    """Until `command` prints a line that begins so; then wait for its end."""
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        seconds = next((time.perf_counter() - begun for line in process.stdout if line.startswith(begins)), None)
        process.stdout.read()
    if process.returncode or seconds is None:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return seconds


def median_difference(spent: dict[str, list[float]]) -> float:
    """By how much fedmpi starts later, in seconds."""
    return statistics.median(mine - bare for mine, bare in zip(spent["fedmpi"], spent["bare"], strict=True))
