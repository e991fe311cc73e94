"""Ctrl-C at any time before the first round: one line and code 130, whatever is being imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, clean_environment, mpiexec, under_open_mpi

PRESS = """
import os, signal, sys, time
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["FEDMPI_TEST_AT"] and name not in Press.seen:
            Press.seen.add(name)
            if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) != "0":
                time.sleep(3)  # a key reaches all ranks at once: rank 0 is where it speaks by then
            os.kill(os.getpid(), signal.SIGINT)
    seen = set()
sys.meta_path.insert(0, Press())
"""
"""For sitecustomize: Ctrl-C is pressed when a module is looked for."""

FEDAVG = ("fedmpi.fedavg", *SMALL)
LINE = "fedmpi: error: interrupted (Ctrl-C)\n"


def pressed(folder: Path, module: str, *program: str, num_ranks: int = 0) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(PRESS)
    environ = clean_environment({"PYTHONPATH": str(folder), "FEDMPI_TEST_AT": module, "FEDMPI_DATA": str(folder)})
    launcher = [mpiexec(), "-n", str(num_ranks)] if num_ranks else []
    command = [*launcher, sys.executable, "-m", *program]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False, cwd=folder)


@pytest.mark.parametrize(
    ("module", "program", "said"),
    [
        ("fedmpi.launch", FEDAVG, LINE),
        ("fedmpi.options", FEDAVG, LINE),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [
                ("numpy", FEDAVG, LINE),
                ("numpy._core._multiarray_umath", FEDAVG, LINE),
                ("yaml", FEDAVG, LINE),
                ("mpi4py", FEDAVG, LINE),
                ("fedmpi.__main__", ("fedmpi",), LINE),
                ("argparse", ("fedmpi", "fedavg", *SMALL), LINE),
                ("numpy", ("fedmpi.data.prepare", "--dataset", "synthetic"), LINE),
                ("fedmpi.launch", ("fedmpi.bench",), LINE),
                (
                    "fedmpi.lifecycle.yaml_file",  # once the program has begun
                    ("fedmpi.data.prepare", "--config", "options.yaml"),
                    "interrupted: what was complete is kept, run it again",
                ),
                ("torch", FEDAVG, "interrupted (Ctrl-C) before the first round\n"),
                ("torch._C", FEDAVG, "interrupted (Ctrl-C) before the first round\n"),
                ("fedmpi.models.mlp", FEDAVG, "interrupted (Ctrl-C) before the first round\n"),
            ]
        ),
    ],
)
def test_alone(tmp_path: Path, module: str, program: tuple[str, ...], said: str) -> None:
    done = pressed(tmp_path, module, *program)
    assert done.returncode == 130, done.stderr
    assert said in done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["fedmpi.launch", "numpy", "yaml", "mpi4py", "torch", "fedmpi.models.mlp"])
def test_under_a_launcher(tmp_path: Path, module: str) -> None:
    done = pressed(tmp_path, module, *FEDAVG, num_ranks=3)
    assert done.stderr.count("interrupted (Ctrl-C)") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 130, done.stderr
    assert under_open_mpi() or done.stderr.count("\n") == 1, "Open MPI's launcher adds a page of its own"


@pytest.mark.slow
def test_one_rank_that_leaves_early_does_not_leave_the_others_in_mpi_init(tmp_path: Path) -> None:
    """The others wait in MPI_Init, where no Python runs."""
    if under_open_mpi():
        pytest.skip("its launcher ends the job when it gets the signal itself")
    (tmp_path / "sitecustomize.py").write_text(PRESS)
    environ = clean_environment({"PYTHONPATH": str(tmp_path), "FEDMPI_DATA": str(tmp_path)})
    command = [mpiexec(), "-n", "1", "-env", "FEDMPI_TEST_AT", "mpi4py.MPI", sys.executable, "-m", *FEDAVG]
    command += [":", "-n", "2", "-env", "FEDMPI_TEST_AT", "none", sys.executable, "-m", *FEDAVG]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 130, done.stderr
    assert done.stderr == LINE
