"""Files where a split or a manifest should be, and are not: one line each, at once, whatever they are."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedmpi.config import RunConfig
from fedmpi.data.datasets import load_dataset
from fedmpi.data.job_split import resolve_partition
from fedmpi.data.split_file import load_dict, manifest_path, read_manifest, save_dict
from fedmpi.errors import PartitionError

MANIFEST = {
    "version": 1, "dataset": "mnist", "dataset_sha256": "d" * 64, "num_samples": 60000, "num_clients": 100,
    "partition": "iid", "parameters": {}, "seed": 0, "sha256": "p" * 64,
}  # fmt: skip


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"\x80\x04}B\x00\x00\x00\xf0")
        file.truncate(200 * 10**9)


def put_holes(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"\x80\x04}B\x00\x00\x00\x04")
        file.truncate(2**26)


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


ODD = {
    "folder": (Path.mkdir, "Is a directory"),
    "pipe": (put_fifo, "it is no regular file"),
    "device": (put_device, "it is no regular file"),
    "sparse": (put_sparse, "it has (200000000000 bytes, at most|holes)"),
    "holes": (put_holes, "it has (67108864 bytes, at most|holes)"),
    "link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_no_file_is_refused_at_once(case: str, tmp_path: Path) -> None:
    put, reason = ODD[case]
    put(tmp_path / "a.pkl")
    put(manifest_path(tmp_path / "b.pkl"))
    start = time.monotonic()
    with pytest.raises(PartitionError, match=rf"^\S+a\.pkl cannot be read: {reason}"):
        load_dict(tmp_path / "a.pkl")
    with pytest.raises(PartitionError, match=rf"^\S+json is no manifest: .*{reason}"):
        read_manifest(tmp_path / "b.pkl")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 2000 + "]" * 2000, "is no manifest: "),
        ('{"version": ' + "[" * 100_000, "is no manifest: "),
        ("9" * 5000, "is no manifest: "),
        ("9" * 2 * 10**6, "is no manifest: .*at most 1048576 are read"),
        ('{"version": NaN}', "has version nan, this program knows version 1"),
        ('{"version": 1e999}', "has version inf"),
        ('{"version": ' + "9" * 4000 + "}", "has version an integer of"),
        ('{"version": 2, "more": 1}', "has version 2, this program knows version 1"),
        ('{"version": true}', "has version True"),
        ('{"version": 1}', "is no manifest: dataset must be of type str, found nothing"),
        (json.dumps({**MANIFEST, "dataset": 7}), "dataset must be of type str, found 7"),
        (json.dumps({**MANIFEST, "seed": 0.5}), "seed must be of type int, found 0.5"),
        (json.dumps({**MANIFEST, "num_clients": None}), "num_clients must be of type int, found None"),
        (json.dumps({**MANIFEST, "\x1b[31m" * 999: 1}), r"unknown fields \[\\x1b"),
        (
            json.dumps({**MANIFEST, "dataset_sha256": [["x"] * 9999]}),
            r"dataset_sha256 must be of type str, found \[a list\]",
        ),
        ("null", "it holds no version"),
        ("\xff", "is no manifest: "),
    ],
    ids=lambda text: text[:12] if isinstance(text, str) else None,
)
def test_crafted_manifests_are_one_line(text: str, reason: str, tmp_path: Path) -> None:
    manifest_path(tmp_path / "a.pkl").write_text(text, encoding="latin-1")
    with pytest.raises(PartitionError, match=reason) as caught:
        read_manifest(tmp_path / "a.pkl")
    assert str(caught.value).isprintable()
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 300


def test_text_of_a_manifest_is_told_in_one_printable_line(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    save_dict({0: np.arange(2000)}, path)
    manifest_path(path).write_text(
        json.dumps({**MANIFEST, "dataset": "\x1b[31m\n" * 99, "dataset_sha256": "\x07" * 64})
    )
    config = RunConfig(dataset="synthetic", num_clients=1, partition_file=str(path))
    with pytest.raises(PartitionError, match="was made for") as caught:
        resolve_partition(config, load_dataset("synthetic"))
    assert str(caught.value).isprintable()


@pytest.fixture
def private(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not enter."""
    folder = tmp_path / "private"
    folder.mkdir()
    save_dict({0: np.arange(2000)}, folder / "a.pkl")
    folder.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)


def test_a_split_in_a_private_folder(private: Path) -> None:
    with pytest.raises(PartitionError, match=r"a\.pkl cannot be read: Permission denied$"):
        load_dict(private / "a.pkl")
    config = RunConfig(dataset="synthetic", num_clients=1, partition_file=str(private / "a.pkl"))
    with pytest.raises(PartitionError, match=r"^--partition-file \S+a\.pkl cannot be read: Permission denied$"):
        resolve_partition(config, load_dataset("synthetic"))


def test_a_data_folder_that_is_private(private: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = RunConfig(dataset="synthetic", num_clients=4)
    index, _, file = resolve_partition(config, load_dataset("synthetic"), private / "data")
    assert (index.num_clients, file) == (4, None)
    assert len(caplog.records) == 1
    assert caplog.records[0].message.endswith("the split is kept in memory only")


def test_a_data_folder_that_others_may_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A split of that name may be anybody's: it is computed instead."""
    dataset, config = load_dataset("synthetic"), RunConfig(dataset="synthetic", num_clients=4)
    wanted, sha256, path = resolve_partition(config, dataset, tmp_path / "data")
    assert path is not None
    planted = np.roll(wanted.indices, 1)
    save_dict({client: planted[500 * client : 500 * client + 500] for client in range(4)}, path)
    (tmp_path / "data").chmod(0o777)
    assert resolve_partition(config, dataset, tmp_path / "data")[1:] == (sha256, None)
    said = f"others may write to {tmp_path / 'data'}: the split is kept in memory only"
    assert [record.message for record in caplog.records] == [said]
