from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from fedmpi.errors import LaunchError
from fedmpi.mpi import launcher
from fedmpi.mpi.launcher import Announcement, announced, check_launcher, speaks
from fedmpi.mpi.slurm import in_slurm_job, in_slurm_task

MPICH = "MPICH Version:      5.0.2\nMPICH configure:    --with-device=ch4:ucx,ofi --with-pm=hydra:gforker\nintel cray"
MPICH_PMIX = "MPICH Version:      4.2.0\nMPICH configure:    --with-pmix=/usr"
OPEN_MPI = "Open MPI v5.0.11, package: Open MPI user@localhost Distribution, ident: 5.0.11"
OPEN_MPI_4 = "Open MPI v4.1.6, package: Debian OpenMPI"
HYDRA = {"PMI_SIZE": "3", "PMI_RANK": "1", "MPI_LOCALNRANKS": "3"}
PRTE = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1", "PMIX_NAMESPACE": "prterun-x-1@1"}
ME = os.getpid()
STEP = {"SLURM_JOB_ID": "17", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "1"}


def process(proc: Path, pid: int, parent: int, environ: dict[str, str] | None = None, title: str = "bash") -> None:
    folder = proc / str(pid)
    folder.mkdir(exist_ok=True)
    (folder / "stat").write_text(f"{pid} (odd) name) S {parent} 1 1 0")
    (folder / "cmdline").write_bytes(title.encode() + b"\0")
    (folder / "environ").write_bytes(b"".join(f"{k}={v}\0".encode() for k, v in (environ or {}).items()))


@pytest.fixture
def step(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """A process two levels below its Slurm task, and the process table."""
    task, daemon, between = ME + 1, ME + 2, ME + 3
    environ = STEP | {"SLURM_TASK_PID": str(task)}
    process(tmp_path, ME, between, environ)
    process(tmp_path, between, task, environ)
    process(tmp_path, task, daemon, environ)
    process(tmp_path, daemon, 1, {}, "slurmstepd: [17.0]")
    return environ, tmp_path


def refusal(library: str, size: int | None, environ: dict[str, str], proc: Path = launcher.PROC) -> str:
    with pytest.raises(LaunchError) as caught:
        check_launcher(library, size, environ, proc)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_is_announced_to_a_process_started_by_hand() -> None:
    assert announced({}) == []
    assert speaks({})
    check_launcher(MPICH, None, {})
    check_launcher(MPICH, 1, {})


def test_each_launcher_announces() -> None:
    assert announced(HYDRA) == [Announcement("Hydra", 3, 1, "PMI_SIZE")]
    assert announced(PRTE) == [Announcement("Open MPI", 3, 1, "OMPI_COMM_WORLD_SIZE")]
    assert announced({"PMI_SIZE": "3", "PMI_RANK": "x"}) == []


def test_hydra_is_heard_only_while_its_socket_is_open() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert announced(HYDRA | {"PMI_FD": str(ours.fileno())})
        number = ours.fileno()
    assert announced(HYDRA | {"PMI_FD": str(number)}) == []
    assert announced(HYDRA | {"PMI_FD": "none"}) == []


def test_only_rank_0_speaks_for_all() -> None:
    assert [speaks(HYDRA | {"PMI_RANK": str(rank)}) for rank in range(3)] == [True, False, False]
    nested = [speaks({**HYDRA, **PRTE, "PMI_RANK": "0", "OMPI_COMM_WORLD_RANK": str(rank)}) for rank in range(3)]
    assert nested == [True, False, False]


def test_a_world_of_more_than_one_needs_no_check() -> None:
    check_launcher(MPICH, 3, HYDRA | PRTE)


def test_open_mpis_mpirun_with_mpich(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mpirun").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(launcher.metadata, "distributions", lambda name: [])
    for size in (None, 1):  # MPICH without PMIx dies in MPI_Init, so the answer comes before
        text = refusal(MPICH, size, PRTE)
        assert text == (
            "the launcher announces 3 processes (Open MPI, OMPI_COMM_WORLD_SIZE), the loaded MPI library is MPICH "
            f"and sees 1: start it with this Python's own {tmp_path / 'mpirun'}"
        )
    check_launcher(MPICH_PMIX, None, PRTE)  # may well work; the size will tell
    assert "announces 3" in refusal(MPICH_PMIX, 1, PRTE)


def test_hydra_with_open_mpi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(launcher.metadata, "distributions", lambda name: [])
    for size in (None, 1):
        text = refusal(OPEN_MPI, size, HYDRA)
        assert "announces 3 processes (Hydra, PMI_SIZE), the loaded MPI library is Open MPI and sees 1" in text
        assert text.endswith("load the module of the Open MPI this Python was given, and use its mpirun")
    check_launcher(OPEN_MPI_4, None, HYDRA)  # built with PMI it may understand


def test_two_mpi_packages_in_one_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.metadata, "distributions", lambda name: [name])
    assert "pip uninstall one of them" in refusal(OPEN_MPI, 1, HYDRA)


def test_a_world_of_one_inside_another_launcher_is_what_was_asked() -> None:
    check_launcher(OPEN_MPI, 1, HYDRA | PRTE | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"})
    check_launcher(MPICH_PMIX, 1, PRTE | {"PMI_SIZE": "1", "PMI_RANK": "0"})


def test_mpich_between_two_launchers_dies_in_init() -> None:
    both = PRTE | HYDRA
    assert "unset PMIX_NAMESPACE before mpirun" in refusal(MPICH, None, both)
    check_launcher(MPICH, None, both | {"MPIR_CVAR_PMI_VERSION": "1"})


def test_mpich_without_pmix_in_a_pmix_step() -> None:
    text = refusal(MPICH, None, {"PMIX_NAMESPACE": "slurm.pmix.3.0", "PMIX_RANK": "0"})
    assert "PMIX_NAMESPACE=slurm.pmix.3.0" in text
    assert "srun --mpi=pmi2" in text


def test_srun_without_the_right_plugin(step: tuple[dict[str, str], Path]) -> None:
    environ, proc = step
    assert refusal(MPICH, 1, environ, proc) == (
        "the step has 3 tasks (SLURM_STEP_NUM_TASKS), MPI (MPICH) sees 1: "
        "try srun --mpi=pmi2 or --mpi=pmix (srun --mpi=list)"
    )
    check_launcher(MPICH, None, environ, proc)  # a library built for Slurm's own PMI may understand
    pmi2 = environ | {"PMI_SIZE": "3", "PMI_RANK": "1", "SLURM_MPI_TYPE": "pmi2"}
    assert announced(pmi2, proc) == [Announcement("Slurm", 3, 1, "SLURM_STEP_NUM_TASKS")]
    assert "try srun --mpi=pmix (srun" in refusal(OPEN_MPI, None, pmi2, proc)


def test_a_step_of_one_task_is_a_world_of_one(step: tuple[dict[str, str], Path]) -> None:
    environ, proc = step
    check_launcher(MPICH, 1, environ | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, proc)


def test_left_over_slurm_variables_change_nothing(step: tuple[dict[str, str], Path]) -> None:
    environ, proc = step
    stranger = environ | {"SLURM_TASK_PID": str(ME + 9)}
    for left_over in (STEP, stranger, STEP | {"SLURM_TASK_PID": ""}):
        assert announced(left_over, proc) == []
        assert speaks(left_over, proc)
        assert not in_slurm_task(left_over, proc)
        check_launcher(MPICH, 1, left_over, proc)


def test_a_process_number_used_again_is_no_task(step: tuple[dict[str, str], Path]) -> None:
    environ, proc = step
    process(proc, ME + 1, ME + 2, {"SLURM_TASK_PID": "4"})  # an ancestor by chance
    assert announced(environ, proc) == []


def test_a_batch_script_submitted_from_a_step_inherits_but_is_none(step: tuple[dict[str, str], Path]) -> None:
    environ, proc = step
    process(proc, ME + 2, 1, {}, "slurmstepd: [18.batch]")
    assert in_slurm_task(environ, proc)
    assert announced(environ, proc) == []


def test_a_job_is_known_by_its_task_by_its_daemon_and_by_its_control_group(step: tuple[dict[str, str], Path]) -> None:
    """Ranks of mpirun carry the batch script's variables, also on nodes where the script does not run."""
    environ, proc = step
    job = environ["SLURM_JOB_ID"]
    assert in_slurm_job(job, environ, proc)
    assert not in_slurm_job(job + "0", environ, proc), "the task was started with another number"
    elsewhere = environ | {"SLURM_TASK_PID": "99999"}
    process(proc, ME + 2, 1, {}, f"slurmstepd: [{job}.0]")
    assert in_slurm_job(job, elsewhere, proc)
    assert not in_slurm_job(job + "0", elsewhere, proc)
    process(proc, ME + 2, 1, {}, "hydra_pmi_proxy")
    assert not in_slurm_job(job, elsewhere, proc)
    (proc / "self").mkdir()
    (proc / "self" / "cgroup").write_text(f"0::/system.slice/slurmstepd.scope/job_{job}/step_0/user/task_0\n")
    assert in_slurm_job(job, elsewhere, proc)
    assert not in_slurm_job("1", elsewhere, proc)


def test_without_a_process_table_there_is_no_slurm(tmp_path: Path) -> None:
    assert not in_slurm_task(STEP | {"SLURM_TASK_PID": str(ME)}, tmp_path)


def test_this_process_knows_its_own_parents() -> None:
    if launcher.PROC.exists():
        parent = str(os.getppid())
        environ = (launcher.PROC / parent / "environ").read_bytes()
        assert in_slurm_task({"SLURM_TASK_PID": parent}) is (f"SLURM_TASK_PID={parent}".encode() in environ)


def test_missing_mpi_advice_is_one_line() -> None:
    assert 'no MPI library found: pip install "fedmpi[mpich]"' in launcher.missing_mpi_advice()
    assert "\n" not in launcher.missing_mpi_advice()
