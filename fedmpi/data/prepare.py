"""`python -m fedmpi.data.prepare`: install a data set and write a split of it; needs neither MPI nor torch.

For a login node that has the network the compute nodes lack, and for splits one wants to keep or hand on.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence

import numpy as np

from fedmpi import interrupt
from fedmpi.config import DataConfig
from fedmpi.data.datasets import load_dataset
from fedmpi.data.install import data_root, expanded, install
from fedmpi.data.job_split import SplitFiles, partition_name
from fedmpi.data.partitioners import check_partition_options
from fedmpi.data.split_file import manifest_path
from fedmpi.errors import EXIT_DONE, EXIT_INTERRUPTED, FedmpiError, FilesystemError, PartitionError
from fedmpi.lifecycle.files import os_errors
from fedmpi.logs import Stream
from fedmpi.mpi import streams
from fedmpi.options import option, parse

PROG = "python -m fedmpi.data.prepare"


@dataclasses.dataclass(frozen=True)
class PrepareConfig(DataConfig):
    """The options of this program."""

    out: str | None = option(
        None, "folder for the split (default: where a job with these settings looks for it)", "Output", result=False,
        path=True,
    )  # fmt: skip


def prepare(config: PrepareConfig) -> str:
    """Install the data, make or reuse the split; return what was done, as text for the user.

    Raises:
        FedmpiError: no data, an impossible split, a folder that cannot be written, or a file that is in the way.
    """
    check_partition_options(config)
    folder = install(config.dataset, config.data_dir)
    dataset = load_dataset(config.dataset, config.data_dir)
    splits = SplitFiles(config, dataset, data_root(config.data_dir))
    if config.out is None:
        index, path, problem = splits.default()
        if path is None:
            raise FilesystemError(f"{problem}: give a folder with --out")
        flag = "nothing: jobs with these settings find it"
    else:
        path = expanded(config.out, "--out") / partition_name(config)
        index, manifest = splits.make()
        with os_errors(FilesystemError, f"--out {path.parent} cannot be made"):
            path.parent.mkdir(parents=True, exist_ok=True)
        found, problem = splits.read_made(path)
        if found is None and not problem:
            found, problem = splits.write(path, index, manifest, replace=False)
        if found is None or found.sha256() != manifest.sha256:
            raise PartitionError(
                f"{path} is there already and is another split ({problem or 'other samples'}): remove it and "
                f"{manifest_path(path).name}, or give another --out"
            )
        flag = f"--partition-file {path}"
    splits.read(path)  # maps a large one for jobs
    sizes = index.sizes
    return (
        f"data    {config.dataset}: {len(dataset.train)} training and {len(dataset.test)} test samples"
        f"{f' in {folder}' if folder.is_dir() else ''}\n"
        f"split   {config.partition}: {len(sizes)} clients, {sizes.min()} / {np.median(sizes):g} / {sizes.max()} "
        f"samples (min / median / max), hash {index.sha256()[:16]}\n"
        f"file    {path}\n"
        f"option  {flag}"
    )


def main(argv: Sequence[str]) -> int:
    """Run the program; return its exit code."""
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
