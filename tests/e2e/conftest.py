"""Real jobs in subprocesses: `job(n, *args)` is `mpiexec -n N python -m fedmpi.fedavg ARGS`, with a time limit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SMALL = "--dataset synthetic --model 2nn --num-clients 20 --cohort-size 7 --rounds 3".split()
"""A job of seconds, start included."""


def mpiexec() -> str:
    """The launcher that belongs to this Python."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec") or "mpiexec"


def under_open_mpi() -> bool:
    """Whether that is Open MPI's."""
    return "Open MPI" in subprocess.run([mpiexec(), "--version"], capture_output=True, text=True, check=True).stdout


def clean_environment(extra: dict[str, str]) -> dict[str, str]:
    """This process's and `extra`, without what a launcher or Slurm left in it; as root Open MPI wants to be asked."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI_COMM", "SLURM"))}
    open_mpi = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    path = os.pathsep.join(filter(None, [extra.get("PYTHONPATH"), str(ROOT), kept.get("PYTHONPATH")]))
    return {**open_mpi, **kept, **extra, "PYTHONPATH": path}


def with_tmpfs(size: str, folder: Path, num_ranks: int, options: list[str], data_dir: Path) -> Result:
    """A job that finds a file system of `size` at `folder`, in a mount namespace of its own; then its checkpoints."""
    run_dir = folder / "run" if folder.name != "shm" else data_dir / "shm-run"
    words = [
        mpiexec(),
        "-n",
        str(num_ranks),
        sys.executable,
        "-m",
        "fedmpi.fedavg",
        *options,
        "--run-dir",
        str(run_dir),
    ]
    script = f"mount -t tmpfs -o size={size} none '{folder}' && \"$@\"; code=$?; ls '{run_dir}/checkpoint'; exit $code"
    command = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else []), "bash", "-c", script, "job", *words]
    env, begun = clean_environment({"FEDMPI_DATA": str(data_dir)}), time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    return Result(done.returncode, done.stdout, done.stderr, run_dir, time.monotonic() - begun)


@dataclasses.dataclass
class Job:
    """A running job, in a process group of its own."""

    process: subprocess.Popen[str]
    run_dir: Path
    started: float

    def ranks(self) -> list[int]:
        """Process ids of the job's ranks, by what their command line says."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if str(self.run_dir).encode() in words and b"python" in Path(os.fsdecode(words[0])).name.encode():
                    found.append(int(entry.name))
        return sorted(found)

    def wait_for_round(self, number: int, limit_s: float = 90) -> None:
        """Until the history holds so many rounds."""
        history = self.run_dir / "history.jsonl"
        end = time.monotonic() + limit_s
        while not history.exists() or len(history.read_text().splitlines()) < number:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, f"no round {number} within {limit_s} s"
            time.sleep(0.05)

    def end(self, limit_s: float = 120) -> Result:
        """Wait for it. A job that does not end is killed, and the test fails."""
        try:
            out, err = self.process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            out, err = self.process.communicate()
            pytest.fail(f"the job did not end within {limit_s} s:\n{out}\n{err}")
        return Result(self.process.returncode, out, err, self.run_dir, time.monotonic() - self.started)


@dataclasses.dataclass
class Result:
    """What a job came to."""

    code: int
    out: str
    err: str
    run_dir: Path
    seconds: float

    @property
    def text(self) -> str:
        """All it printed."""
        return self.out + self.err

    @property
    def errors(self) -> list[str]:
        """Lines by which fedmpi says what went wrong."""
        return [line for line in self.text.splitlines() if line.startswith("fedmpi: error:")]

    def rows(self) -> list[dict[str, Any]]:
        """The rounds as the history has them."""
        return [json.loads(line) for line in (self.run_dir / "history.jsonl").read_text(encoding="utf-8").splitlines()]

    def history(self) -> list[dict[str, Any]]:
        """The rounds, timings apart."""
        return [{key: value for key, value in row.items() if key != "timings"} for row in self.rows()]

    def bits(self) -> str:
        """Hash of the final model, as a user would take it from model.pt."""
        state = torch.load(self.run_dir / "model.pt", weights_only=True)
        digest = hashlib.sha256()
        for key in sorted(state):
            digest.update(state[key].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets and splits of all jobs of this session."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def start(tmp_path: Path, data_dir: Path) -> Iterator[Callable[..., Job]]:
    """`start(n, *args, name=..., env=..., module=..., launcher=[...])` starts a job and returns at once."""
    jobs: list[Job] = []

    def start(
        num_ranks: int,
        *args: str,
        name: str = "run",
        env: dict[str, str] | None = None,
        program: tuple[str, ...] = ("-m", "fedmpi.fedavg"),
        python: str = sys.executable,
        launcher: tuple[str, ...] | None = None,
        cwd: Path = tmp_path,
    ) -> Job:
        run_dir = tmp_path / name
        words = (mpiexec(), "-n", str(num_ranks)) if launcher is None else launcher
        command = [*words, python, *program, *args]
        if "--run-dir" not in args and program == ("-m", "fedmpi.fedavg"):
            command += ["--run-dir", str(run_dir)]
        environment = clean_environment({"FEDMPI_DATA": str(data_dir), **(env or {})})
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
            encoding="utf-8", errors="replace", env=environment, cwd=cwd, start_new_session=True,
        )  # fmt: skip
        jobs.append(Job(process, run_dir, time.monotonic()))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.communicate()


@pytest.fixture
def job(start: Callable[..., Job]) -> Callable[..., Result]:
    """`job(n, *args, ...)` runs a job to its end."""
    return lambda *args, limit_s=120, **options: start(*args, **options).end(limit_s)
