"""The split of a job: the file the user names, or the one in the data folder, made there once if need be."""

from __future__ import annotations

import logging
from pathlib import Path

from fedmpi.config import DataConfig, RunConfig, data_flags
from fedmpi.data.datasets import Dataset
from fedmpi.data.partition import make_partition, partition_parameters
from fedmpi.data.partition_index import PartitionIndex, check_partition, partition_sha256
from fedmpi.data.partition_map import read_checked
from fedmpi.data.partition_pickle import Manifest, load_dict, manifest_path, read_manifest, save_dict, write_partition
from fedmpi.data.reading import exists
from fedmpi.data.sources import data_root, expanded, writable
from fedmpi.data.trust import exposed
from fedmpi.errors import FilesystemError, PartitionError, shown
from fedmpi.lifecycle.files import remove_temps
from fedmpi.lifecycle.lock import FileLock

__all__ = [
    "PartitionIndex",
    "check_partition",
    "default_partition",
    "load_dict",
    "new_partition",
    "partition_name",
    "partition_sha256",
    "read_partition",
    "resolve_partition",
    "save_dict",
]

logger = logging.getLogger(__name__)


def resolve_partition(
    config: RunConfig, dataset: Dataset, data_dir: str | Path | None = None
) -> tuple[PartitionIndex, str, Path | None]:
    """The split `config` asks for; on one rank. Starts no process, so it may run after MPI has started.

    Args:
        config: with `partition_file`: that file. Without: the file in the data folder, made if it is not there.
        dataset: the data the split is of.
        data_dir: the folder of all data sets; None: the default.

    Returns:
        The split, its SHA-256, and its file; None if the data folder cannot be written and the split is in memory only.

    Raises:
        ConfigError: an option the partitioner does not have.
        PartitionError: the file is missing, damaged or for something else, or the split cannot exist.
    """
    if config.partition_file is not None:
        path = expanded(config.partition_file, "--partition-file")
        index = _users_file(path, config, dataset)
        return index, index.sha256(), path
    index, kept, problem = default_partition(config, dataset, data_dir)
    if kept is None:
        logger.warning("%s: the split is kept in memory only", problem)
    return index, index.sha256(), kept


def partition_name(config: DataConfig) -> str:
    """The file name of a split: all that decides it, so that no two splits share one."""
    parameters = [f"{name}={value!r}" for name, value in partition_parameters(config).items()]
    parts = [
        config.dataset,
        config.partition,
        *parameters,
        f"clients={config.num_clients}",
        f"seed={config.partition_seed}",
    ]
    return "-".join(parts) + ".pkl"


def default_partition(
    config: DataConfig, dataset: Dataset, data_dir: str | Path | None
) -> tuple[PartitionIndex, Path | None, str]:
    """The split in the data folder, made there if it is missing or damaged.

    Returns:
        The split, its file, and "". Where the folder cannot be written, or others may write to it, so that a file of
        that name proves nothing: the split, None, and why.
    """
    path = data_root(data_dir) / config.dataset / "partitions" / partition_name(config)
    problem = exposed(path) or exposed(manifest_path(path))
    if problem:
        made, _ = new_partition(config, dataset)
        return made, None, problem
    index, problem = read_partition(path, config, dataset)
    if index is not None:
        return index, path, ""
    if not writable(path.parent):
        made, _ = new_partition(config, dataset)
        return made, None, f"{path.parent} cannot be written"
    made, manifest = new_partition(config, dataset)  # before the lock: what is refused leaves nothing behind
    try:
        path.parent.mkdir(0o755, parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), what=str(path)):
            remove_temps(path.parent, path.name)
            index, problem = read_partition(path, config, dataset)
            if index is None:
                if problem:
                    logger.warning("%s: made again", problem)
                write_partition(path, made, manifest)
    except FilesystemError as error:
        return made, None, str(error)
    except OSError as error:
        return made, None, f"{error.filename or path} cannot be made: {error.strerror}"
    return made, path, ""


def new_partition(config: DataConfig, dataset: Dataset) -> tuple[PartitionIndex, Manifest]:
    """The split `config` asks for, computed, and its manifest.

    Raises:
        ConfigError: an option the partitioner does not have.
        PartitionError: the split cannot exist.
    """
    index = PartitionIndex.from_dict(make_partition(config, dataset.train.y))
    return index, Manifest.of(index, dataset, config)


def read_partition(path: Path, config: DataConfig, dataset: Dataset) -> tuple[PartitionIndex | None, str]:
    """The split in `path` if it is the one `config` makes of `dataset`; else None and what is wrong ("": no file)."""
    try:
        if not exists(path):
            return None, ""
    except OSError as error:
        return None, f"{path} cannot be read: {error.strerror}"
    try:
        manifest = read_manifest(path)
        if manifest is None:
            return None, f"{path} has no manifest"
        index = read_checked(path, data_root(config.data_dir), len(dataset.train), config.num_clients)
    except PartitionError as error:
        return None, str(error)
    if manifest != Manifest.of(index, dataset, config):
        return None, f"{path} is not what its manifest says, or was made of other data"
    return index, ""


def _users_file(path: Path, config: RunConfig, dataset: Dataset) -> PartitionIndex:
    try:
        found = exists(path)
    except OSError as error:
        raise PartitionError(f"--partition-file {path} cannot be read: {error.strerror}") from error
    if not found:
        raise PartitionError(
            f"--partition-file {path}: no such file; this makes a split with these settings: "
            f"python -m fedmpi.data.prepare {data_flags(config)} --out {path.parent}"
        )
    manifest = read_manifest(path)
    if manifest is None:
        logger.warning("%s has no manifest: whether it was made for %s cannot be checked", path, dataset.name)
    elif manifest.dataset_sha256 != dataset.sha256:
        raise PartitionError(
            f"{path} was made for {shown(manifest.dataset)} (hash {shown(manifest.dataset_sha256[:8])}), "
            f"the data is {dataset.name} (hash {dataset.sha256[:8]})"
        )
    index = read_checked(path, data_root(config.data_dir), len(dataset.train), config.num_clients)
    if manifest is not None and manifest.sha256 != index.sha256():
        raise PartitionError(
            f"{path} is not the split of its manifest (hash {index.sha256()[:8]}, wanted "
            f"{shown(manifest.sha256[:8])}): make it again, or remove {manifest_path(path).name} to use it as it is"
        )
    return index
