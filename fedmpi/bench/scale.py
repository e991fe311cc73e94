"""Costs of a round beside training: against the number of clients, the length of the vector, and ranks by a model.

Clients compute nothing here: each hands back the vector it got, so a round is order, broadcast, sum and server step.

Shapes: P vector entries, N clients.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmpi.bench.records import Records
from fedmpi.fedlab import ClientPassiveManager, ClientTrainer, ServerManager, SyncParameterServerHandler
from fedmpi.mpi.comm import Comm

CLIENTS = (100, 1000, 10_000, 100_000, 1_000_000)
ENTRIES = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
RANKS = (3, 11, 100, 1000)  # of the model

_COHORT_SIZE = 10
_ROUNDS = 20
_BYTES_PER_ENTRY = 48  # of each rank's memory, at the peak


class _Vector(nn.Module):
    def __init__(self, num_entries: int) -> None:
        super().__init__()
        self.entries = nn.Parameter(torch.zeros(num_entries))


class _Still(ClientTrainer):
    def num_samples(self, client_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.ones_like(client_ids)

    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        self.model_parameters.copy_(model_parameters)
        self.loss = 0.0


def overheads(net: Comm, largest: int) -> Iterator[dict[str, Any]]:
    """Collective. One row for each number of clients, then for each vector length; milliseconds, on the server.

    A vector of more than `largest` entries, or that would not fit into this node's free memory, is left out.
    """
    for num_clients in CLIENTS:
        yield {"clients": num_clients, "entries": ENTRIES[0], **_round_ms(net, num_clients, ENTRIES[0])}
    for num_entries in (each for each in ENTRIES[1:] if each <= largest):
        if not net.max_of(int(_BYTES_PER_ENTRY * num_entries * net.size > _free_bytes())):
            yield {"clients": CLIENTS[0], "entries": num_entries, **_round_ms(net, CLIENTS[0], num_entries)}


def predicted_ms(limits: dict[str, float], num_measured: int, num_ranks: int, num_entries: int) -> float:
    """Broadcast and sum of a round by a LogGP-like model of the tree: depth x (2 L + P (4 G_down + 8 G_up)).

    Args:
        limits: what `machine.limits` measured.
        num_measured: on so many ranks.
        num_ranks: the ranks to predict for, each with a core of its own.
        num_entries: P.
    """
    levels = math.ceil(math.log2(num_measured))
    latency_ms = limits["broadcast of 8 B, us"] / 1e3 / levels
    bytes_ms = (4 / limits["broadcast GB/s"] + 8 / limits["reduction GB/s"]) / 1e6 / levels
    return math.ceil(math.log2(num_ranks)) * (2 * latency_ms + num_entries * bytes_ms)


def _round_ms(net: Comm, num_clients: int, num_entries: int) -> dict[str, float]:
    """Collective. Medians over the rounds but the first."""
    rounds = max(3, min(_ROUNDS, 20_000_000 // num_entries))
    records = Records()
    trainer = _Still(_Vector(num_entries)) if not net.is_server or net.size == 1 else None
    local = ClientPassiveManager(net, trainer) if trainer is not None else None
    if net.is_server:
        handler = SyncParameterServerHandler(
            _Vector(num_entries), num_clients, cohort_size=_COHORT_SIZE, rounds=rounds + 1
        )
        ServerManager(net, handler, local, observers=[records]).run()
    elif local is not None:
        local.run()
    net.over = False  # the job goes on
    parts = {"round": "round_s", "broadcast": "broadcast_s", "collect": "collect_s", "step": "step_s"}
    return {
        name: round(1e3 * statistics.median(record.timings[key] for record in records[1:]), 3)
        for name, key in parts.items()
        if records
    }


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
