"""The exact sum: no order, no dependence on who adds what, and an error within the stated bound."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmpi.core.exactsum import ExactSum, Reference, scale_exponent

FLOAT32_MAX = float(np.finfo(np.float32).max)
WIDTH = 4

weights = st.integers(0, 60_000)
small = st.floats(-100, 100, width=32)
any_size = st.one_of(small, st.floats(-FLOAT32_MAX, FLOAT32_MAX, width=32, allow_nan=False, allow_infinity=False))


def clients(values: st.SearchStrategy[float], max_size: int = 8) -> st.SearchStrategy[list[tuple[list[float], int]]]:
    """Cohorts of (vector, weight), total weight above 0."""
    one = st.tuples(st.lists(values, min_size=WIDTH, max_size=WIDTH), weights)
    return st.lists(one, min_size=1, max_size=max_size).filter(lambda cohort: any(n for _, n in cohort))


def fresh(cohort: list[tuple[list[float], int]], reference: Tensor) -> ExactSum:
    return ExactSum(reference, sum(n for _, n in cohort), max(n for _, n in cohort))


def summed(cohort: list[tuple[list[float], int]], reference: Tensor) -> ExactSum:
    exact = fresh(cohort, reference)
    for vector, weight in cohort:
        assert exact.add(torch.tensor(vector), weight) is not None
    return exact


def merged(parts: list[ExactSum]) -> Tensor:
    """The mean after the sums over ranks were formed in the first rank's buffers, as `comm.collect` does."""
    num_bins = max(part.num_bins for part in parts)
    root, *others = [part.buffers(num_bins) for part in parts]
    for buffers in others:
        for total, buffer in zip(root, buffers, strict=True):
            total += buffer
    return parts[0].mean()


def true_mean(cohort: list[tuple[list[float], int]], reference: Tensor, column: int) -> Fraction:
    origin = Fraction(float(reference[column]))
    terms = [n * (Fraction(float(np.float32(vector[column]))) - origin) for vector, n in cohort]
    return sum(terms, Fraction(0)) / sum(n for _, n in cohort)


@given(clients(any_size), st.lists(small, min_size=WIDTH, max_size=WIDTH), st.data())
def test_neither_order_nor_ranks_change_a_bit(
    cohort: list[tuple[list[float], int]], origin: list[float], data: st.DataObject
) -> None:
    reference = torch.tensor(origin)
    usual = summed(cohort, reference).mean()
    num_ranks = data.draw(st.integers(1, 4))
    parts = [fresh(cohort, reference) for _ in range(num_ranks)]
    for vector, weight in data.draw(st.permutations(cohort)):
        parts[data.draw(st.integers(0, num_ranks - 1))].add(torch.tensor(vector), weight)
    assert merged(parts).numpy().tobytes() == usual.numpy().tobytes()


@given(
    clients(st.floats(-63, 63, width=32), max_size=40), st.lists(st.floats(-64, 64, width=32), min_size=4, max_size=4)
)
def test_the_mean_is_within_the_stated_bound(cohort: list[tuple[list[float], int]], origin: list[float]) -> None:
    reference = torch.tensor(origin)
    exact = summed(cohort, reference)
    assert exact.num_bins == 1
    total, largest = sum(n for _, n in cohort), max(n for _, n in cohort)
    bound = Fraction(largest * len(cohort), total) / 2**43
    for column, value in enumerate(exact.mean().tolist()):
        assert abs(Fraction(value) - true_mean(cohort, reference, column)) <= bound


@given(clients(any_size))
def test_large_updates_are_as_good_as_float64(cohort: list[tuple[list[float], int]]) -> None:
    reference = torch.zeros(WIDTH)
    mean = summed(cohort, reference).mean()
    total, largest = sum(n for _, n in cohort), max(n for _, n in cohort)
    bound = Fraction(largest * len(cohort), total) / 2**43
    for column, value in enumerate(mean.tolist()):
        greatest = max(abs(Fraction(float(np.float32(vector[column])))) for vector, _ in cohort)
        assert abs(Fraction(value) - true_mean(cohort, reference, column)) <= bound + greatest / 2**50


def test_the_bound_of_a_cohort_of_thousands() -> None:
    """2^13 clients of weight 1: the sum needs the room, so a term is rounded to 2^-41; off by half that at the most."""
    num_clients = 2**13
    assert scale_exponent(num_clients, 1) == 41
    rows = torch.rand(num_clients, 1, generator=torch.Generator().manual_seed(0))
    exact = ExactSum(torch.full((1,), 0.3), num_clients, 1)
    for row in rows:
        exact.add(row, 1)
    wanted = sum((Fraction(float(row)) - Fraction(float(np.float32(0.3))) for row in rows), Fraction(0)) / num_clients
    assert abs(Fraction(float(exact.mean()[0])) - wanted) <= Fraction(num_clients, 2**53)


def test_realistic_updates_give_the_float32_result_of_a_float64_sum() -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(2000, generator=generator) * 0.05
    vectors = [reference + 0.01 * torch.randn(2000, generator=generator) for _ in range(10)]
    sizes = [600, 1, 250, 599, 90, 33, 600, 480, 7, 120]
    exact = ExactSum(reference, sum(sizes), max(sizes))
    for vector, weight in zip(vectors, sizes, strict=True):
        assert exact.add(vector, weight) == 0
    wanted = [
        math.fsum(n * (float(v[i]) - float(reference[i])) for v, n in zip(vectors, sizes, strict=True)) / sum(sizes)
        for i in range(2000)
    ]
    new = (reference.double() + exact.mean()).float()
    assert torch.equal(new, (reference.double() + torch.tensor(wanted, dtype=torch.float64)).float())


@pytest.mark.parametrize(
    ("largest", "bin_idx"),
    [
        (0.0, 0), (2.0**-149, 0), (np.nextafter(np.float32(2**7), np.float32(0)), 0), (2.0**7, 1),
        (np.nextafter(np.float32(2**47), np.float32(0)), 1), (2.0**47, 2), (2.0**87, 3), (2.0**127, 4),
        (FLOAT32_MAX, 4),
    ],
)  # fmt: skip
def test_the_bin_depends_on_the_largest_entry_of_that_client(largest: float, bin_idx: int) -> None:
    for sign in (1, -1):
        exact = ExactSum(torch.zeros(3), 1, 1)
        vector = torch.tensor([1e-3, sign * float(largest), 0.0])
        assert exact.add(vector, 1) == bin_idx
        assert exact.num_bins == bin_idx + 1
        assert float(exact.mean()[1]) == pytest.approx(sign * float(largest), rel=0, abs=2.0**-45)


def test_the_widest_update_of_all_float32_vectors_has_a_bin() -> None:
    exact = ExactSum(torch.tensor([-FLOAT32_MAX]), 3, 2)
    assert exact.add(torch.tensor([FLOAT32_MAX]), 2) == 4
    assert exact.add(torch.tensor([-FLOAT32_MAX]), 1) == 0
    assert float(exact.mean()[0]) == pytest.approx(2 / 3 * 2 * FLOAT32_MAX, rel=1e-15)


def test_one_large_entry_costs_no_other_entry_its_bits() -> None:
    """A running variance that grew by 300 must not round away what the weights beside it have learnt."""
    exact = ExactSum(torch.zeros(3), 2, 1)
    assert exact.add(torch.tensor([300.0, 2.0**-40, 1e-3]), 1) == 1
    assert exact.add(torch.tensor([2.0**-40, 2.0**60, 0.0]), 1) == 2
    assert exact.mean().tolist() == [150 + 2.0**-41, 2.0**59, pytest.approx(float(np.float32(1e-3)) / 2, abs=2.0**-44)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_non_finite_vector_is_told_and_not_added(bad: float, where: int) -> None:
    exact = ExactSum(torch.zeros(3), 4, 3)
    exact.add(torch.tensor([1.0, 2.0, 3.0]), 3)
    before = exact.mean()
    vector = torch.tensor([5.0, 5.0, 5.0])
    vector[where] = bad
    assert exact.add(vector, 1) is None
    assert torch.equal(exact.mean(), before)
    assert exact.num_bins == 1


def test_a_cohort_without_samples_has_a_mean_of_zero() -> None:
    exact = ExactSum(torch.ones(2), 0, 0)
    assert exact.mean().tolist() == [0, 0]
    exact.add(torch.tensor([5.0, 6.0]), 0)
    assert exact.mean().tolist() == [0, 0]


def test_the_mean_may_be_asked_for_between_additions() -> None:
    exact = ExactSum(torch.zeros(1), 4, 2)
    exact.add(torch.tensor([1.0]), 2)
    assert float(exact.mean()[0]) == 0.5
    exact.add(torch.tensor([-3.0]), 2)
    assert float(exact.mean()[0]) == float(exact.mean()[0]) == -1


def test_empty_ranks_lend_zeroed_buffers_of_as_many_bins_as_asked_for() -> None:
    exact = ExactSum(torch.zeros(5), 10, 10)
    assert exact.num_bins == 0
    buffers = exact.buffers(3)
    assert [buffer.dtype for buffer in buffers] == [np.int64] * 3
    assert [buffer.shape for buffer in buffers] == [(5,)] * 3
    assert not np.any(buffers)


def test_the_reference_and_the_vectors_are_left_alone() -> None:
    reference, vector = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    exact = ExactSum(reference, 7, 7)
    exact.add(vector, 7)
    exact.mean()
    assert reference.tolist() == [1, 2]
    assert vector.tolist() == [3, 4]


@given(st.integers(1, 2**40), st.integers(1, 2**20))
def test_no_term_and_no_sum_leaves_its_range(weight_max: int, num_clients: int) -> None:
    """Worst case: every client has the largest weight and an update just below 2^7."""
    total = weight_max * num_clients
    exponent = scale_exponent(total, weight_max)
    assert Fraction(weight_max) * 2**7 * Fraction(2) ** exponent <= 2**51
    assert Fraction(total) * 2**7 * Fraction(2) ** exponent <= 2**61
    finer = Fraction(2) ** (exponent + 1)
    assert max(Fraction(weight_max) * 2**7 * finer / 2**51, Fraction(total) * 2**7 * finer / 2**61) > Fraction(1, 2)


def test_extreme_terms_come_back_exactly() -> None:
    """Terms at both ends of the range, where the float trick has the least room."""
    edge = float(np.nextafter(np.float32(2**7), np.float32(0)))
    for weight in (1, 2**16, 2**31):
        exact = ExactSum(torch.zeros(2), 2 * weight, weight)
        exact.add(torch.tensor([edge, -edge]), weight)
        exact.add(torch.tensor([edge, -edge]), weight)
        assert exact.mean().tolist() == [edge, -edge]


def test_entries_that_nobody_changed_add_nothing_whatever_they_are() -> None:
    """A causal mask of -inf, a NaN, an infinite bound beside a weight."""
    start = torch.tensor([1.0, -math.inf, math.nan, math.inf, -1e38])
    moved = start.clone()
    moved[0] = 3.0
    exact = ExactSum(start, 4, 3)
    assert exact.add(moved, 3) == 0
    assert exact.add(start.clone(), 1) == 0
    assert exact.mean().tolist() == [1.5, 0.0, 0.0, 0.0, 0.0]


def test_clients_may_start_from_different_vectors() -> None:
    """(2 x (3 - 1) + 1 x (7 - 5)) / 3 = 2."""
    exact = ExactSum(torch.tensor([1.0]), 3, 2)
    exact.add(torch.tensor([3.0]), 2)
    exact.add(torch.tensor([7.0]), 1, Reference(torch.tensor([5.0])))
    assert float(exact.mean()) == 2


@pytest.mark.parametrize("size", [1.0, 100.0, 127.0, 128.0, math.nan, math.inf])
def test_a_group_is_added_if_it_fits(size: float) -> None:
    """Two clients of weights 3 and 5 with one update: in bin 0 below 2^7, else nothing is added."""
    exact = ExactSum(torch.zeros(2), 16, 8)
    exact.add(torch.tensor([1.0, 2.0]), 8)
    fits = exact.add_group(torch.tensor([8 * size, -8.0], dtype=torch.float64), 8)
    assert fits == (size < 128)
    added = 8 * size if fits else 0
    assert exact.total().tolist() == [8 + added, 16 - 8 * fits]
    assert exact.num_bins == 1


def test_a_group_without_weight_adds_nothing_and_is_told_if_it_is_not_finite() -> None:
    exact = ExactSum(torch.zeros(1), 0, 0)
    assert exact.add_group(torch.zeros(1, dtype=torch.float64), 0)
    assert not exact.add_group(torch.tensor([math.nan], dtype=torch.float64), 0)
    assert exact.total().tolist() == [0]


@pytest.mark.parametrize(("entry", "value"), [(0, math.nan), (1, math.inf), (1, 0.0), (2, 1.0), (3, math.nan)])
def test_an_entry_that_changed_and_is_not_finite_is_no_sum(entry: int, value: float) -> None:
    start = torch.tensor([1.0, -math.inf, math.nan, math.inf])
    moved = start.clone()
    moved[entry] = value
    exact = ExactSum(start, 1, 1)
    assert exact.add(moved, 1) is None
    assert exact.num_bins == 0
