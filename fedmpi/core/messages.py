"""What ranks tell each other: an `Order` from the server, `ClientUpdate`s back.

Shapes: K clients in the cohort, P vector entries, B integer state entries of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedmpi.errors import LaunchError

if TYPE_CHECKING:
    import torch

HEADER_SIZE = 8
"""int64 words of an order's header: magic, code, K, B, and the other integers of an `Order`."""

_MAGIC = 0x4645444D5049_03  # FEDMPI, layout version 3


class MessageCode(IntEnum):
    """The purpose of a package. Names and numbers are FedLab's; its spelling is an alias."""

    PARAMETER_REQUEST = 0  # never sent: a round starts when the server says so
    GRADIENT_UPDATE = 1  # the cohort's exact sum of updates
    PARAMETER_UPDATE = 2  # a model: down as the order to train, up as clients' vectors
    EVALUATE_PARAMS = 3  # evaluate the model that comes with it
    EXIT = 4  # down: the job ends; up: a signal has asked this rank to stop
    SET_UP = 5

    ParameterRequest = PARAMETER_REQUEST
    GradientUpdate = GRADIENT_UPDATE
    ParameterUpdate = PARAMETER_UPDATE
    EvaluateParams = EVALUATE_PARAMS
    Exit = EXIT
    SetUp = SET_UP


@dataclass(frozen=True)
class Order:
    """One instruction of the server to all ranks.

    Attributes:
        code: PARAMETER_UPDATE (train), EVALUATE_PARAMS or EXIT.
        round_idx: the round it belongs to.
        cohort: (K,) int64 client ids, ascending.
        ranks: (K,) int64, the rank that trains each of them; or, if negative, -1 - its place in the queue from
            which idle trainers draw.
        weights: (K,) int64, their weights in the mean, as the server wants them (see `exactsum.integer_weights`).
        integer_state: (B,) int64, the model's integer buffers.
        exit_code: what the process returns, with EXIT.
        rows: 1 if clients' vectors are to travel as rows, 0 if as an exact sum.
        longest_client_ms: the longest that a client took so far, or may take now; 0: unknown.
    """

    code: MessageCode
    round_idx: int = 0
    cohort: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    ranks: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    weights: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    integer_state: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    exit_code: int = 0
    rows: int = 0
    longest_client_ms: int = 0

    @property
    def clients_a_rank(self) -> int:
        """How many clients one rank may get."""
        placed = len(self.ranks) > 0 and self.ranks[0] >= 0
        return int(np.bincount(self.ranks).max()) if placed else len(self.ranks)

    @property
    def weight_total(self) -> int:
        """Sum of the weights; with `weight_max` it fixes the scale of the exact sum."""
        return int(self.weights.sum())

    @property
    def weight_max(self) -> int:
        """Largest of the weights; 0 for an empty cohort."""
        return int(self.weights.max(initial=0))

    def weight_of(self, client_id: int) -> int:
        """The weight of a client of the cohort."""
        return int(self.weights[np.searchsorted(self.cohort, client_id)])

    def header(self) -> NDArray[np.int64]:
        """(HEADER_SIZE,) int64; its length does not depend on the order."""
        what = (_MAGIC, self.code, len(self.cohort), len(self.integer_state), self.round_idx, self.exit_code)
        return np.array((*what, self.rows, self.longest_client_ms), np.int64)

    def body(self) -> NDArray[np.int64]:
        """(3K + B,) int64: cohort, ranks, weights, integer state."""
        return np.concatenate([self.cohort, self.ranks, self.weights, self.integer_state])

    @staticmethod
    def body_size(header: NDArray[np.int64]) -> int:
        """Words of the body that follows `header`.

        Raises:
            LaunchError: the header is not one of this version.
        """
        if header[0] != _MAGIC:
            raise LaunchError("an order came in another layout: ranks run different versions of fedmpi")
        return 3 * int(header[2]) + int(header[3])

    @classmethod
    def unpack(cls, header: NDArray[np.int64], body: NDArray[np.int64]) -> Order:
        """The order that `header()` and `body()` were made from."""
        _, code, k, _, round_idx, *others = (int(word) for word in header)
        parts = body[:k], body[k : 2 * k], body[2 * k : 3 * k], body[3 * k :]
        return cls(MessageCode(code), round_idx, *parts, *others)


@dataclass(frozen=True)
class ClientUpdate:
    """What one client's training came to.

    Attributes:
        client_id: who.
        num_samples: samples of the client, not samples x epochs.
        loss: mean training loss over the client's steps; NaN when there is none.
        seconds: wall time of the training.
        bin_idx: bin of the exact sum that holds the update (see `exactsum`); None: the trained vector is not finite.
        integer_state: (B,) int64, the model's integer buffers after training.
    """

    client_id: int
    num_samples: int
    loss: float
    seconds: float
    bin_idx: int | None
    integer_state: NDArray[np.int64]


class PartialSum(Protocol):
    """One rank's part of the exact sum (see `exactsum`), as far as sending it goes."""

    def mean(self) -> torch.Tensor:
        """(P,) float64: the weighted mean, once the sums over ranks are in the buffers."""

    @property
    def num_bins(self) -> int:
        """Bins in use here."""

    def buffers(self, num_bins: int) -> list[NDArray[np.int64]]:
        """`num_bins` host buffers, (P,) each, for the sums over ranks to be formed in."""


@dataclass(frozen=True)
class LocalWork:
    """What one rank did for an order, ready to be collected.

    Attributes:
        updates: one for each client trained here.
        exact: the sum of their updates, or the server's empty one to sum into; None: no sum travels.
        rows: (P,) float32 vectors, in the order of `updates`; empty: no rows travel.
        metrics: (4,) int64, see `evaluate`.
        stop: the signal that has asked this rank to stop; 0: none.
    """

    updates: list[ClientUpdate] = field(default_factory=list)
    exact: PartialSum | None = None
    rows: list[NDArray[np.float32]] = field(default_factory=list)
    metrics: NDArray[np.int64] = field(default_factory=lambda: np.zeros(4, np.int64))
    stop: int = 0


class Receiver(Protocol):
    """What the server's end of a collection is handed, as it comes in."""

    def on_receive(self, sender_rank: int, message_code: MessageCode, payload: Any) -> None:
        """The records of one rank; with EXIT: the signal that has asked it to stop."""

    def on_block(self, columns: slice, rows: NDArray[np.float32]) -> None:
        """A block of columns of all rows, in rank order."""


@dataclass(frozen=True)
class RoundRecord:
    """One finished round, as observers see it. All but `timings` is the same on any number of ranks.

    Attributes:
        round_idx: from 0.
        cohort: client ids, ascending.
        num_samples: samples of the cohort.
        train_loss: sample-weighted mean of the clients' training losses; None when a client has none.
        accuracy: test accuracy after the round, in [0, 1]; None when the round was not evaluated.
        loss: test loss after the round; None likewise, or when not finite.
        bytes_down: what a real federation would send to the cohort: K x P x 4.
        bytes_up: what it would send back.
        timings: seconds by part, each trainer's busy and idle seconds while clients train, the share of the trainers'
            time spent idle, and bytes through the server's MPI calls.
    """

    round_idx: int
    cohort: list[int]
    num_samples: int
    train_loss: float | None
    accuracy: float | None
    loss: float | None
    bytes_down: int
    bytes_up: int
    timings: dict[str, Any]


def update_dtype(num_integers: int) -> np.dtype[np.void]:
    """The fixed record a `ClientUpdate` travels as, for a model with `num_integers` integer buffer entries."""
    return np.dtype(
        [
            ("client_id", "<i8"),
            ("num_samples", "<i8"),
            ("loss", "<f8"),
            ("seconds", "<f8"),
            ("bin_idx", "<i8"),
            ("integer_state", "<i8", (num_integers,)),
        ]
    )


def pack_updates(updates: list[ClientUpdate], num_integers: int) -> NDArray[np.void]:
    """(len(updates),) records."""
    rows = [
        (u.client_id, u.num_samples, u.loss, u.seconds, -1 if u.bin_idx is None else u.bin_idx, u.integer_state)
        for u in updates
    ]
    return np.array(rows, update_dtype(num_integers))


def unpack_updates(records: NDArray[np.void]) -> list[ClientUpdate]:
    """The updates that `pack_updates` was given."""
    states = records["integer_state"]
    return [
        ClientUpdate(client_id, num_samples, loss, seconds, None if bin_idx < 0 else bin_idx, state)
        for (client_id, num_samples, loss, seconds, bin_idx, _), state in zip(records.tolist(), states, strict=True)
    ]
