"""PARTITIONERS: the splits `--partition` offers, their parameters, and the one a configuration asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from fedmpi.config import DataConfig
from fedmpi.data.slicing import Partition, dirichlet_slicing, noniid_slicing, random_slicing
from fedmpi.errors import ConfigError

__all__ = [
    "PARTITIONERS",
    "Partition",
    "Partitioner",
    "check_partition_options",
    "dirichlet_slicing",
    "make_partition",
    "noniid_slicing",
    "partition_parameters",
    "random_slicing",
]


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A way to split, and the options it takes: name -> default, as a function of the number of clients."""

    split: Callable[..., Partition]
    parameters: dict[str, Callable[[int], float]] = dataclasses.field(default_factory=dict)


PARTITIONERS: dict[str, Partitioner] = {
    "iid": Partitioner(random_slicing),
    "shards": Partitioner(noniid_slicing, {"num_shards": lambda num_clients: 2 * num_clients}),
    "dirichlet": Partitioner(dirichlet_slicing, {"alpha": lambda _: 0.5, "min_samples": lambda _: 1}),
}
"""Adding a partitioner: one function, one entry, and an option in `DataConfig` for each parameter."""


def check_partition_options(config: DataConfig) -> None:
    """Refuse options the chosen partitioner does not have, before any data are touched.

    Raises:
        ConfigError: names the option and the partitioner that has it.
    """
    for owner, partitioner in PARTITIONERS.items():
        for name in partitioner.parameters:
            if getattr(config, name) is not None and name not in PARTITIONERS[config.partition].parameters:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"{flag} belongs to --partition {owner}, but the split is --partition {config.partition}"
                )
    if config.partition == "shards" and config.num_shards is not None and config.num_shards % config.num_clients:
        raise ConfigError(
            f"--num-shards must be a multiple of {config.num_clients} (--num-clients), got {config.num_shards}"
        )


def partition_parameters(config: DataConfig) -> dict[str, float]:
    """What the partitioner of `config` is called with besides labels, clients and seed; defaults filled in."""
    given = {name: getattr(config, name) for name in PARTITIONERS[config.partition].parameters}
    defaults = PARTITIONERS[config.partition].parameters
    return {name: defaults[name](config.num_clients) if value is None else value for name, value in given.items()}


def make_partition(config: DataConfig, labels: NDArray[Any]) -> Partition:
    """The split that `config` asks for, over samples with these labels (N,).

    Raises:
        ConfigError: an option the partitioner does not have.
        PartitionError: the split cannot exist.
    """
    check_partition_options(config)
    parameters = partition_parameters(config)
    return PARTITIONERS[config.partition].split(labels, config.num_clients, **parameters, rng=config.partition_seed)
