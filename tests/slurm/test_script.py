"""The batch scripts without Slurm: what they refuse, what they run, and which exit code they hand on."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import SCRIPT


def by_hand(tmp_path: Path, *words: str, script: Path = SCRIPT, **environ: str) -> tuple[int, str]:
    """The script run by bash, with nothing on the PATH but what the test puts into `tmp_path`."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    done = subprocess.run(
        [bash, str(script), *words], env={"PATH": str(tmp_path)} | environ, cwd=tmp_path, capture_output=True, text=True
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


@pytest.fixture
def launched(tmp_path: Path) -> Path:
    """A folder whose mpirun prints the command that it gets."""
    program(tmp_path, "python", "exit 0")
    program(tmp_path, "mpirun", 'printf "%s\\n" "$*"')
    for name in ("sed", "sha256sum"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("", "fedmpi.fedavg --run-dir runs/fedavg-1"),
        ("--dataset mnist", "fedmpi.fedavg --dataset mnist --run-dir runs/fedavg-1"),
        ("fedprox", "fedmpi fedprox --run-dir runs/fedavg-1"),
        ("fedprox --dataset mnist --run-dir=here", "fedmpi fedprox --dataset mnist --run-dir=here"),
        ("mine:Own --mu 0.1", "fedmpi mine:Own --mu 0.1 --run-dir runs/fedavg-1"),
        ("./mine.py:Own --run-dir there", "fedmpi ./mine.py:Own --run-dir there"),
    ],
)
def test_a_first_word_without_a_dash_is_the_algorithm(launched: Path, words: str, command: str) -> None:
    code, text = by_hand(launched, *words.split(), LAUNCHER="mpirun", SLURM_JOB_ID="1", SLURM_NTASKS="12")
    assert (code, text) == (0, f"-n 12 python -m {command}\n")


@pytest.mark.parametrize(
    ("task", "words", "command"),
    [
        ("1", "--rounds 50", "fedmpi.fedavg --seed 0 --rounds 50"),
        ("2", "--rounds 50", "fedmpi fedprox --seed 1 --mu 0.1 --rounds 50"),
        ("3", "", "fedmpi mine:Own"),
        ("1", "power_of_choice --rounds 50", "fedmpi power_of_choice --seed 0 --rounds 50"),
        ("2", "power_of_choice --rounds 50", "fedmpi fedprox --seed 1 --mu 0.1 --rounds 50"),
    ],
)
def test_a_line_of_a_sweep_may_name_its_algorithm(launched: Path, task: str, words: str, command: str) -> None:
    (launched / "grid.txt").write_text("--seed 0  # first\n\nfedprox --seed 1 --mu 0.1\nmine:Own\n")
    code, text = by_hand(
        launched, "grid.txt", *words.split(), script=SCRIPT.with_name("sweep.sbatch"), LAUNCHER="mpirun",
        SLURM_JOB_ID="1", SLURM_NTASKS="12", SLURM_ARRAY_TASK_ID=task, FEDAVG=str(SCRIPT),
    )  # fmt: skip
    assert code == 0, text
    said, launch = text.splitlines()
    folder = said.rpartition(", in ")[2]
    assert folder.startswith("runs/sweep/grid-")
    assert launch == f"-n 12 python -m {command} --run-dir {folder}"


def test_a_job_that_goes_on_names_its_algorithm_again(launched: Path) -> None:
    """Out of time after a round: the next job of the chain gets all words once more."""
    program(launched, "mpirun", "mkdir -p run/checkpoint; : >run/checkpoint/round-000001.ckpt; exit 75")
    program(launched, "squeue", "echo RUNNING")
    program(launched, "sbatch", 'printf "%s\\n" "$*" >&2; echo 2')
    (launched / "mkdir").symlink_to(shutil.which("mkdir") or "mkdir")
    code, text = by_hand(
        launched, "mine:Own", "--run-dir", "run", LAUNCHER="mpirun", SLURM_JOB_ID="1", SLURM_NTASKS="12",
        SLURM_JOB_NAME="fedavg", SLURM_JOB_PARTITION="p", SLURM_JOB_NUM_NODES="2", ON_STOP="resubmit",
    )  # fmt: skip
    assert code == 75, text
    assert f"{SCRIPT} mine:Own --run-dir run\n" in text
    assert "going on in job 2, leg 2" in text
