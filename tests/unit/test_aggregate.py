"""Aggregators against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmpi.fedlab.aggregate import Aggregators

rows = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 7), st.integers(1, 5)), elements=st.floats(-(2.0**100), 2.0**100, width=32)
)


@given(rows)
def test_median_is_numpys(values: np.ndarray) -> None:
    expected = np.median(values.astype(np.float64), axis=0).astype(np.float32)
    result = Aggregators.median_aggregate(torch.from_numpy(values))
    assert result.dtype == torch.float32
    assert np.array_equal(result.numpy(), expected)
    assert torch.equal(Aggregators.median_aggregate(list(torch.from_numpy(values))), result)


@given(rows, st.data())
def test_weighted_mean_is_numpys(values: np.ndarray, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=len(values), max_size=len(values)))
    expected = np.average(values.astype(np.float64), axis=0, weights=weights)
    close = {"rtol": 1e-6, "atol": 1e-12 * float(np.abs(values).max())}
    result = Aggregators.fedavg_aggregate(torch.from_numpy(values), weights)
    assert result.dtype == torch.float32
    assert np.allclose(result.numpy(), expected, **close)
    equal = Aggregators.fedavg_aggregate(list(torch.from_numpy(values)))
    assert np.allclose(equal.numpy(), values.astype(np.float64).mean(0), **close)


def test_median_of_an_even_number_neither_overflows_nor_shares_memory() -> None:
    largest = float(np.finfo(np.float32).max)
    values = torch.tensor([[largest, 1.0], [largest, 2.0]])
    assert Aggregators.median_aggregate(values).tolist() == [largest, 1.5]
    single = torch.tensor([[1.0, 2.0]])
    Aggregators.median_aggregate(single).zero_()
    assert single.tolist() == [[1, 2]]


@pytest.mark.parametrize("weights", [[1.0, 3.0], torch.tensor([1, 3])])
def test_weights_need_not_sum_to_one(weights: list[float] | torch.Tensor) -> None:
    vectors = [torch.tensor([0.0, 4.0]), torch.tensor([4.0, 0.0])]
    assert Aggregators.fedavg_aggregate(vectors, weights).tolist() == [3, 1]
