"""The round loop, and its two halves: the server's manager and the trainers'.

Shapes: P vector entries, K cohort, N clients.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedmpi.core.collection import bcast_order, collect
from fedmpi.core.handler import SyncParameterServerHandler
from fedmpi.core.messages import LocalWork, MessageCode, Order, RoundRecord
from fedmpi.core.trainer import ClientTrainer
from fedmpi.core.vector import model_facts
from fedmpi.errors import ConfigError
from fedmpi.machine.device import capability
from fedmpi.mpi.comm import Comm
from fedmpi.mpi.setup import agree_on_buffer, describe, everywhere, on_every_rank, require_same
from fedmpi.mpi.tree import bcast_vector, gather_counts
from fedmpi.mpi.work_queue import WorkQueue

logger = logging.getLogger(__name__)


Buffer = NDArray[np.float32] | torch.Tensor
"""(P,) float32 on the host, or the same memory of a device as (4 P,) uint8."""


class Observer(Protocol):
    """Is told of each finished round, on the server rank."""

    def on_round(self, record: RoundRecord) -> None:
        """A round is done."""

    def on_end(self, handler: SyncParameterServerHandler) -> None:
        """Training is over and did not fail; no rank has left yet."""


class NetworkManager(ABC):
    """One rank's side of the round loop.

    Attributes:
        net: this rank's end of the communicator.
        queue: of clients that idle trainers draw; None: each is placed before the round.
    """

    def __init__(self, net: Comm, facts: Mapping[str, object] | None = None) -> None:
        """Over `net`; nothing is sent yet. `facts`: more that must be the same on all ranks."""
        self.net = net
        self.queue: WorkQueue | None = None
        self._facts = facts or {}

    def run(self) -> int:
        """Collective. Train until the server says EXIT; returns the exit code, the same on every rank."""
        self.setup()
        agreed = agree_on_buffer(self.net, "bcast_vector", self.downlink(), written=not self.net.is_server)
        while True:
            order = bcast_order(self.net, self.next_order())  # A  server -> all
            if order.code is MessageCode.EXIT:
                return self.net.leave(order.exit_code)
            vector = bcast_vector(self.net, self.downlink(), agreed)  # B  server -> all   (P,)
            work = self.local_work(order, vector)  #              no communication
            collect(self.net, order, work, self)  #             C  all -> server: exact sum (P,) or rows (K, P)
            self.finish_round(order, work)  #                     no communication

    @abstractmethod
    def setup(self) -> None:
        """Collective. Before the first round: check that ranks hold the same model; the server learns client sizes.

        Raises:
            DisagreementError: on every rank, if models or versions differ.
            ConfigError: on every rank, if the trainers cannot serve the server's clients.
        """

    @abstractmethod
    def on_receive(self, sender_rank: int, message_code: MessageCode, payload: Any) -> None:
        """A package has come.

        On a trainer: an order of the server, with (order, (P,) tensor).
        On the server: the `ClientUpdate`s of one rank, GRADIENT_UPDATE if a sum follows, PARAMETER_UPDATE if rows do.
        """

    def next_order(self) -> Order | None:
        """The order to broadcast; None on a rank that receives it."""
        return None

    @abstractmethod
    def downlink(self) -> Buffer:
        """The (P,) buffer to send the model from (server) or to receive it into (trainer)."""

    @abstractmethod
    def local_work(self, order: Order, vector: Buffer) -> LocalWork:
        """What this rank does for the order, without communication."""

    def on_block(self, columns: slice, rows: NDArray[np.float32]) -> None:  # noqa: B027  # only the server gets any
        """A block of columns of all rows has come, rank after rank; on the server only."""

    def finish_round(self, order: Order, work: LocalWork) -> None:  # noqa: B027  # a trainer is done by then
        """What follows from what has arrived; nothing on a trainer."""

    def _check_same(self, model: torch.nn.Module, device: torch.device | None) -> None:
        """`device`: where this rank trains, None if it does not."""
        require_same(self.net, {"torch version": str(torch.__version__), **model_facts(model), **self._facts})
        on_cpu = device is None or device.type == "cpu"
        held = on_every_rank(self.net, (capability(device), device is not None, on_cpu))
        # the server's CPU made the initial weights; beside trainers on GPUs there is nothing to compare it with
        of_server = all(cpu for _, _, cpu in held)
        models = [model if trains or of_server else None for model, trains, _ in held]
        ranks = {value: [rank for rank, each in enumerate(models) if each == value] for value in models if value}
        if len(ranks) > 1 and self.net.is_server:
            logger.warning(
                "%s: the bits depend on which rank trains a client, and on which makes the initial weights (rank 0)",
                describe("CPU or GPU model", ranks),
            )

    def _share_sizes(self, num_clients: int, trainer: ClientTrainer | None, trainer_idx: int) -> NDArray[np.int64]:
        """Collective. (N,) sample counts on the server: each trainer counts every num_trainers-th client."""
        step = self.net.num_trainers
        if self.net.max_of(int(trainer is not None and trainer.single_client)) and num_clients != step:
            raise everywhere(
                ConfigError(
                    f"each trainer rank holds one client of its own, so {num_clients} clients want {num_clients}"
                    f" trainer ranks (mpirun -n {num_clients + 1}), got {step}"
                )
            )
        ids = np.arange(trainer_idx, num_clients, step) if trainer is not None else np.empty(0, np.int64)
        counts = trainer.num_samples(ids) if trainer is not None else ids
        pairs = gather_counts(self.net, np.stack([ids, counts], 1).reshape(-1))
        sizes = np.zeros(num_clients, np.int64)
        sizes[pairs[0::2]] = pairs[1::2]
        return sizes
