"""Placement of clients: complete, by the pinned rules, and within Graham's bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpi.core.schedule import CostModel, place, queue
from fedmpi.mpi.work_queue import batch_size

sizes = st.lists(st.integers(0, 60_000), min_size=1, max_size=60)


@given(sizes, st.integers(1, 12))
def test_every_client_has_one_trainer_and_loads_are_within_the_bound(num_samples: list[int], num_trainers: int) -> None:
    cohort = np.arange(len(num_samples), dtype=np.int64) * 3
    costs = np.array(num_samples) + 20.0
    trainers = place(cohort, costs, num_trainers, 10_000)
    assert trainers.shape == cohort.shape
    assert trainers.dtype == np.int64
    assert set(trainers.tolist()) <= set(range(num_trainers))
    loads = np.bincount(trainers, weights=costs, minlength=num_trainers)
    assert loads.sum() == costs.sum()
    assert loads.max() - loads.min() <= costs.max()
    if len(cohort) != num_trainers:
        best_possible = max(costs.sum() / num_trainers, costs.max())
        assert loads.max() <= (4 / 3 - 1 / (3 * num_trainers)) * max(best_possible, _two_smallest(costs, num_trainers))


def _two_smallest(costs: np.ndarray, num_trainers: int) -> float:
    """With more clients than trainers two of the first T + 1 share a trainer, in any placement."""
    if len(costs) <= num_trainers:
        return 0.0
    largest = np.sort(costs)[::-1]
    return float(largest[num_trainers - 1] + largest[num_trainers])


def test_the_costliest_goes_first_to_the_least_loaded() -> None:
    """Costs 120, 70, 60, 50, 40 on two trainers: 120 | 70, 60 | and then 50 beside 120, 40 beside 130: 170 and 170."""
    cohort = np.array([1, 2, 3, 4, 5])
    assert place(cohort, np.array([40, 120, 60, 70, 50]), 2, 100).tolist() == [1, 0, 1, 1, 0]


def test_as_many_clients_in_all_as_trainers_pins_client_k_to_trainer_k() -> None:
    cohort = np.array([1, 2, 6])
    placed = place(cohort, np.array([5, 500, 50]), 7, 7)
    assert placed.tolist() == [1, 2, 6]
    placed[0] = 3
    assert cohort[0] == 1, "a copy"


def test_a_cohort_of_as_many_clients_as_trainers_is_placed_in_order() -> None:
    assert place(np.array([4, 40, 44]), np.array([1, 3, 2]), 3, 100).tolist() == [0, 1, 2]


def test_one_trainer_takes_all() -> None:
    assert place(np.arange(5), np.arange(5), 1, 100).tolist() == [0] * 5


def test_equal_clients_spread_evenly() -> None:
    for num_trainers in (2, 3, 5, 10):
        trainers = place(np.arange(30), np.full(30, 600), num_trainers, 100)
        assert set(np.bincount(trainers, minlength=num_trainers)) == {30 // num_trainers}


def test_more_trainers_than_clients_leaves_some_idle() -> None:
    assert sorted(place(np.array([3, 9]), np.array([10, 10]), 5, 100)) == [0, 1]


@given(sizes)
def test_the_line_is_a_permutation_with_the_costliest_first(num_samples: list[int]) -> None:
    costs = np.array(num_samples, np.float64)
    places = queue(costs)
    assert sorted(places.tolist()) == list(range(len(costs)))
    assert (np.diff(costs[np.argsort(places)]) <= 0).all()


def test_before_the_first_client_costs_follow_the_samples() -> None:
    assert CostModel().costs(np.array([0, 10, 600])).tolist() == [20, 30, 620]


@given(st.floats(0, 2), st.floats(1e-4, 1))
def test_costs_are_fitted_to_the_seconds_that_clients_took(base: float, rate: float) -> None:
    model, n = CostModel(), np.array([6, 60, 600, 10])
    for _ in range(3):
        model.observe(n, base + rate * n)
    np.testing.assert_allclose(
        model.costs(np.array([1, 1000])), [base + rate, base + 1000 * rate], rtol=1e-3, atol=1e-6
    )


def test_a_machine_that_changes_its_pace_is_followed() -> None:
    model, n = CostModel(), np.array([10, 100])
    for pace in [1.0] * 10 + [4.0] * 10:
        model.observe(n, pace * n)
    assert 3.5 < model.costs(np.array([100]))[0] / 100 <= 4


def test_equal_clients_leave_the_first_guess_alone() -> None:
    model = CostModel()
    model.observe(np.array([60, 60]), np.array([1.0, 3.0]))
    assert model.costs(np.array([60])).tolist() == [80]


@pytest.mark.parametrize(("num_trainers", "most"), [(2, 5), (10, 1), (19, 1), (50, 1)])
def test_no_draw_leaves_others_without(num_trainers: int, most: int) -> None:
    """20 clients of one step, of which a draw takes 12 where there are many: half of an even share."""
    left, draws = 20, []
    while left:
        draws.append(batch_size(left, num_trainers, 12))
        left -= draws[-1]
    assert max(draws) <= most
    assert draws[-1] == 1


@given(st.integers(1, 10**6), st.integers(1, 1000), st.integers(1, 20))
def test_a_draw_is_within_what_is_left(num_left: int, num_trainers: int, least: int) -> None:
    assert 1 <= batch_size(num_left, num_trainers, least) <= num_left


def test_many_clients_are_drawn_many_at_a_time() -> None:
    assert batch_size(1000, 2, 12) == 31
    assert batch_size(100, 2, 12) == 12
    assert batch_size(100, 2, 1) == 3
