"""`python -m fedmpi.data.prepare`: what it prints, writes, reuses and refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fedmpi
from fedmpi.config import RunConfig
from fedmpi.data import job_split, prepare
from fedmpi.data.datasets import load_dataset
from fedmpi.data.job_split import resolve_partition
from fedmpi.data.partitioners import random_slicing
from fedmpi.data.split_file import load_dict, save_dict

ROOT = str(Path(fedmpi.__file__).parents[1])
ARGS = ["--dataset", "synthetic", "--num-clients", "7"]


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDMPI_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_by_default_jobs_find_it(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(ARGS) == 0
    out = capsys.readouterr().out
    path = data_dir / "synthetic" / "partitions" / "synthetic-iid-clients=7-seed=0.pkl"
    assert f"file    {path}\n" in out
    assert "7 clients, 285 / 286 / 286 samples (min / median / max)" in out
    assert "option  nothing: jobs with these settings find it" in out
    config = RunConfig(dataset="synthetic", num_clients=7)
    assert resolve_partition(config, load_dataset("synthetic"))[2] == path


def test_into_a_folder_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*ARGS, "--out", str(tmp_path / "a" / "b")]
    assert prepare.main(args) == 0
    out = capsys.readouterr().out
    path = tmp_path / "a" / "b" / "synthetic-iid-clients=7-seed=0.pkl"
    assert out.endswith(f"option  --partition-file {path}\n")
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert prepare.main(args) == 0
    assert capsys.readouterr().out == out
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    config = RunConfig(dataset="synthetic", num_clients=7, partition_file=str(path))
    assert resolve_partition(config, load_dataset("synthetic"))[2] == path
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.manifest.json"]


def test_two_alphas_are_two_splits(tmp_path: Path) -> None:
    for alpha in ("0.1", "100"):
        assert prepare.main([*ARGS, "--partition", "dirichlet", "--alpha", alpha, "--out", str(tmp_path)]) == 0
    first, second = (load_dict(path) for path in sorted(tmp_path.glob("*.pkl")))
    assert first[0].tolist() != second[0].tolist()


def test_another_split_under_the_name_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "synthetic-iid-clients=7-seed=0.pkl"
    save_dict(random_slicing(load_dataset("synthetic"), 7, 3), path)
    before = path.read_bytes()
    assert prepare.main([*ARGS, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"error: {path} is there already and is another split" in error
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--alpha", "0.1"], "error: --alpha belongs to --partition dirichlet, but the split is --partition iid"),
        (["--num-clients", "2001"], "error: 2000 samples cannot give 2001 clients one each: "
         "--num-clients must be in [1, 2000]"),
        (["--num-clients", "0"], "error: --num-clients must be an integer in [1, inf), got 0"),
        (["--rounds", "3"], "error: unknown option --rounds 3; --help lists them"),
        (["--out", "/dev/null/x"], "error: --out /dev/null/x cannot be made: Not a directory"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main([*ARGS, *args]) == 2
    captured = capsys.readouterr()
    assert captured.err == message + "\n"
    assert captured.out == ""


def test_a_data_folder_that_cannot_be_written(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_split, "writable", lambda folder: False)
    assert prepare.main(ARGS) == 2
    folder = data_dir / "synthetic" / "partitions"
    assert capsys.readouterr().err == f"error: {folder} cannot be written: give a folder with --out\n"


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "install", interrupted)
    assert prepare.main(ARGS) == 130
    assert capsys.readouterr().err == "interrupted: what was complete is kept, run it again to go on\n"


def test_as_a_program(data_dir: Path) -> None:
    command = [sys.executable, "-m", "fedmpi.data.prepare", *ARGS]
    env = {"PYTHONPATH": ROOT, "FEDMPI_DATA": str(data_dir)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 4
    bad = subprocess.run([*command, "--alpha", "1"], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: --alpha belongs to")
