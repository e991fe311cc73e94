"""The lines a job starts with: what runs where, on which data, with which model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmpi.config import RunConfig
from fedmpi.data.datasets import Dataset
from fedmpi.data.split import PartitionIndex


def banner(
    algorithm: str,
    config: RunConfig,
    places: Sequence[tuple[str, str, str]],
    dataset: Dataset,
    partition: PartitionIndex,
    num_parameters: int,
    provenance: Mapping[str, object],
    run_dir: Path,
) -> list[str]:
    """The lines.

    Args:
        algorithm: its name.
        config: the options.
        places: (host, device, capability) by rank.
        dataset: the data set.
        partition: its split.
        num_parameters: P.
        provenance: what the run is made with, see `job`.
        run_dir: where it is kept.
    """
    hosts = Counter(host for host, _, _ in places)
    trainers = places[1:] or places
    devices = Counter(f"{device} ({capability})" for _, device, capability in trainers)
    sizes = partition.sizes
    digest = str(provenance["partition_sha256"])[:12]
    spread = f"{sizes.min()}" if sizes.min() == sizes.max() else f"{sizes.min()}-{sizes.max()}"
    split = config.partition_file or config.partition
    batch = config.batch_size or "all"
    threads = f"{provenance['threads']} thread{'s' if provenance['threads'] != 1 else ''} each"
    return [
        f"fedmpi {provenance['fedmpi']}: {algorithm} on {provenance['mpi']}, torch {provenance['torch']}",
        f"ranks:  {len(places)} on " + ", ".join(f"{host} ({count})" for host, count in hosts.items()),
        f"trains: {', '.join(f'{count} x {device}' for device, count in devices.items())}, {threads}",
        f"data:   {dataset.name}, {len(dataset.train):,} training and {len(dataset.test):,} test samples;"
        f" {split} over {partition.num_clients:,} clients of {spread} (split {digest})",
        f"model:  {config.model}, {num_parameters:,} vector entries; engine {provenance['engine']}",
        f"rounds: {config.rounds} with {config.clients_per_round} clients each; {config.local_epochs} local epoch"
        f"{'s' if config.local_epochs != 1 else ''},"
        f" batch {batch}, client lr {config.client_lr:g}, seed {config.seed}",
        f"output: {run_dir}",
    ]
