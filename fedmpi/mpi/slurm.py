"""Membership of this process in Slurm jobs, tasks and steps, whatever variables others left in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fedmpi.mpi.processes import PROC, lineage, process_stat, read_entry


def in_slurm_task(environ: Mapping[str, str] = os.environ, proc: Path = PROC) -> bool:
    """Return True if this process belongs to the Slurm task (batch script or step) that `SLURM_TASK_PID` names.

    The task must be this process or an ancestor, and must have been started with this very variable; so variables left
    over in a shell, by `salloc` or from another node, and a process number used again, change nothing.
    """
    task = environ.get("SLURM_TASK_PID", "")
    if not task.isdigit() or int(task) not in lineage(proc):
        return False
    return _was_started_with(f"SLURM_TASK_PID={task}", task, proc)


def in_slurm_job(job: str, environ: Mapping[str, str] = os.environ, proc: Path = PROC) -> bool:
    """Return True if this process runs in Slurm job `job`.

    It runs there below a task of that job, below one of Slurm's step daemons for it (ranks of mpirun on other nodes
    carry the variables of the batch script), or in a control group of it.
    """
    if in_slurm_task(environ, proc):
        return _was_started_with(f"SLURM_JOB_ID={job}", environ["SLURM_TASK_PID"], proc)
    titles = (read_entry(pid, "cmdline", proc) or b"" for pid in lineage(proc))
    if any(title.startswith(f"slurmstepd: [{job}.".encode()) for title in titles):
        return True
    return f"/job_{job}/".encode() in (read_entry("self", "cgroup", proc) or b"")


def in_slurm_step(environ: Mapping[str, str], proc: Path) -> bool:
    """Return True if this process belongs to an `srun` step.

    A batch script is a Slurm task too; submitted from inside a step it inherits that step's variables, so what
    started the task is asked: `slurmstepd: [17.0]` for a step, `slurmstepd: [17.batch]` for a script.
    """
    if not in_slurm_task(environ, proc):
        return False
    daemon = process_stat(environ["SLURM_TASK_PID"], proc).parent
    return b".batch]" not in (read_entry(daemon, "cmdline", proc) or b"")


def _was_started_with(variable: str, pid: str, proc: Path) -> bool:
    """Return True, too, if the process may not be read: its place among the parents has to do."""
    environ = read_entry(pid, "environ", proc)
    return environ is None or variable.encode() in environ.split(b"\0")
