"""What travels: round trips through the buffers, and the refusal of another layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fedmpi.core.messages import (
    HEADER_SIZE,
    ClientUpdate,
    MessageCode,
    Order,
    pack_updates,
    unpack_updates,
    update_dtype,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedmpi.errors import LaunchError

int64 = st.integers(-(2**63), 2**63 - 1)
counts = st.integers(0, 2**62)
weights = st.integers(0, 2**40)


def ints(values: list[int]) -> NDArray[np.int64]:
    return np.array(values, np.int64)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    k = draw(st.integers(0, 5))
    return Order(
        draw(st.sampled_from(MessageCode)),
        draw(counts),
        ints(draw(st.lists(counts, min_size=k, max_size=k))),
        ints(draw(st.lists(counts, min_size=k, max_size=k))),
        ints(draw(st.lists(weights, min_size=k, max_size=k))),
        ints(draw(st.lists(int64, max_size=4))),
        draw(st.integers(0, 255)),
        draw(st.integers(0, 1)),
        draw(counts),
    )


@given(orders())
def test_an_order_survives_its_buffers(order: Order) -> None:
    header, body = order.header(), order.body()
    assert header.dtype == body.dtype == np.int64
    assert header.shape == (HEADER_SIZE,), "a receiver posts the header's buffer before it knows the order"
    assert len(body) == Order.body_size(header)
    back = Order.unpack(header.copy(), body.copy())
    for name in ("code", "round_idx", "exit_code", "weight_total", "weight_max", "rows", "longest_client_ms"):
        assert getattr(back, name) == getattr(order, name)
    assert isinstance(back.code, MessageCode)
    for name in ("cohort", "ranks", "weights", "integer_state"):
        assert getattr(back, name).tolist() == getattr(order, name).tolist()


@pytest.mark.parametrize(("ranks", "most"), [([], 0), ([0, 0], 2), ([3, 1, 3, 3], 3), ([-1, -2, -3], 3)])
def test_how_many_clients_one_rank_may_get(ranks: list[int], most: int) -> None:
    """All of them if idle ranks draw."""
    order = Order(MessageCode.PARAMETER_UPDATE, 0, ints(list(range(len(ranks)))), ints(ranks))
    assert order.clients_a_rank == most


def test_weights_of_clients() -> None:
    order = Order(MessageCode.PARAMETER_UPDATE, 0, ints([2, 5, 9]), ints([1, 1, 2]), ints([30, 0, 7]))
    assert [order.weight_of(client_id) for client_id in (9, 2, 5)] == [7, 30, 0]
    assert (order.weight_total, order.weight_max) == (37, 30)
    assert (Order(MessageCode.EXIT).weight_total, Order(MessageCode.EXIT).weight_max) == (0, 0)


def test_another_layout_is_refused() -> None:
    header = Order(MessageCode.EXIT).header()
    for garbage in (0, int(header[0]) + 1, -1):
        header[0] = garbage
        with pytest.raises(LaunchError, match="ranks run different versions of fedmpi"):
            Order.body_size(header)


def test_codes_are_fedlabs() -> None:
    assert {code.name: code.value for code in MessageCode} == {
        "PARAMETER_REQUEST": 0, "GRADIENT_UPDATE": 1, "PARAMETER_UPDATE": 2, "EVALUATE_PARAMS": 3, "EXIT": 4,
        "SET_UP": 5,
    }  # fmt: skip


@given(st.data(), st.integers(0, 3))
def test_updates_survive_their_records(data: st.DataObject, num_integers: int) -> None:
    one = st.builds(
        ClientUpdate,
        counts,
        counts,
        st.floats(),
        st.floats(0, 1e6),
        st.none() | st.integers(0, 4),
        st.lists(int64, min_size=num_integers, max_size=num_integers).map(ints),
    )
    updates = data.draw(st.lists(one, max_size=4))
    records = pack_updates(updates, num_integers)
    assert records.dtype == update_dtype(num_integers)
    assert records.shape == (len(updates),)
    received = np.frombuffer(records.tobytes(), update_dtype(num_integers))
    for back, sent in zip(unpack_updates(received), updates, strict=True):
        assert (back.client_id, back.num_samples, back.seconds) == (sent.client_id, sent.num_samples, sent.seconds)
        assert back.bin_idx == sent.bin_idx
        assert back.loss == sent.loss or (math.isnan(back.loss) and math.isnan(sent.loss))
        assert back.integer_state.tolist() == sent.integer_state.tolist()


def test_a_record_has_no_gaps_so_that_every_platform_agrees() -> None:
    for num_integers in (0, 1, 5):
        assert update_dtype(num_integers).itemsize == 8 * (5 + num_integers)
