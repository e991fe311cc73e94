"""Machine of a job: each rank's device, and whether a node has the cores for its ranks."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import torch

from fedmpi.errors import ConfigError
from fedmpi.machine.cores import (
    affinity,
    cgroup_quota,
    cores_of_node,
    oversubscription_warning,
    slurm_allocation,
    threads_per_trainer,
)
from fedmpi.machine.device import (
    capability,
    local_trainer_index,
    mixed_devices,
    open_device,
    pick_device,
    trainers_sharing,
    visible_gpus,
)
from fedmpi.mpi.comm import Comm
from fedmpi.mpi.processes import SERVER_RANK
from fedmpi.mpi.setup import everywhere, on_all, on_every_rank


@dataclass(frozen=True)
class Machine:
    """Machine of a job.

    Attributes:
        device: this rank's.
        threads: CPU threads of every trainer.
        places: (host, device, capability) by rank.
        warning: one line if this node's ranks want more cores than they have; on its first rank only.
    """

    device: torch.device
    threads: int
    places: list[tuple[str, str, str]]
    warning: str | None


def find_machine(net: Comm, requested: str, wanted_threads: int | str) -> Machine:
    """Collective. Open this rank's device, and learn everybody's for the banner.

    Args:
        net: this rank's end of the communicator.
        requested: as in `--device`.
        wanted_threads: as in `--threads`.
    """
    node = net.node
    host = socket.gethostname()
    where = f"rank {net.rank} on {host}"
    masks = on_every_rank(net, affinity())
    cores = cores_of_node([masks[rank] for rank in node], cgroup_quota(), slurm_allocation())
    threads = -net.max_of(-threads_per_trainer(wanted_threads, cores, len(node)))  # the same on every node
    net.waiting.ranks_per_core = len(node) / cores
    with_server = net.size > 1 and SERVER_RANK in node
    warning = oversubscription_warning(cores, len(node) - with_server, threads, with_server)

    def open_own() -> torch.device:
        if net.is_server and net.size > 1:
            return open_device("cpu", threads)
        visible = visible_gpus() if requested != "cpu" else 0
        name = pick_device(requested, local_trainer_index(node, net.rank), visible, where)
        return open_device(name, threads, trainers_sharing(node, net.rank, max(1, visible)), where)

    device = on_all(net, open_own)
    places = on_every_rank(net, (host, str(device), capability(device)))
    mixed = mixed_devices([place[:2] for place in places[1:]]) if requested == "auto" else None
    if mixed is not None:
        raise everywhere(ConfigError(mixed))  # each rank has seen the same places
    return Machine(device, threads, places, warning if net.rank == node[0] else None)
