"""slurm/fedavg.sbatch: its refusals anywhere; its jobs, marked slurm, on whatever Slurm `sinfo` answers for.

The jobs need two nodes and a temporary folder that all nodes see (pytest --basetemp=...).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "fedavg.sbatch"
SMALL = ["--dataset", "synthetic", "--model", "2nn", "--num-clients", "20", "--rounds", "3"]


def by_hand(tmp_path: Path, **environ: str) -> tuple[int, str]:
    """The script run by bash, with nothing on the PATH but what the test puts into `tmp_path`."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    done = subprocess.run(
        [bash, str(SCRIPT)], env={"PATH": str(tmp_path)} | environ, cwd=tmp_path, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def program(folder: Path, name: str, body: str = "exit 1") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_missing_launcher_is_one_line(tmp_path: Path, launcher: str) -> None:
    code, text = by_hand(tmp_path, LAUNCHER=launcher, SLURM_JOB_ID="1")
    assert (code, text.count("\n")) == (2, 1)
    assert f"no {launcher} on the PATH" in text


def test_an_unknown_launcher_is_one_line(tmp_path: Path) -> None:
    assert by_hand(tmp_path, LAUNCHER="prun") == (2, "fedavg.sbatch: LAUNCHER must be srun or mpirun, got 'prun'\n")


def test_outside_a_job_is_one_line(tmp_path: Path) -> None:
    program(tmp_path, "srun")
    code, text = by_hand(tmp_path)
    assert (code, text.count("\n")) == (2, 1)
    assert "this is no Slurm job: sbatch slurm/fedavg.sbatch" in text


def test_a_missing_python_or_package_is_one_line(tmp_path: Path) -> None:
    program(tmp_path, "srun")
    code, text = by_hand(tmp_path, SLURM_JOB_ID="1")
    assert (code, text.count("\n")) == (2, 1)
    assert "no python on the PATH" in text
    program(tmp_path, "python")
    code, text = by_hand(tmp_path, SLURM_JOB_ID="1")
    assert (code, text.count("\n")) == (2, 1)
    assert f"{tmp_path / 'python'} has no fedmpi" in text


@pytest.mark.parametrize(("reported", "expected"), [(0, 0), (2, 2), (3, 3), (75, 75), (14, 1), (137, 1), (143, 1)])
def test_the_exit_code_is_fedmpis(tmp_path: Path, reported: int, expected: int) -> None:
    program(tmp_path, "python", "exit 0")
    program(tmp_path, "mpirun", f'printf "%s\\n" "$*"; exit {reported}')
    code, text = by_hand(tmp_path, LAUNCHER="mpirun", SLURM_JOB_ID="1", SLURM_NTASKS="12")
    assert (code, text) == (expected, "-n 12 python -m fedmpi.fedavg\n")


def submit(tmp_path: Path, launcher: str, *options: str, injected: Path | None = None) -> tuple[int, str]:
    """The exit code and the log of a job of two ranks on each of two nodes."""
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True, timeout=20).returncode != 0:
        pytest.skip("no Slurm answers here")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI", "OMPI_COMM"))}
    if "SLURM_CONF" in os.environ:
        environ["SLURM_CONF"] = os.environ["SLURM_CONF"]
    environ |= {
        "LAUNCHER": launcher,
        "VENV": str(tmp_path),  # none: the PATH has the Python of this test
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{injected}:{ROOT}" if injected else str(ROOT),
    }
    log = tmp_path / "job.log"
    command = ["sbatch", "--parsable", "--ntasks-per-node=2", f"--output={log}", str(SCRIPT), *options]
    job = subprocess.run(command, env=environ, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    while True:  # `sbatch --wait` asks ever more rarely, up to twice a minute
        told = subprocess.run(["scontrol", "-o", "show", "job", job], check=True, capture_output=True, text=True).stdout
        if re.search(r"JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)", told):
            break
        time.sleep(0.5)
    ended = re.search(r"ExitCode=(\d+):(\d+)", told)
    assert ended is not None, told
    assert ended[2] == "0", told  # the batch script itself was ended by a signal
    return int(ended[1]), log.read_text()


@pytest.mark.slurm
def test_srun_and_mpirun_train_the_same_model(tmp_path: Path) -> None:
    models = []
    for launcher in ("srun", "mpirun"):
        code, log = submit(tmp_path, launcher, *SMALL, "--run-dir", str(tmp_path / launcher))
        assert code == 0, log
        banner = re.search(r"4 on \S+ \(2\), \S+ \(2\)", log)
        assert banner is not None, log
        models += re.findall(r"done: 3 rounds .* model ([0-9a-f]{16})", log)
    assert len(models) == 2
    assert models[0] == models[1]


@pytest.mark.slurm
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_wrong_option_fails_the_job_with_2(tmp_path: Path, launcher: str) -> None:
    code, log = submit(tmp_path, launcher, *SMALL, "--rounds", "0")
    assert code == 2, log
    assert log.count("fedmpi: error:") == 1, log


@pytest.mark.slurm
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_killed_rank_fails_the_job_with_1(tmp_path: Path, launcher: str) -> None:
    """The interpreter of one rank is made to kill itself while the others start or train."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, threading\n"
        "if os.environ.get('PMI_RANK', os.environ.get('PMIX_RANK')) == '1':\n"
        "    threading.Timer(8, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
    )
    options = [*SMALL, "--rounds", "100000", "--run-dir", str(tmp_path / launcher)]
    code, log = submit(tmp_path, launcher, *options, injected=tmp_path)
    assert code == 1, log
