"""The data sets that need no files, and what `load_dataset` refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from fedmpi.config import DataConfig
from fedmpi.data import datasets
from fedmpi.data.datasets import DATASETS, Arrays, DatasetEntry, Split, load_dataset
from fedmpi.errors import DataError


def test_every_choice_of_the_option_is_there() -> None:
    assert get_args(get_type_hints(DataConfig)["dataset"]) == tuple(DATASETS)


@pytest.mark.parametrize(
    ("name", "shape", "sizes"), [("digits", (1, 8, 8), (1437, 360)), ("synthetic", (1, 28, 28), (2000, 500))]
)
def test_data_sets_without_files(name: str, shape: tuple[int, ...], sizes: tuple[int, int], tmp_path: Path) -> None:
    data = load_dataset(name, tmp_path / "none")
    again = load_dataset(name)
    assert data.input_shape == shape
    assert (len(data.train), len(data.test)) == sizes
    assert data.train.x.dtype == np.uint8
    assert data.train.y.dtype == np.int64
    assert data.num_classes == 10
    assert set(data.train.y) == set(data.test.y) == set(range(10))
    assert data.sha256 == again.sha256
    assert np.array_equal(data.train.x, again.train.x)
    pixels = data.train.x / 255
    assert pixels.mean() == pytest.approx(data.mean[0], abs=1e-4)
    assert pixels.std() == pytest.approx(data.std[0], abs=1e-4)
    assert np.bincount(data.test.y).min() >= 0.7 * len(data.test) / 10
    assert not (tmp_path / "none").exists()


def test_digits_are_split_by_class() -> None:
    counts = np.bincount(load_dataset("digits").test.y)
    assert counts.min() >= 34
    assert counts.max() <= 38


def test_synthetic_can_be_learned_but_not_by_the_class_means() -> None:
    data = load_dataset("synthetic")
    train, test = (split.x.reshape(len(split), -1) / 255 for split in (data.train, data.test))
    targets = np.eye(10)[data.train.y]
    weights = np.linalg.solve(train.T @ train + 300 * np.eye(784), train.T @ (targets - 0.1))
    linear = np.mean((test @ weights).argmax(1) == data.test.y)
    assert 0.6 < linear < 0.95


def test_unknown_and_absent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--dataset must be one of mnist, .*, got svhn"):
        load_dataset("svhn")
    with pytest.raises(DataError, match=r"mnist is not in .*: python -m fedmpi.data.prepare --dataset mnist brings"):
        load_dataset("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        load_dataset("digits")


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 1, 2], "labels must be in"), ([0, -1], "labels must be in"), ([0], "but 1 labels")]
)
def test_labels_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, labels: list[int], message: str) -> None:
    split = Split(np.zeros((max(2, len(labels)), 1, 2, 2), np.uint8), np.array(labels, np.int64))
    entry = DatasetEntry(lambda _: Arrays(split, split, "0"), 2, (0.5,), (0.5,))
    monkeypatch.setitem(datasets.DATASETS, "odd", entry)
    with pytest.raises(DataError, match=message):
        load_dataset("odd")


def test_neither_torch_nor_mpi() -> None:
    code = (
        "import sys, fedmpi.data.prepare as p; p.load_dataset('synthetic');"
        "sys.exit(any(m in sys.modules for m in ('torch', 'torchvision', 'mpi4py', 'sklearn')))"
    )
    root = str(Path(datasets.__file__).parents[2])
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root}, timeout=60, check=False).returncode == 0
    )
