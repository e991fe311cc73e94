"""Collectives of the set-up: facts that ranks must share, and errors that are alike on all of them.

They carry any Python object, so they have no place in the round loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fedmpi.errors import DisagreementError, FedmpiError, TransferError
from fedmpi.mpi.buffers import Form, check_buffer, described, is_alike, signature, wanted

if TYPE_CHECKING:
    from fedmpi.mpi.comm import Comm

T = TypeVar("T")
Error = TypeVar("Error", bound=FedmpiError)


def on_root(comm: Comm, work: Callable[[], T], share: bool = True) -> T:
    """Collective. Run `work` on the server alone; the FedmpiError it raises is raised on every rank.

    Returns:
        Its result, on every rank; with `share` False only on the server, and None elsewhere.
    """
    result, error = _attempt(work) if comm.is_server else (None, None)
    shared, error = comm.share((result if share else None, error))
    if error is not None:
        raise everywhere(error)
    return result if comm.is_server else shared  # type: ignore[return-value]  # `work` returned it


def on_all(comm: Comm, work: Callable[[], T]) -> T:
    """Collective. Run `work` on every rank; a FedmpiError on any of them is raised on all."""
    result, error = _attempt(work)
    agree(comm, error)
    return result  # type: ignore[return-value]  # `work` returned it


def _attempt(work: Callable[[], T]) -> tuple[T | None, FedmpiError | None]:
    try:
        return work(), None
    except FedmpiError as error:
        return None, error


def agree(comm: Comm, error: FedmpiError | None) -> None:
    """Collective. Raise the lowest rank's error on all ranks, if any rank passes one instead of None."""
    errors = {rank: other for rank, other in enumerate(comm.tell(error)) if other is not None}
    if not errors:
        return
    rank, raised = next(iter(errors.items()))
    if len(errors) < comm.size:  # else it is no matter of ranks
        raised = type(raised)(f"{raised} (rank {rank} of {comm.size})")
    raise everywhere(raised)


def everywhere(error: Error) -> Error:
    """Mark an error that every rank raises alike, so that rank 0 tells it and each rank leaves by itself."""
    error.everywhere = True
    return error


def on_every_rank(comm: Comm, value: T) -> list[T]:
    """Collective. Return the ranks' values, by rank, on every rank."""
    return comm.tell(value)


def same_everywhere(comm: Comm, facts: Mapping[str, object]) -> dict[str, dict[object, list[int]]]:
    """Collective. Return what differs between the ranks' facts, as fact -> value -> ranks that hold it."""
    differing: dict[str, dict[object, list[int]]] = {}
    by_rank = comm.tell(dict(facts))
    for name in facts:
        values: dict[object, list[int]] = {}
        for rank, others in enumerate(by_rank):
            values.setdefault(others.get(name), []).append(rank)
        if len(values) > 1:
            differing[name] = values
    return differing


def require_same(comm: Comm, facts: Mapping[str, object]) -> None:
    """Collective.

    Raises:
        DisagreementError: on every rank, naming what differs, the values and the ranks that hold them.
    """
    differing = same_everywhere(comm, facts)
    if differing:
        raise everywhere(DisagreementError("; ".join(describe(name, values) for name, values in differing.items())))


def agree_on_buffer(
    comm: Comm, call: str, array: Any, dtype: str | None = None, *, written: bool = False, rows: bool = False
) -> Form:
    """Collective. Compare the ranks' buffers before they are handed to MPI; none is touched.

    Args:
        comm: the communicator.
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
    if is_alike(comm.largest(signature(call, array if sound else None, rows))):
        return Form(str(array.dtype), tuple(array.shape))
    by_rank = comm.tell((call, described(array), written))
    same_call = len({name for name, _, _ in by_rank}) == 1
    passed: dict[str, list[int]] = {}
    for rank, (name, text, _) in enumerate(by_rank):
        passed.setdefault(text if same_call else f"{text} for {name}", []).append(rank)
    alike = "the same width" if rows else "the same dtype and shape"
    raise everywhere(
        TransferError(
            f"{describe(f'{by_rank[0][0]}: the buffer', passed)}; wanted is"
            f" {wanted(dtype, any(writes for _, _, writes in by_rank))}, {alike} on all ranks"
        )
    )


def require_form(
    comm: Comm, agreed: Form | None, call: str, array: Any, dtype: str | None = None, *, written: bool
) -> None:
    """Compare this rank's buffer with `agreed`, which `agree_on_buffer` returned; None: all ranks' now, collective.

    Raises:
        TransferError: as for `agree_on_buffer`; with `agreed`, on this rank.
    """
    if agreed is None:
        agree_on_buffer(comm, call, array, dtype, written=written)
    else:
        agreed.check(array, written=written)


def describe(name: str, values: Mapping[Any, Sequence[int]]) -> str:
    """Return one fact that differs, e.g. "torch is 2.2 on ranks 0, 2 but 2.4 on rank 1"."""
    parts = [f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for value, ranks in values.items()]
    return f"{name} is {' but '.join(parts)}"
