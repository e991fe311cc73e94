"""slurm/fedavg.sbatch without Slurm: what it refuses, and which exit code it hands on."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import SCRIPT


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
    code, text = by_hand(tmp_path, LAUNCHER="mpirun", SLURM_JOB_ID="1", SLURM_NTASKS="12", ON_STOP="nothing")
    last = (
        "fedavg.sbatch: no round was finished in this job: not going on; give it more --time (or fewer clients a round)"
    )
    assert code == expected
    assert text.splitlines() == [
        "-n 12 python -m fedmpi.fedavg --run-dir runs/fedavg-1",
        *[last] * (expected == 75),
    ]
