"""What travels: round trips through the buffers, and the refusal of another layout."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedmpi.core.order import (
    HEADER_SIZE,
    ClientUpdate,
    Collect,
    MessageCode,
    Order,
    pack_updates,
    unpack_updates,
)
from fedmpi.errors import LaunchError, TransferError

int64 = st.integers(-(2**63), 2**63 - 1)
counts = st.integers(0, 2**62)
weights = st.integers(0, 2**40)
INTEGERS = [f.name for f in dataclasses.fields(Order) if f.default_factory is dataclasses.MISSING]
ARRAYS = [f.name for f in dataclasses.fields(Order) if f.default_factory is not dataclasses.MISSING]


def ints(values: list[int]) -> NDArray[np.int64]:
    return np.array(values, np.int64)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Return an order whose fields all have a value of their own."""
    k, rows = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    numbers = {name: draw(counts) for name in INTEGERS}
    arrays: dict[str, Any] = {name: ints(draw(st.lists(int64, min_size=k, max_size=k))) for name in ARRAYS}
    arrays["weights"] = ints(draw(st.lists(weights, min_size=k * rows, max_size=k * rows)))
    arrays["unit_max"] = ints(draw(st.lists(weights, min_size=rows, max_size=rows)))
    arrays["integers"], arrays["changed"] = (ints(draw(st.lists(int64, max_size=4))) for _ in range(2))
    numbers |= {"code": draw(st.sampled_from(MessageCode)), "collect": draw(st.sampled_from(Collect))}
    return Order(**numbers, **arrays)  # type: ignore[arg-type]  # the fields are listed by kind


@given(orders())
def test_an_order_survives_its_buffers(order: Order) -> None:
    header, body = order.header(), order.body()
    assert header.dtype == body.dtype == np.int64
    assert header.shape == (HEADER_SIZE,), "a receiver posts the header's buffer before it knows the order"
    assert len(body) == Order.body_size(header)
    back = Order.unpack(header.copy(), body.copy())
    for name in INTEGERS:
        assert getattr(back, name) == getattr(order, name)
    assert isinstance(back.code, MessageCode)
    assert isinstance(back.collect, Collect)
    for name in ARRAYS:
        assert getattr(back, name).tolist() == getattr(order, name).tolist()


@pytest.mark.parametrize(("ranks", "most"), [([], 0), ([0, 0], 2), ([3, 1, 3, 3], 3), ([-1, -2, -3], 3)])
def test_how_many_clients_one_rank_may_get(ranks: list[int], most: int) -> None:
    """All of them if idle ranks draw."""
    order = Order(MessageCode.PARAMETER_UPDATE, cohort=ints(list(range(len(ranks)))), ranks=ints(ranks))
    assert order.clients_per_rank == most


def test_weights_buckets_and_vectors_of_clients() -> None:
    cohort, weights = ints([2, 5, 9]), ints([30, 0, 7, 1, 2, 3])
    order = Order(MessageCode.PARAMETER_UPDATE, cohort=cohort, weights=weights, unit_max=ints([30, 3]))
    places = [order.place_of(client_id) for client_id in (9, 2, 5)]
    assert order.weight_rows()[:, places].tolist() == [[7, 30, 0], [3, 1, 2]]
    assert [(order.bucket_of(place), order.send_of(place)) for place in places] == [(0, 0)] * 3
    order = dataclasses.replace(order, buckets=ints([1, 0, 2]), send_idx=ints([0, 1, 0]))
    assert [(order.bucket_of(place), order.send_of(place)) for place in places] == [(2, 0), (1, 0), (0, 1)]
    assert Order(MessageCode.PARAMETER_UPDATE, unit_max=ints([0])).weight_rows().shape == (1, 0)


def test_another_layout_is_refused() -> None:
    header = Order(MessageCode.EXIT).header()
    for garbage in (0, int(header[0]) + 1, -1):
        header[0] = garbage
        with pytest.raises(LaunchError, match="ranks run different versions of fedmpi"):
            Order.body_size(header)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [(np.zeros((1, 1), np.int64), "int64 of shape"), (np.array([0.5]), "float64"), ([1], "type list")],
)
def test_arrays_that_are_no_row_of_integers_are_refused(wrong: Any, found: str) -> None:
    with pytest.raises(TransferError, match=rf"passed groups as .*{found}.*; wanted are int64 in one row$"):
        Order(MessageCode.PARAMETER_UPDATE, groups=wrong).body()


def test_arrays_of_another_length_than_the_cohort_are_refused() -> None:
    for name in ("ranks", "groups", "weights", "buckets", "send_idx"):
        fields: dict[str, Any] = {"ranks": ints([0, 0]), "groups": ints([0, 1]), "weights": ints([1, 1])}
        fields[name] = ints([1, 1, 1])
        with pytest.raises(TransferError, match=name):
            Order(MessageCode.PARAMETER_UPDATE, cohort=ints([0, 1]), unit_max=ints([1]), **fields).body()


def test_codes_are_fedlabs() -> None:
    assert {code.name: code.value for code in MessageCode} == {
        "PARAMETER_REQUEST": 0, "GRADIENT_UPDATE": 1, "PARAMETER_UPDATE": 2, "EVALUATE_PARAMS": 3, "EXIT": 4,
        "SET_UP": 5,
    }  # fmt: skip


@given(st.data())
def test_updates_survive_their_records(data: st.DataObject) -> None:
    reports = st.dictionaries(st.text(max_size=8), st.floats(), max_size=3)
    one = st.builds(ClientUpdate, counts, counts, st.floats(), st.floats(0, 1e6), st.integers(0, 1), reports)
    updates = data.draw(st.lists(one, max_size=4))
    packed = pack_updates(updates)
    assert packed.dtype == np.uint8
    for back, sent in zip(unpack_updates(packed.copy()), updates, strict=True):
        assert (back.client_id, back.num_samples, back.seconds) == (sent.client_id, sent.num_samples, sent.seconds)
        assert back.finite == sent.finite
        assert back.loss == sent.loss or (math.isnan(back.loss) and math.isnan(sent.loss))
        assert set(back.reported) == set(sent.reported), "a client that told nothing of a name did not tell 0"
        for name, value in sent.reported.items():
            assert np.float64(back.reported[name]).tobytes() == np.float64(value).tobytes() or math.isnan(value)
        assert all(type(value) is float for value in back.reported.values())


def test_a_record_has_no_gaps_so_that_every_platform_agrees() -> None:
    head = 3 * 8
    for count in (0, 1, 5):
        assert pack_updates([ClientUpdate(0, 1, 0.5, 0.1)] * count).nbytes == head + 8 * 5 * count
    told = [ClientUpdate(0, 1, 0.5, 0.1, 1, {"h": 2.0, "tau": 1.0}), ClientUpdate(1, 1, 0.5, 0.1)]
    assert pack_updates(told).nbytes == head + len('["h", "tau"]') + 2 * 8 * (5 + 2 + 2)
