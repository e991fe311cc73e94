"""The data sets, opened: uint8 images in memory-mapped files (one copy per machine), int64 labels in memory.

Letters: N samples, C channels, H rows, W columns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmpi.data.install import locate
from fedmpi.errors import DataError
from fedmpi.lifecycle.files import os_errors


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Samples: `x` (N, C, H, W) uint8, memory-mapped where it comes from a file; `y` (N,) int64 in [0, num_classes)."""

    x: NDArray[np.uint8]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set. A model sees `(x / 255 - mean) / std`, `mean` and `std` per channel.

    `sha256` identifies the content: equal on every machine, different for other data. `classes` are the names of the
    labels.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str
    classes: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample, (C, H, W)."""
        return tuple(self.train.x.shape[1:])


class Arrays(NamedTuple):
    """The two splits and the identity of their content."""

    train: Split
    test: Split
    sha256: str


@dataclasses.dataclass(frozen=True)
class DatasetEntry:
    """An entry of `DATASETS`. `load` gets the folder of all data sets; it starts no process and writes nothing."""

    load: Callable[[str | Path | None], Arrays]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()


def load_dataset(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Open what `fedmpi.data.install.install` made. Safe after MPI has started.

    Args:
        name: a key of `DATASETS`.
        data_dir: the folder of all data sets; None: the default.

    Raises:
        DataError: unknown name, or files that are missing or not of the format.
    """
    if name not in DATASETS:
        raise DataError(f"--dataset must be one of {', '.join(DATASETS)}, got {name}")
    entry = DATASETS[name]
    arrays = entry.load(data_dir)
    for split in (arrays.train, arrays.test):
        if len(split.x) != len(split.y) or len(split.y) == 0:
            raise DataError(f"{name}: {len(split.x)} samples but {len(split.y)} labels")
        if split.y.min() < 0 or split.y.max() >= entry.num_classes:
            found = f"{split.y.min()}..{split.y.max()}"
            raise DataError(f"{name}: labels must be in [0, {entry.num_classes}), found {found}")
    train, test, sha256 = arrays
    return Dataset(name, train, test, entry.num_classes, entry.mean, entry.std, sha256, entry.classes)


def load_idx(name: str, dims: int, data_dir: str | Path | None) -> Arrays:
    """The four idx files of `name`; images of `dims` dimensions (3: N, H, W; 4: N, C, H, W)."""
    folder, sums = locate(name, data_dir)
    splits = []
    for split in ("train", "t10k"):
        x = read_idx(folder / f"{split}-images-idx{dims}-ubyte", dims)
        y = read_idx(folder / f"{split}-labels-idx1-ubyte", 1)
        splits.append(Split(x if dims == 4 else x[:, None], y.astype(np.int64)))
    return Arrays(splits[0], splits[1], hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest())


def read_idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """An idx file of uint8 as a read-only memory map.

    Raises:
        DataError: it is no idx file of `dims` dimensions, or longer or shorter than it says.
    """
    header_bytes = 4 + 4 * dims
    with os_errors(DataError, f"{path} cannot be read"), path.open("rb") as file:
        header, size_bytes = file.read(header_bytes), os.fstat(file.fileno()).st_size
    if header[:4] != bytes([0, 0, 8, dims]) or len(header) < header_bytes:
        raise DataError(f"{path} is no idx file of {dims} dimensions of uint8: it begins with {header[:4].hex()}")
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
    if header_bytes + int(np.prod(shape, dtype=object)) != size_bytes:
        raise DataError(f"{path} has {size_bytes} bytes, which is not what {shape} needs")
    if 0 in shape:
        return np.empty(shape, np.uint8)
    return np.memmap(path, np.uint8, "r", offset=header_bytes, shape=shape)


def _digits(data_dir: str | Path | None) -> Arrays:
    """scikit-learn's 1797 handwritten digits of 8 x 8, 0..16 scaled to 0..255; every fifth of a class is test."""
    try:
        from sklearn.datasets import load_digits  # here: only this data set needs it
    except ImportError as error:
        raise DataError("--dataset digits comes with scikit-learn: pip install scikit-learn") from error
    bunch: Any = load_digits()
    x = (bunch.images.astype(np.int64) * 255 // 16).astype(np.uint8)[:, None]
    y = bunch.target.astype(np.int64)
    by_class = np.argsort(y, kind="stable")
    is_test = np.arange(len(y)) % 5 == 0
    return _in_memory(x, y, np.sort(by_class[~is_test]), np.sort(by_class[is_test]))


def _synthetic(data_dir: str | Path | None) -> Arrays:
    """2500 images of 28 x 28: ten blurred patterns, each moved by up to 3 pixels, dimmed, under Gaussian noise."""
    rng = np.random.default_rng(20170217)
    num_samples = 2500
    patterns = np.kron(rng.standard_normal((10, 7, 7)), np.ones((4, 4)))  # (10, 28, 28)
    y = rng.permutation(np.arange(num_samples, dtype=np.int64) % 10)
    shifts = rng.integers(-3, 4, (num_samples, 2))
    contrast = rng.uniform(0.4, 1.0, num_samples)
    x = np.empty((num_samples, 1, 28, 28), np.uint8)
    for i in range(num_samples):
        moved = np.roll(patterns[y[i]], tuple(shifts[i]), axis=(0, 1))
        noisy = 128 + 32 * contrast[i] * moved + 64 * rng.standard_normal((28, 28))
        x[i, 0] = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    return _in_memory(x, y, np.arange(2000), np.arange(2000, num_samples))


def _in_memory(x: NDArray[np.uint8], y: NDArray[np.int64], train: NDArray[Any], test: NDArray[Any]) -> Arrays:
    digest = hashlib.sha256()
    for part in (x[train], x[test], y[train], y[test]):
        digest.update(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).tobytes())
    return Arrays(Split(x[train], y[train]), Split(x[test], y[test]), digest.hexdigest())


_DIGITS = tuple("0123456789")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

DATASETS: dict[str, DatasetEntry] = {
    "mnist": DatasetEntry(partial(load_idx, "mnist", 3), 10, (0.1307,), (0.3081,), _DIGITS),
    "fashion-mnist": DatasetEntry(partial(load_idx, "fashion-mnist", 3), 10, (0.2860,), (0.3530,), _FASHION),
    "cifar10": DatasetEntry(
        partial(load_idx, "cifar10", 4), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), _CIFAR10
    ),
    "digits": DatasetEntry(_digits, 10, (0.3049,), (0.3761,), _DIGITS),
    "synthetic": DatasetEntry(_synthetic, 10, (0.4988,), (0.2529,), _DIGITS),
}
"""Adding a data set: one loader, one entry; if it lies in files, one entry in `fedmpi.data.raw_sets.RAW_SETS` too."""
