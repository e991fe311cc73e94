"""CIFAR-10's official format: pickled batches in a tar.gz, decoded into idx files like MNIST's.

Letters: N samples; an image is 3 x 32 x 32 (channel, row, column), uint8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpi.data.archive import ArchiveError, members
from fedmpi.data.fetch import SourceError
from fedmpi.data.pickles import IntArray, RefusedError, load_plain
from fedmpi.data.reading import MAX_DATA_BYTES, is_folder, is_regular, read_regular
from fedmpi.errors import shown

ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
IMAGE_SHAPE = (3, 32, 32)
BATCHES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""MD5 of each batch, as published (and as torchvision pins them)."""


def decode(folder: Path, out: Path, batches: Mapping[str, str] = BATCHES) -> None:
    """Write the four idx files into `out` if `folder` holds the archive or its unpacked folder.

    Args:
        folder: where the archive, or `cifar-10-batches-py`, may be.
        out: an existing folder.
        batches: name -> MD5 of the batches; the one named `test_batch` is the test data.

    Raises:
        SourceError: neither is there, or a batch is missing or damaged.
    """
    raw = _read_batches(folder, batches)
    parts: dict[str, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]] = {"train": [], "t10k": []}
    for name, data in raw.items():
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
    try:
        if is_folder(folder / FOLDER):
            return {name: read_regular(folder / FOLDER / name, MAX_DATA_BYTES) for name in batches}
        wanted = {f"{FOLDER}/{name}": name for name in batches}
        found = {wanted[path]: content for path, content in members(folder / ARCHIVE, wanted)}
    except FileNotFoundError as error:
        missing = next((name for name in batches if not is_regular(folder / FOLDER / name)), "")
        raise SourceError(f"no {FOLDER}/{missing}" if is_folder(folder / FOLDER) else f"no {ARCHIVE}") from error
    except OSError as error:
        raise SourceError(f"{FOLDER} cannot be read ({error.strerror})") from error
    except ArchiveError as error:
        raise SourceError(f"{ARCHIVE} is damaged ({error})") from error
    missing = ", ".join(name for name in batches if name not in found)
    if missing:
        raise SourceError(f"{ARCHIVE} holds no {missing}")
    return {name: found[name] for name in batches}


def _decode_batch(name: str, data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    try:
        batch: Any = load_plain(data)
        pixels, labels = batch["data"], batch["labels"]
        if type(batch) is not dict or type(pixels) is not IntArray or pixels.dtype != np.uint8:
            raise SourceError(f"{name} holds no uint8 pixels")
        images = pixels.array.reshape(-1, *IMAGE_SHAPE)
        return images, np.array(labels, np.uint8).reshape(len(images))
    except (RefusedError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise SourceError(f"{name} is no CIFAR-10 batch ({shown(str(error))})") from error
