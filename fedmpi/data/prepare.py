"""`python -m fedmpi.data.prepare`: fetch a data set and write a split of it; needs neither MPI nor torch.

For a login node that has the network the compute nodes lack, and for splits one wants to keep or hand on.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmpi import interrupt
from fedmpi.config import DataConfig
from fedmpi.data.datasets import Dataset, load_dataset
from fedmpi.data.partition import check_partition_options
from fedmpi.data.partition_file import default_partition, new_partition, partition_name, read_partition
from fedmpi.data.partition_index import PartitionIndex
from fedmpi.data.partition_map import read_checked
from fedmpi.data.partition_pickle import manifest_path, write_partition
from fedmpi.data.sources import data_root, expanded, obtain
from fedmpi.errors import EXIT_DONE, EXIT_INTERRUPTED, FedmpiError, FilesystemError, PartitionError
from fedmpi.lifecycle.files import remove_temps
from fedmpi.lifecycle.lock import FileLock
from fedmpi.logs import Stream
from fedmpi.mpi import streams
from fedmpi.options import option, parse

PROG = "python -m fedmpi.data.prepare"


@dataclasses.dataclass(frozen=True)
class PrepareConfig(DataConfig):
    """The options of this program."""

    out: str | None = option(
        None,
        "folder for the split (default: where a job with these settings looks for it)",
        "Output",
        result=False,
        path=True,
    )


def prepare(config: PrepareConfig) -> str:
    """Obtain the data, make or reuse the split; what was done, as text for the user.

    Raises:
        FedmpiError: no data, an impossible split, a folder that cannot be written, or a file that is in the way.
    """
    check_partition_options(config)
    folder = obtain(config.dataset, config.data_dir)
    dataset = load_dataset(config.dataset, config.data_dir)
    flag = ""
    if config.out is None:
        index, path, problem = default_partition(config, dataset, config.data_dir)
        if path is None:
            raise FilesystemError(f"{problem}: give a folder with --out")
        flag = "nothing: jobs with these settings find it"
    else:
        path = expanded(config.out, "--out") / partition_name(config)
        index = _write_once(path, config, dataset)
        flag = f"--partition-file {path}"
    read_checked(path, data_root(config.data_dir), len(dataset.train), config.num_clients)  # maps a large one for jobs
    sizes = index.sizes
    lines = [
        f"data    {config.dataset}: {len(dataset.train)} training and {len(dataset.test)} test samples"
        + (f" in {folder}" if folder.is_dir() else ""),
        f"split   {config.partition}: {len(sizes)} clients, {sizes.min()} / {np.median(sizes):g} / {sizes.max()} "
        f"samples (min / median / max), hash {index.sha256()[:16]}",
        f"file    {path}",
        f"option  {flag}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the program; its exit code."""
    streams.reserve()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Stream(sys.stderr)])
    try:
        with interrupt.Raising():
            text = prepare(parse(PrepareConfig, argv, PROG, "Fetch a data set and write how it is split over clients."))
    except FedmpiError as error:
        streams.show(sys.stderr, f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        streams.show(sys.stderr, "interrupted: what was complete is kept, run it again to go on\n")
        return EXIT_INTERRUPTED
    streams.show(sys.stdout, text + "\n")
    return EXIT_DONE


def _write_once(path: Path, config: PrepareConfig, dataset: Dataset) -> PartitionIndex:
    """Write the split to `path`; a file that is there already must be that very split."""
    made, manifest = new_partition(config, dataset)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FilesystemError(f"--out {path.parent} cannot be made: {error.strerror}") from error
    found, problem = read_partition(path, config, dataset)
    if found is None and not problem:
        with FileLock(path.with_name(f".{path.name}.lock"), what=str(path)):
            remove_temps(path.parent, path.name)
            found, problem = read_partition(path, config, dataset)
            if found is None and not problem:
                write_partition(path, made, manifest)
    if problem or (found is not None and found.sha256() != manifest.sha256):
        raise PartitionError(
            f"{path} is there already and is another split ({problem or 'other samples'}): remove it and "
            f"{manifest_path(path).name}, or give another --out"
        )
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
