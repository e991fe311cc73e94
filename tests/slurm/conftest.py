"""Jobs of fedavg.sbatch on whatever Slurm `sinfo` answers for.

It needs two nodes, and a temporary folder that both see (pytest --basetemp=...).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "fedavg.sbatch"
LAUNCHERS = ("SLURM_", "PMI", "OMPI_COMM")  # what they leave in an environment
SMALL = ["--dataset", "synthetic", "--model", "2nn", "--num-clients", "20", "--rounds", "3"]


@dataclasses.dataclass
class SlurmJob:
    """A job of two ranks on each of two nodes."""

    number: str
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def told(self) -> dict[str, str]:
        """What Slurm knows of it."""
        text = ask("scontrol", "-o", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_for(self, *states: str, limit_s: float = 300) -> dict[str, str]:
        """Until it is in one of these states."""
        end = time.monotonic() + limit_s
        while (told := self.told())["JobState"] not in states:  # `sbatch --wait` asks ever more rarely
            assert time.monotonic() < end, f"not {states} but {told['JobState']}: {self.log}"
            time.sleep(0.5)
        return told

    def wait_for_round(self, number: int, run_dir: Path) -> None:
        """Until the history holds so many rounds."""
        history = run_dir / "history.jsonl"
        while not history.exists() or len(history.read_text().splitlines()) < number:
            assert self.told()["JobState"] in ("PENDING", "RUNNING"), self.log
            time.sleep(0.2)

    def ended(self, limit_s: float = 300) -> tuple[int, str]:
        """Its exit code and its log, once it is over; fails if a signal ended the batch script."""
        told = self.wait_for("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", limit_s=limit_s)
        code, signal_number = told["ExitCode"].split(":")
        assert signal_number == "0", told
        return int(code), self.log


def chain_from(job: SlurmJob, name: str, task: str = "") -> list[tuple[int, str]]:
    """Exit codes and logs of `job` and of those that went on where it stopped.

    `name`: of the jobs; `task`: "_1" in an array.
    """
    chain = [job.ended(limit_s=900)]  # a requeued job is held for two minutes
    while found := re.search(r"going on in job (\d+), leg \d", chain[-1][1]):
        number = found[1] + task
        chain.append(SlurmJob(number, job.log_file.with_name(f"{name}-{number}.log")).ended())
    return chain


def ask(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[..., SlurmJob]]:
    """`submit(*options, launcher=..., slurm=[...], ...)` submits fedavg.sbatch; what is left over is cancelled."""
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True, timeout=20).returncode != 0:
        pytest.skip("no Slurm answers here")
    jobs: list[SlurmJob] = []

    def submit(
        *options: str,
        launcher: str = "srun",
        slurm: Sequence[str] = (),
        injected: Path | None = None,
        script: Path = SCRIPT,
        **variables: str,
    ) -> SlurmJob:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        if "SLURM_CONF" in os.environ:
            environ["SLURM_CONF"] = os.environ["SLURM_CONF"]
        environ |= {
            "LAUNCHER": launcher,
            "VENV": str(tmp_path),  # none: the PATH has the Python of this test
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{injected}:{ROOT}" if injected else str(ROOT),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            **variables,
        }
        log = tmp_path / f"job-{len(jobs)}.log"
        command = ["sbatch", "--parsable", "--ntasks-per-node=2", f"--output={log}", *slurm, str(script), *options]
        done = subprocess.run(command, env=environ, cwd=tmp_path, check=True, capture_output=True, text=True)
        jobs.append(SlurmJob(done.stdout.strip(), log))
        return jobs[-1]

    yield submit
    for job in jobs:
        subprocess.run(["scancel", job.number], capture_output=True)


MODEL = """
import os, time
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)
    def forward(self, x):
        time.sleep(float(os.environ.get("TRAINING_S" if self.training else "EVALUATION_S", 0)))
        return self.layer(x.flatten(1))
net = lambda shape, classes: Net()
"""


@pytest.fixture
def sleepy(tmp_path: Path) -> Path:
    """A folder with sleepy.py, whose model takes TRAINING_S for a step and EVALUATION_S for a chunk of the test set."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sleepy.py").write_text(MODEL)
    return tmp_path / "model"


@functools.cache
def in_one_piece(*options: str, injected: Path | None = None) -> str:
    """Hash of the model of a run that nothing interrupts."""
    with tempfile.TemporaryDirectory() as folder:
        out = subprocess.run(
            [sys.executable, "-m", "fedmpi.fedavg", *SMALL, *options, "--run-dir", folder, "--quiet"],
            env={name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
            | {"PYTHONPATH": f"{injected}:{ROOT}" if injected else str(ROOT)},
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    return model_of(out)


def model_of(log: str) -> str:
    return re.findall(r"done: .* model ([0-9a-f]{16})", log)[-1]
