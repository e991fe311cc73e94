"""Orders of the server, and what one client's visit comes to, as they travel: integers and records, nothing pickled.

Shapes: K clients in the cohort, R rows of weights (1, or one per segment that comes back), S segments that come back,
B integer buffer entries of the model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from fedmpi.errors import LaunchError, TransferError
from fedmpi.mpi.buffers import described

_MAGIC = 0x4645444D5049_04  # FEDMPI, layout version 4

IntArray = NDArray[np.int64]


class MessageCode(IntEnum):
    """The purpose of a package. Names and numbers are FedLab's; its spelling is an alias."""

    PARAMETER_REQUEST = 0  # never sent: a round starts when the server says so
    GRADIENT_UPDATE = 1  # the cohort's exact sum of updates
    PARAMETER_UPDATE = 2  # a model: down as the order to train, up as clients' vectors
    EVALUATE_PARAMS = 3  # evaluate the model that comes with it
    EXIT = 4  # the job ends
    SET_UP = 5

    ParameterRequest = PARAMETER_REQUEST
    GradientUpdate = GRADIENT_UPDATE
    ParameterUpdate = PARAMETER_UPDATE
    EvaluateParams = EVALUATE_PARAMS
    Exit = EXIT
    SetUp = SET_UP


class Collect(IntEnum):
    """The form in which clients' results come to the server."""

    NUMBERS = 0  # the records alone
    SUM = 1  # exact sums of all segments
    ROWS = 2  # every client's vector, in blocks of columns; of float buffers the exact sum


def _none() -> IntArray:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Order:
    """One instruction of the server to all ranks.

    Attributes:
        code: PARAMETER_UPDATE (visit clients), EVALUATE_PARAMS or EXIT.
        round_idx: the round it belongs to.
        exchange_idx: its place among the exchanges of the round.
        visit_idx: which method of the algorithm a client is visited by.
        collect: a `Collect`.
        num_buckets: exact sums to form per segment.
        exit_code: what the process returns, with EXIT.
        longest_client_ms: the longest that a client took so far, or may take now; 0: unknown.
        block_bytes: the server takes so much of the cohort's rows at a time.
        cohort: (K,) client ids, ascending.
        ranks: (K,) the rank that each of them is placed on; or, if negative, -1 - the place of its unit in the queue
            from which idle trainers draw.
        groups: (K,) the number, from 0, of the unit in which a client is trained.
        weights: (R x K) their weights, as the server wants them (see `exactsum.integer_weights`).
        unit_max: (R,) the largest weight of a unit.
        buckets: (K,) the bucket of each; empty: all in bucket 0.
        send_idx: (K,) which of the vectors sent is a client's; empty: the first is everyone's.
        changed: by vector sent and segment, 1 if it comes with this order, 0 if ranks have it.
        integers: (B,) the model's integer buffers.
    """

    code: MessageCode
    round_idx: int = 0
    exchange_idx: int = 0
    visit_idx: int = 0
    collect: Collect = Collect.SUM
    num_buckets: int = 1
    exit_code: int = 0
    longest_client_ms: int = 0
    block_bytes: int = 2**24
    cohort: IntArray = field(default_factory=_none)
    ranks: IntArray = field(default_factory=_none)
    groups: IntArray = field(default_factory=_none)
    weights: IntArray = field(default_factory=_none)
    unit_max: IntArray = field(default_factory=_none)
    buckets: IntArray = field(default_factory=_none)
    send_idx: IntArray = field(default_factory=_none)
    changed: IntArray = field(default_factory=_none)
    integers: IntArray = field(default_factory=_none)

    @property
    def clients_per_rank(self) -> int:
        """The most clients that one rank may get."""
        placed = len(self.ranks) > 0 and self.ranks[0] >= 0
        return int(np.bincount(self.ranks).max()) if placed else len(self.ranks)

    def weight_rows(self) -> IntArray:
        """Return (R, K) weights."""
        return self.weights.reshape(len(self.unit_max), len(self.cohort))

    def place_of(self, client_id: int) -> int:
        """Return the place of a client in the cohort."""
        return int(np.searchsorted(self.cohort, client_id))

    def bucket_of(self, place: int) -> int:
        """Return the bucket of the client at a place of the cohort."""
        return int(self.buckets[place]) if len(self.buckets) else 0

    def send_of(self, place: int) -> int:
        """Return which of the vectors sent is that client's."""
        return int(self.send_idx[place]) if len(self.send_idx) else 0

    def header(self) -> IntArray:
        """(HEADER_SIZE,): magic, the integers, the lengths of the arrays."""
        integers = [getattr(self, name) for name in _INTEGERS]
        return np.array([_MAGIC, *integers, *(len(getattr(self, name)) for name in _ARRAYS)], np.int64)

    def body(self) -> IntArray:
        """Return all arrays, one after the other.

        Raises:
            TransferError: one is no row of integers, or not of the cohort's length.
        """
        for name in _ARRAYS:
            part = getattr(self, name)
            if not isinstance(part, np.ndarray) or part.ndim != 1 or not np.can_cast(part.dtype, np.int64):
                raise TransferError(
                    f"bcast_order: rank 0 passed {name} as {described(part)}; wanted are int64 in one row"
                )
        lengths = {"ranks": 1, "groups": 1, "weights": len(self.unit_max)}
        lengths |= {name: 1 for name in ("buckets", "send_idx") if len(getattr(self, name))}
        for name, count in lengths.items():
            if len(getattr(self, name)) != count * len(self.cohort):
                raise TransferError(
                    f"bcast_order: rank 0 passed {len(getattr(self, name))} {name} for {len(self.cohort)} clients;"
                    f" wanted are {count} each"
                )
        return np.concatenate([getattr(self, name) for name in _ARRAYS]).astype(np.int64, copy=False)

    @staticmethod
    def body_size(header: IntArray) -> int:
        """Return the words of the body that follows `header`.

        Raises:
            LaunchError: the header is not one of this version.
        """
        if header[0] != _MAGIC:
            raise LaunchError("an order came in another layout: ranks run different versions of fedmpi")
        return int(header[1 + len(_INTEGERS) :].sum())

    @classmethod
    def unpack(cls, header: IntArray, body: IntArray) -> Order:
        """Return the order that `header` and `body` were made from."""
        integers, lengths = header[1 : 1 + len(_INTEGERS)].tolist(), header[1 + len(_INTEGERS) :]
        parts = np.split(body, np.cumsum(lengths)[:-1])
        values = dict(zip((*_INTEGERS, *_ARRAYS), (*integers, *parts), strict=True))
        return cls(**{**values, "code": MessageCode(values["code"]), "collect": Collect(values["collect"])})


_INTEGERS = [f.name for f in dataclasses.fields(Order) if f.default_factory is dataclasses.MISSING]
_ARRAYS = [f.name for f in dataclasses.fields(Order) if f.default_factory is not dataclasses.MISSING]
HEADER_SIZE = 1 + len(_INTEGERS) + len(_ARRAYS)


@dataclass(frozen=True)
class ClientUpdate:
    """Result of one client's visit.

    Attributes:
        client_id: the client.
        num_samples: its samples, not samples x epochs.
        loss: mean training loss over its steps; NaN when there is none.
        seconds: wall time of the visit.
        finite: 1 if all that it sends is finite.
        reported: what the visit reported, by name.
    """

    client_id: int
    num_samples: int
    loss: float
    seconds: float
    finite: int = 1
    reported: Mapping[str, float] = field(default_factory=dict)


_RECORD = [
    (f.name, "<f8" if f.type == "float" else "<i8") for f in dataclasses.fields(ClientUpdate) if f.name != "reported"
]


def _record_dtype(num_names: int) -> np.dtype[np.void]:
    return np.dtype([*_RECORD, ("has", "<i8", (num_names,)), ("values", "<f8", (num_names,))])


def pack_updates(updates: Sequence[ClientUpdate]) -> NDArray[np.uint8]:
    """Return the updates as bytes: how many, the names of what was reported, a record per client."""
    names = sorted({name for update in updates for name in update.reported})
    rows = [
        (
            *(getattr(update, name) for name, _ in _RECORD),
            [name in update.reported for name in names],
            [update.reported.get(name, 0.0) for name in names],
        )
        for update in updates
    ]
    records = np.array(rows, _record_dtype(len(names)))
    text = json.dumps(names).encode() if names else b""
    head = np.array([len(updates), len(names), len(text)], np.int64)
    return np.frombuffer(head.tobytes() + text + records.tobytes(), np.uint8)


def unpack_updates(packed: NDArray[np.uint8]) -> list[ClientUpdate]:
    """Return the updates that `pack_updates` was given."""
    start = 3 * 8
    _, num_names, length = np.frombuffer(packed[:start].tobytes(), np.int64).tolist()
    names: list[str] = json.loads(packed[start : start + length].tobytes()) if length else []
    rows = np.frombuffer(packed[start + length :].tobytes(), _record_dtype(num_names)).tolist()
    updates = []
    for client_id, num_samples, loss, seconds, finite, has, values in rows:
        told = zip(names, has, values, strict=True) if names else ()
        reported = {name: float(value) for name, given, value in told if given}
        updates.append(ClientUpdate(client_id, num_samples, loss, seconds, finite, reported))
    return updates
