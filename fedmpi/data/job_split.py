"""The split of a job: the file that the user names, or the one in the data folder, made there once if need be."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path

from fedmpi.config import DataConfig, RunConfig, data_flags
from fedmpi.data.datasets import Dataset
from fedmpi.data.install import data_root, expanded
from fedmpi.data.partitioners import make_partition, partition_parameters
from fedmpi.data.split import PartitionIndex, check_partition, map_split, write_map
from fedmpi.data.split_file import Manifest, manifest_path, parse_dict, read_manifest, read_pickle, write_partition
from fedmpi.data.trust import exists, exposed, writable
from fedmpi.errors import FilesystemError, PartitionError, shown
from fedmpi.lifecycle.files import os_errors, remove_temps
from fedmpi.lifecycle.lock import FileLock

LARGE_BYTES = 2**20
"""Smaller pickles are read and sent to the ranks: that is quicker than a mapped file."""

logger = logging.getLogger(__name__)


def read_checked(
    path: Path, root: Path, num_samples: int, num_clients: int, large_bytes: int = LARGE_BYTES
) -> PartitionIndex:
    """The split in a pickle, if it fits (see `check_partition`); mapped below `root` from `large_bytes` on.

    Raises:
        PartitionError: no such file, damaged, or it does not fit.
    """
    data = read_pickle(path)  # once: between two looks somebody may put another file there
    copy = root / "mapped-splits" / f"{hashlib.sha256(data).hexdigest()}.split"
    mapped = map_split(copy) if len(data) >= large_bytes else None
    index = check_partition(mapped or parse_dict(data, path), num_samples, num_clients, str(path))
    if mapped is not None or len(data) < large_bytes:
        return index
    return write_map(index, copy) or index


def resolve_partition(
    config: RunConfig, dataset: Dataset, data_dir: str | Path | None = None, large_bytes: int = LARGE_BYTES
) -> tuple[PartitionIndex, str, Path | None]:
    """The split `config` asks for; on one rank. Starts no process, so it may run after MPI has started.

    It is `partition_file`, or the file in the data folder, made if it is not there.

    Returns:
        The split, its SHA-256, and its file; None if the data folder cannot be written and the split is in memory only.

    Raises:
        FedmpiError: the user's file is missing, damaged or for something else, or the split cannot exist.
    """
    splits = SplitFiles(config, dataset, data_root(data_dir), large_bytes)
    if config.partition_file is not None:
        path = expanded(config.partition_file, "--partition-file")
        index = splits.read_given(path)
        return index, index.sha256(), path
    index, kept, problem = splits.default()
    if kept is None:
        logger.warning("%s: the split is kept in memory only", problem)
    return index, index.sha256(), kept


def partition_name(config: DataConfig) -> str:
    """The file name of a split: all that decides it, so that no two splits share one."""
    parameters = [f"{name}={value!r}" for name, value in partition_parameters(config).items()]
    decides = [f"clients={config.num_clients}", f"seed={config.partition_seed}"]
    return "-".join([config.dataset, config.partition, *parameters, *decides]) + ".pkl"


@dataclasses.dataclass(frozen=True)
class SplitFiles:
    """The files of the splits that fit `config` and `dataset`; `root` is the folder of all data sets."""

    config: DataConfig
    dataset: Dataset
    root: Path
    large_bytes: int = LARGE_BYTES

    def make(self) -> tuple[PartitionIndex, Manifest]:
        """The split that `config` asks for, computed, and its manifest; errors as in `make_partition`."""
        index = PartitionIndex.from_dict(make_partition(self.config, self.dataset.train.y))
        return index, Manifest.of(index, self.dataset, self.config)

    def read(self, path: Path) -> PartitionIndex:
        """The split in `path`; see `read_checked`."""
        return read_checked(path, self.root, len(self.dataset.train), self.config.num_clients, self.large_bytes)

    def read_made(self, path: Path) -> tuple[PartitionIndex | None, str]:
        """The split in `path` if it is the one that `config` makes; else None and what is wrong ("": no file)."""
        try:
            with os_errors(PartitionError, f"{path} cannot be read"):
                if not exists(path):
                    return None, ""
            manifest = read_manifest(path)
            if manifest is None:
                return None, f"{path} has no manifest"
            index = self.read(path)
        except PartitionError as error:
            return None, str(error)
        if manifest != Manifest.of(index, self.dataset, self.config):
            return None, f"{path} is not what its manifest says, or was made of other data"
        return index, ""

    def read_given(self, path: Path) -> PartitionIndex:
        """The split in `path`, which the user names (`--partition-file`), if it was made for this data set."""
        with os_errors(PartitionError, f"--partition-file {path} cannot be read"):
            found = exists(path)
        if not found:
            raise PartitionError(
                f"--partition-file {path}: no such file; this makes a split with these settings: "
                f"python -m fedmpi.data.prepare {data_flags(self.config)} --out {path.parent}"
            )
        manifest, dataset = read_manifest(path), self.dataset
        if manifest is None:
            logger.warning("%s has no manifest: whether it was made for %s cannot be checked", path, dataset.name)
        elif manifest.dataset_sha256 != dataset.sha256:
            raise PartitionError(
                f"{path} was made for {shown(manifest.dataset)} (hash {shown(manifest.dataset_sha256[:8])}), "
                f"the data is {dataset.name} (hash {dataset.sha256[:8]})"
            )
        index = self.read(path)
        if manifest is not None and manifest.sha256 != index.sha256():
            raise PartitionError(
                f"{path} is not the split of its manifest (hash {index.sha256()[:8]}, wanted "
                f"{shown(manifest.sha256[:8])}): make it again, or remove {manifest_path(path).name} to use it as it is"
            )
        return index

    def write(
        self, path: Path, split: PartitionIndex, manifest: Manifest, replace: bool
    ) -> tuple[PartitionIndex | None, str]:
        """Write what `make` returned to `path`, under a lock, unless it is there; as `read_made` afterwards.

        Another file in that place is replaced if `replace`.
        """
        with FileLock(path.with_name(f".{path.name}.lock"), what=str(path)):
            remove_temps(path.parent, path.name)
            index, problem = self.read_made(path)
            if index is None and (replace or not problem):
                if problem:
                    logger.warning("%s: made again", problem)
                write_partition(path, split, manifest)
                return split, ""
        return index, problem

    def default(self) -> tuple[PartitionIndex, Path | None, str]:
        """The split in the data folder, made there if it is missing or damaged; its file; and "".

        Where the folder cannot be written, or others may write to it, so that a file of that name proves nothing: the
        split, None, and the reason.
        """
        path = self.root / self.config.dataset / "partitions" / partition_name(self.config)
        problem = exposed(path) or exposed(manifest_path(path))
        if not problem:
            index, _ = self.read_made(path)
            if index is not None:
                return index, path, ""
            problem = "" if writable(path.parent) else f"{path.parent} cannot be written"
        split, manifest = self.make()  # before the lock: what is refused leaves nothing behind
        if problem:
            return split, None, problem
        try:
            path.parent.mkdir(0o755, parents=True, exist_ok=True)
            self.write(path, split, manifest, replace=True)
        except FilesystemError as error:
            return split, None, str(error)
        except OSError as error:
            return split, None, f"{error.filename or path} cannot be made: {error.strerror}"
        return split, path, ""
