"""Before the first round: what ranks must know of each other, and errors that are alike on all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedmpi.errors import DisagreementError, FedmpiError, TransferError
from fedmpi.mpi.buffers import Form, check_buffer, described, is_alike, signature, wanted

T = TypeVar("T")


class Agreement(ABC):
    """Collectives of the set-up. They carry any Python object, so they have no place in the round loop.

    Attributes:
        rank: this process, 0 is the server.
        size: all processes.
    """

    rank: int
    size: int

    @property
    def is_server(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @abstractmethod
    def barrier(self) -> None:
        """Collective. Returns when all ranks are here; a patient wait, before a call that would spin."""

    @abstractmethod
    def _share(self, value: Any) -> Any:
        """Collective. The server's value, on every rank."""

    @abstractmethod
    def _tell(self, value: T) -> list[T]:
        """Collective. The ranks' values, by rank, on every rank."""

    @abstractmethod
    def _largest(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Collective. The largest of the ranks' values, entry by entry, on every rank."""

    def on_root(self, work: Callable[[], T], share: bool = True) -> T:
        """Collective. `work` runs on the server alone; the FedmpiError it raises is raised on every rank.

        Returns:
            Its result, on every rank; with `share` False only on the server, and None elsewhere.
        """
        result: Any = None
        error: FedmpiError | None = None
        if self.is_server:
            try:
                result = work()
            except FedmpiError as raised:
                error = raised
        self.barrier()  # a patient wait: `work` may take long
        shared, error = self._share((result if share else None, error))
        if error is not None:
            error.everywhere = True
            raise error
        return result if self.is_server else shared  # type: ignore[no-any-return]  # `work` returned it

    def on_all(self, work: Callable[[], T]) -> T:
        """Collective. `work` runs on every rank; a FedmpiError on any of them is raised on all."""
        result: T | None = None
        error: FedmpiError | None = None
        try:
            result = work()
        except FedmpiError as raised:
            error = raised
        self.agree(error)
        return result  # type: ignore[return-value]  # `work` returned it

    def agree(self, error: FedmpiError | None) -> None:
        """Collective. Each rank passes the error it met, or None; if any met one, all raise the lowest rank's."""
        self.barrier()
        met = {rank: each for rank, each in enumerate(self._tell(error)) if each is not None}
        if not met:
            return
        rank, raised = next(iter(met.items()))
        if len(met) < self.size:  # else it is no matter of ranks
            raised = type(raised)(f"{raised} (rank {rank} of {self.size})")
        raised.everywhere = True
        raise raised

    def same_everywhere(self, facts: Mapping[str, object]) -> dict[str, dict[object, list[int]]]:
        """Collective. Each rank passes facts; what differs comes back as fact -> value -> ranks that hold it."""
        self.barrier()
        held = self._tell(dict(facts))
        differing: dict[str, dict[object, list[int]]] = {}
        for name in facts:
            values: dict[object, list[int]] = {}
            for rank, theirs in enumerate(held):
                values.setdefault(theirs.get(name), []).append(rank)
            if len(values) > 1:
                differing[name] = values
        return differing

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Collective.

        Raises:
            DisagreementError: on every rank, naming what differs, the values and the ranks that hold them.
        """
        differing = self.same_everywhere(facts)
        if differing:
            error = DisagreementError("; ".join(describe(name, values) for name, values in differing.items()))
            error.everywhere = True
            raise error

    def agree_on_buffer(
        self, call: str, array: Any, dtype: str | None = None, *, written: bool = False, rows: bool = False
    ) -> Form:
        """Collective. Compare the ranks' buffers before they are handed to MPI; none is touched.

        Args:
            call: the transfer they are for, e.g. "bcast_vector".
            array: this rank's, of the others' dtype and shape; bytes of a device stand for any with as many bytes.
            dtype: as for `check_buffer`.
            written: MPI writes to this rank's.
            rows: the first dimension may differ between ranks.

        Returns:
            The form of this rank's.

        Raises:
            TransferError: on every rank, if any rank's buffer is unfit or differs, with the ranks and what they passed.
        """
        try:
            check_buffer(array, dtype, written=written)
            sound = True
        except TransferError:
            sound = False
        if is_alike(self._largest(signature(call, array if sound else None, rows))):
            return Form(str(array.dtype), tuple(array.shape))
        passed: dict[str, list[int]] = {}
        told = self.on_every_rank((call, described(array), written))
        same_call = len({name for name, _, _ in told}) == 1
        for rank, (name, text, _) in enumerate(told):
            passed.setdefault(text if same_call else f"{text} for {name}", []).append(rank)
        alike = "the same width" if rows else "the same dtype and shape"
        error = TransferError(
            f"{describe(f'{told[0][0]}: the buffer', passed)}; wanted is"
            f" {wanted(dtype, any(writes for _, _, writes in told))}, {alike} on all ranks"
        )
        error.everywhere = True
        raise error

    def on_every_rank(self, value: T) -> list[T]:
        """Collective. The ranks' values, by rank, on every rank."""
        self.barrier()
        return self._tell(value)


def describe(name: str, values: Mapping[Any, Sequence[int]]) -> str:
    """One fact that differs, e.g. "torch is 2.2 on ranks 0, 2 but 2.4 on rank 1"."""
    parts = [f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for value, ranks in values.items()]
    return f"{name} is {' but '.join(parts)}"
