"""Partitioners: which client holds which training sample; the splits `--partition` offers, and their parameters.

Each one returns every index exactly once, leaves no client empty, depends on its arguments alone, and ends: what cannot
be done is refused before any work. A `dataset` is anything with a length, or with labels where these matter: see
`labels_of`. `rng` is a seed or a generator.

Letters: N samples, K clients, S shards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedmpi.config import DataConfig
from fedmpi.data.labels import count_of, labels_of
from fedmpi.errors import ConfigError, PartitionError
from fedmpi.options import flag_of

Indices: TypeAlias = NDArray[np.int64]
Partition: TypeAlias = dict[int, Indices]
"""client_id in [0, K) -> indices of its samples, int64."""


def random_slicing(dataset: Any, num_clients: int, rng: int | np.random.Generator = 0) -> Partition:
    """Deal the samples out at random to K clients; sizes differ by at most 1.

    Raises:
        PartitionError: fewer samples than clients.
    """
    num_samples = count_of(dataset)
    _check_count(num_samples, num_clients)
    order = np.random.default_rng(rng).permutation(num_samples)
    return _cut(order, np.arange(num_clients + 1, dtype=np.int64) * num_samples // num_clients)


def noniid_slicing(dataset: Any, num_clients: int, num_shards: int, rng: int | np.random.Generator = 0) -> Partition:
    """Sort the samples by label (stable), cut them into S shards, give each client S / K shards at random.

    Where N is no multiple of S, shards differ in size by 1 and nothing is dropped.

    Source: McMahan et al. 2017, arXiv:1602.05629, section 3 (200 shards, 2 for each of 100 clients).

    Raises:
        PartitionError: S is no multiple of K, or more than N.
    """
    labels = labels_of(dataset)
    num_samples = len(labels)
    _check_count(num_samples, num_clients)
    if num_shards < num_clients or num_shards % num_clients:
        raise PartitionError(f"--num-shards must be a multiple of {num_clients} (--num-clients), got {num_shards}")
    if num_shards > num_samples:
        raise PartitionError(f"{num_samples} samples cannot be cut into {num_shards} shards (--num-shards)")
    order = np.argsort(labels, kind="stable")
    edges = np.arange(num_shards + 1, dtype=np.int64) * num_samples // num_shards
    shards = np.random.default_rng(rng).permutation(num_shards)  # client k gets shards[k * S/K : (k + 1) * S/K]
    sizes = np.diff(edges)[shards]
    ends = np.cumsum(sizes)
    places = np.arange(num_samples) + np.repeat(edges[shards] - (ends - sizes), sizes)
    return _cut(order[places], np.concatenate(([0], ends[num_shards // num_clients - 1 :: num_shards // num_clients])))


def dirichlet_slicing(
    dataset: Any, num_clients: int, alpha: float, min_samples: int = 1, rng: int | np.random.Generator = 0
) -> Partition:
    """Split each class by proportions ~ Dir(alpha), over the clients that hold fewer than N / K samples so far.

    Clients that end below `min_samples` are filled up from the largest ones, a few classes each, instead of drawing
    again until chance provides (deviation from the source, which may never end).

    Source: Yurochkin et al. 2019, arXiv:1905.12022; the cap at N / K is that of NIID-Bench, Li et al. 2021,
    arXiv:2102.02079.

    Args:
        dataset: labels, or a data set that stores them.
        num_clients: K.
        alpha: concentration, in (0, inf): 0.1 gives a client one or two classes, 100 nearly all alike.
        min_samples: fewest samples of a client, at least 1 and at most N / K.
        rng: a seed or a generator.

    Raises:
        PartitionError: too few samples, or alpha out of range.
    """
    labels = labels_of(dataset)
    _check_count(len(labels), num_clients, min_samples)
    if not 0 < alpha < math.inf:
        raise PartitionError(f"--alpha must be in (0, inf), got {alpha}")
    rng = np.random.default_rng(rng)
    owner = np.empty(len(labels), np.int64)  # (N,) client of each sample
    sizes = np.zeros(num_clients, np.int64)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.unique(labels, return_counts=True)[1])[:-1])
    for members in by_class:
        open_clients = np.flatnonzero(sizes * num_clients < len(labels))
        edges = np.floor(np.cumsum(_proportions(len(open_clients), alpha, rng)) * len(members)).astype(np.int64)
        edges[-1] = len(members)
        counts = np.diff(np.minimum(edges, len(members)), prepend=0)
        owner[rng.permutation(members)] = np.repeat(open_clients, counts)
        sizes[open_clients] += counts
    _fill_up(owner, sizes, labels, min_samples, rng)
    return _cut(np.argsort(owner, kind="stable"), np.concatenate(([0], np.cumsum(sizes))))


def _check_count(num_samples: int, num_clients: int, min_samples: int = 1) -> None:
    if num_clients < 1:
        raise PartitionError(f"--num-clients must be in [1, inf), got {num_clients}")
    if min_samples < 1:
        raise PartitionError(f"--min-samples must be in [1, inf), got {min_samples}")
    refused = f"{num_samples} samples cannot give {num_clients} clients"
    if num_clients > num_samples:
        raise PartitionError(f"{refused} one each: --num-clients must be in [1, {num_samples}]")
    if num_clients * min_samples > num_samples:
        most = num_samples // num_clients
        raise PartitionError(f"{refused} {min_samples} each: --min-samples must be in [1, {most}]")


def _proportions(count: int, alpha: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """One draw of Dir(alpha, ..., alpha), by logarithms, so that a tiny alpha gives one 1 and no NaN."""
    spread = np.log(1.0 - rng.random(count))  # of U in (0, 1]; Gamma(alpha) ~ Gamma(alpha + 1) * U^(1 / alpha)
    with np.errstate(over="ignore"):
        logs = np.log(rng.standard_gamma(alpha + 1.0, count)) + spread / alpha
    if not np.isfinite(logs.max()):
        logs = np.where(np.arange(count) == spread.argmax(), 0.0, -np.inf)
    shares = np.exp(logs - logs.max())
    return np.asarray(shares / shares.sum(), np.float64)


def _fill_up(owner: Indices, sizes: Indices, labels: NDArray[Any], min_samples: int, rng: np.random.Generator) -> None:
    """Move samples, in place, from the largest clients, cut down to one level, to those below `min_samples`."""
    wanted = np.maximum(min_samples - sizes, 0)
    total = int(wanted.sum())
    if total == 0:
        return
    low, high = min_samples, int(sizes.max())  # the lowest level that still frees `total`: found by halving
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.maximum(sizes - level, 0).sum() >= total else (low, level - 1)
    freed = np.maximum(sizes - low, 0)
    excess = int(freed.sum()) - total
    freed[np.flatnonzero(freed)[:excess]] -= 1  # halving leaves fewer too many than there are donors
    shuffled = rng.permutation(len(owner))
    by_owner = shuffled[np.argsort(owner[shuffled], kind="stable")]  # each client's samples in random order
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    moved = by_owner[rank < np.repeat(freed, sizes)]
    moved = moved[np.argsort(labels[moved], kind="stable")]  # neighbours share a class: the filled stay skewed too
    receivers = rng.permutation(np.flatnonzero(wanted))
    owner[moved] = np.repeat(receivers, wanted[receivers])
    sizes += wanted - freed


def _cut(order: Indices, edges: Indices) -> Partition:
    order = np.ascontiguousarray(order, np.int64)
    ends = edges.tolist()
    return {client_id: order[ends[client_id] : ends[client_id + 1]] for client_id in range(len(ends) - 1)}


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """An entry of `PARTITIONERS`, and the options it takes: name -> default, as a function of the number of clients."""

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
                found = f"but the split is --partition {config.partition}"
                raise ConfigError(f"{flag_of(name)} belongs to --partition {owner}, {found}")
    shards, num_clients = config.num_shards, config.num_clients
    if config.partition == "shards" and shards is not None and shards % num_clients:
        raise ConfigError(f"--num-shards must be a multiple of {num_clients} (--num-clients), got {shards}")


def partition_parameters(config: DataConfig) -> dict[str, float]:
    """Arguments of the partitioner of `config` besides labels, clients and seed; defaults filled in."""
    parameters = {}
    for name, default in PARTITIONERS[config.partition].parameters.items():
        given = getattr(config, name)
        parameters[name] = default(config.num_clients) if given is None else given
    return parameters


def make_partition(config: DataConfig, labels: NDArray[Any]) -> Partition:
    """The split that `config` asks for, over samples with these labels (N,).

    Raises:
        ConfigError: an option the partitioner does not have.
        PartitionError: the split cannot exist.
    """
    check_partition_options(config)
    split = PARTITIONERS[config.partition].split
    return split(labels, config.num_clients, **partition_parameters(config), rng=config.partition_seed)
