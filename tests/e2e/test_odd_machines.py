"""Machines that are not as one expects: no locale, no terminal, no MPI, odd names, few cores, leftovers of Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, clean_environment, mpiexec, with_tmpfs


def test_no_locale(job, tmp_path):
    env = {
        "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict",
    }  # fmt: skip
    result = job(3, *SMALL, "--run-dir", str(tmp_path / "Läufe ü"), env=env)
    assert result.code == 0, result.text
    assert result.text.isascii()
    assert "\r" not in result.text
    (tmp_path / "Läufe ü" / "history.jsonl").read_text(encoding="utf-8")


def test_a_closed_pipe_neither_hangs_nor_shows_a_traceback(tmp_path, data_dir):
    command = [mpiexec(), "-n", "3", sys.executable, "-m", "fedmpi.fedavg", *SMALL, "--run-dir", str(tmp_path / "run")]
    quoted = " ".join(f"'{word}'" for word in command)
    env = clean_environment({"FEDMPI_DATA": str(data_dir)})
    result = subprocess.run(
        ["bash", "-c", f"{quoted} | head -1"], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in result.stderr  # whether the launcher lets the job go on is its own affair


def test_one_process_with_a_closed_pipe(tmp_path, data_dir):
    command = f"'{sys.executable}' -m fedmpi.fedavg {' '.join(SMALL)} --run-dir '{tmp_path / 'run'}' | head -1"
    env = clean_environment({"FEDMPI_DATA": str(data_dir)})
    result = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr
    assert (tmp_path / "run" / "model.pt").exists()


LEFTOVERS = {
    "SLURM_JOB_ID": "7", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "2",
    "SLURM_TASK_PID": "1", "SLURM_CPUS_ON_NODE": "1", "SLURM_STEP_ID": "0",
}  # fmt: skip


@pytest.mark.parametrize("num_ranks", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_leftover_slurm_variables_change_nothing(job, num_ranks):
    plain = job(num_ranks, *SMALL, name="plain")
    launcher = () if num_ranks == 1 else None
    leftover = job(num_ranks, *SMALL, env=LEFTOVERS, name="leftover", launcher=launcher)
    assert leftover.code == 0, leftover.text
    assert leftover.bits() == plain.bits()
    assert leftover.text.count("done: ") == 1


NO_MPI = (
    "import sys\n"
    "class Finder:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name == 'mpi4py.MPI':\n"
    "            raise RuntimeError('cannot load MPI library\\n    libmpi.so: not found')\n"
    "sys.meta_path.insert(0, Finder())\n"
)


def test_without_an_mpi_library(job, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_MPI)
    env = {"PYTHONPATH": str(tmp_path)}
    assert job(1, "-c", "import fedmpi", program=(), launcher=(), env=env).code == 0
    assert "usage" in job(1, "--help", launcher=(), env=env).out
    out = ["--dataset", "synthetic", "--num-clients", "4", "--out", str(tmp_path / "splits")]
    assert job(1, *out, program=("-m", "fedmpi.data.prepare"), launcher=(), env=env).code == 0
    result = job(1, *SMALL, launcher=(), env=env)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1, result.err
    assert 'pip install "fedmpi[mpich]"' in result.err


def test_a_launcher_of_another_mpi_is_refused_in_one_line(start):
    """What `mpirun` of the other library does: three processes, each told that it is one of three."""
    from fedmpi.mpi.comm import library_version  # only the name of the library is asked for; MPI does not start

    mpich = library_version().startswith("MPICH")
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK") if mpich else ("PMI_SIZE", "PMI_RANK")
    told = [{names[0]: "3", names[1]: str(rank), "MPI_LOCALNRANKS": "3"} for rank in range(3)]
    jobs = [start(1, *SMALL, launcher=(), env=env) for env in told]
    results = [job.end(30) for job in jobs]
    lines = [line for result in results for line in result.text.splitlines()]
    assert len(lines) == 1, lines
    assert "announces 3 processes" in lines[0]
    assert results[0].code == 2
    assert not results[0].run_dir.exists()


def test_no_child_process_after_mpi_has_started(start):
    running = start(3, *SMALL, "--rounds", "20")
    children: set[str] = set()
    while running.process.poll() is None:
        ranks = running.ranks() if (running.run_dir / "history.jsonl").exists() else []
        for pid in ranks:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                try:
                    children |= set(task.read_text().split())
                except OSError:
                    continue  # the rank has just ended
        time.sleep(0.02)
    assert running.end().code == 0
    assert not children


@pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset is how a job is given one core")
def test_three_ranks_on_one_core_are_told_once(job):
    result = job(3, *SMALL, launcher=("taskset", "-c", str(min(os.sched_getaffinity(0))), mpiexec(), "-n", "3"))
    assert result.code == 0, result.text
    assert result.text.count("2 trainers share 1 core") == 1
    assert "1 thread each" in result.out


@pytest.mark.parametrize("name", ["no-such-host-x", pytest.param("lab_node", marks=pytest.mark.slow)])
@pytest.mark.skipif(
    subprocess.run(["unshare", "-u", "true"], check=False, capture_output=True).returncode != 0,
    reason="another host name needs a namespace of its own, which this user may not make",
)
def test_host_names_that_nobody_can_resolve(job, name):
    set_name = f"import socket, os, sys; socket.sethostname({name!r}); os.execvp(sys.argv[1], sys.argv[1:])"
    launcher = ("unshare", "-u", sys.executable, "-c", set_name, mpiexec(), "-n", "3")
    result = job(3, *SMALL, launcher=launcher)
    assert result.code == 0, result.text
    assert name in result.out


def test_mpi_over_a_named_interface(job):
    result = job(2, *SMALL, "--ethernet", "lo")
    assert result.code == 0, result.text


def test_a_home_that_cannot_be_written(job):
    """Data sets and splits have no place then: they are made for this job alone, and that is said in a line."""
    result = job(2, *SMALL, env={"HOME": "/proc/nobody", "FEDMPI_DATA": ""})
    assert result.code == 0, result.text
    assert "Traceback" not in result.text
    assert "/proc/nobody" in result.err


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(job, tmp_path):
    """A day back and a day ahead, in turns, on every look."""
    (tmp_path / "sitecustomize.py").write_text(
        "import itertools, time\n"
        "real, jumps = time.time, itertools.cycle([-86400, 86400, 0])\n"
        "time.time = lambda: real() + next(jumps)\n"
    )
    options = [*SMALL, "--checkpoint-every", "1", "--max-seconds", "100"]
    result = job(3, *options, env={"PYTHONPATH": str(tmp_path)})
    assert result.code == 0, result.text
    assert all(0 <= row["timings"]["round_s"] < 60 for row in result.rows())
    assert result.bits() == job(1, *SMALL, name="steady").bits()


def test_too_few_open_files_are_said_before_mpi_starts(job):
    limited = ("bash", "-c", 'ulimit -n 40; exec "$@"', "job", mpiexec(), "-n", "2")
    result = job(2, *SMALL, launcher=limited)
    assert result.code == 2, result.text
    assert result.errors == ["fedmpi: error: ulimit -n must be 64 or more (files that a process may open), got 40"]


@pytest.mark.slow
def test_shared_memory_of_a_container(data_dir):
    done = with_tmpfs("64m", Path("/dev/shm"), 4, SMALL, data_dir)
    assert done.code == 0, done.text
