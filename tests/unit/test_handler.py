"""The server half: cohorts, the step, when to stop, and what has to arrive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmpi.core.evaluate import Metrics
from fedmpi.core.exactsum import ExactSum
from fedmpi.errors import ConfigError
from fedmpi.fedlab.aggregate import Aggregators
from fedmpi.fedlab.handler import ParameterServerBackendHandler, SyncParameterServerHandler


def handler(num_clients: int = 100, model: nn.Module | None = None, **options: Any) -> SyncParameterServerHandler:
    made = SyncParameterServerHandler(model or nn.Linear(1, 1), num_clients, **options)
    made.client_sizes = np.arange(1, num_clients + 1)
    return made


def cohorts(server: SyncParameterServerHandler, rounds: int) -> list[list[int]]:
    drawn = []
    for server.round_idx in range(rounds):
        drawn.append(server.sample_clients().tolist())
    return drawn


@pytest.mark.parametrize("seed", [0, 1, 2, 2**63 - 1])
def test_fifty_cohorts_of_ten_in_a_hundred(seed: int) -> None:
    """Case F2. 50 draws of 10 leave 100 x 0.9^50 = 0.5 clients out on average."""
    drawn = cohorts(handler(sample_ratio=0.1, seed=seed), 50)
    assert {len(set(cohort)) for cohort in drawn} == {10}
    assert all(cohort == sorted(cohort) for cohort in drawn)
    assert len({k for cohort in drawn for k in cohort}) >= 95
    assert {k for cohort in drawn for k in cohort} <= set(range(100))
    assert len({tuple(cohort) for cohort in drawn}) == 50


def test_cohorts_depend_on_seed_and_round_and_nothing_else() -> None:
    usual = cohorts(handler(sample_ratio=0.1), 5)
    torch.manual_seed(17)
    other = handler(model=nn.Linear(3, 2), cohort_size=10, server_lr=0.5, rounds=99, target_accuracy=0.5)
    assert cohorts(other, 5) == usual
    other.round_idx = 3
    assert other.sample_clients().tolist() == usual[3], "whatever was drawn before"
    other.seed = 1
    assert cohorts(other, 5) != usual


def test_every_client_is_drawn_equally_often() -> None:
    """2,000 draws of 2 in 8: each client 500 times, standard deviation sqrt(2000 x 0.25 x 0.75) = 19.4."""
    counts = np.bincount(np.concatenate(cohorts(handler(8, cohort_size=2), 2000)), minlength=8)
    assert np.abs(counts - 500).max() < 5 * 19.4


@pytest.mark.parametrize(
    ("num_clients", "ratio", "size"),
    [(100, 0.1, 10), (100, 1.0, 100), (20, 0.001, 1), (20, 0.07, 1), (20, 0.075, 2), (10, 0.25, 3), (3, 0.5, 2)],
)
def test_the_ratio_is_rounded_to_the_nearest_count_and_at_least_one(num_clients: int, ratio: float, size: int) -> None:
    server = handler(num_clients, sample_ratio=ratio)
    assert server.cohort_size == size
    assert len(server.sample_clients()) == size


class Weighted(SyncParameterServerHandler):
    """A cohort and weights of its own; `given` says which."""

    given: Any

    def sample_clients(self) -> Any:
        cohort, weights = self.given
        if weights is not None:
            self.weights = weights
        return cohort


def weighted(cohort: Any, weights: Any) -> Weighted:
    server = Weighted(nn.Linear(1, 1), 10)
    server.client_sizes = np.arange(10, 20)
    server.given = np.array(cohort), weights
    return server


@pytest.mark.parametrize(
    ("cohort", "weights", "travel"),
    [
        ([1, 4], None, [11, 14]),
        ([4, 1], None, [11, 14]),
        ([4, 1], [5, 7], [7, 5]),
        ([4, 1], np.array([5.0, 0.0]), [0, 5]),
        ([4, 1], torch.tensor([0.25, 0.5], requires_grad=True), [2**30, 2**29]),
        ([4, 1], [1 / 3, 1.0], [2**30, 357913941]),
        ([4, 1], [2**40, 2**39], [2**29, 2**30]),
        ([1, 4], [0.0, 0.0], [0, 0]),
        ([], None, []),
        ([], [], []),
    ],
)
def test_the_weights_that_travel(cohort: list[int], weights: Any, travel: list[int]) -> None:
    """Whole numbers as they are; others with the largest at 2^30 (2^30 / 3 = 357,913,941.33)."""
    server = weighted(cohort, weights)
    assert server.begin_round().tolist() == travel
    assert server.cohort.tolist() == sorted(cohort)
    assert len(server.weights) == len(cohort)


def test_weights_of_one_round_do_not_stay_for_the_next() -> None:
    server = weighted([1, 4], None)
    assert server.begin_round().tolist() == [11, 14]
    server.given = np.array([2, 3]), None
    assert server.begin_round().tolist() == [12, 13]


def test_weights_set_once_and_for_all_stay() -> None:
    server = weighted([1, 4], None)
    server.weights = np.array([3, 9])
    assert [server.begin_round().tolist() for _ in range(2)] == [[3, 9], [3, 9]]


class Derived(SyncParameterServerHandler):
    """Changes what the inherited method made."""

    change: str

    def sample_clients(self) -> Any:
        cohort = super().sample_clients()
        if self.change == "fewer":
            return cohort[:2]
        if self.change == "others":
            return np.array([5, 6, 7])
        if self.change == "in place":
            self.weights *= 2
        if self.change == "root":
            self.weights = self.weights**0.5
        return cohort


@pytest.mark.parametrize("change", ["fewer", "others", "in place", "root"])
def test_a_cohort_made_of_the_inherited_one(change: str) -> None:
    """Counts go with the clients; what was made of the counts goes as it is."""
    server = Derived(nn.Linear(1, 1), 8, cohort_size=3)
    server.client_sizes, server.change = np.arange(1, 9), change
    for server.round_idx in range(3):
        travel = server.begin_round()
        sizes = server.cohort + 1
        wanted = {"in place": 2 * sizes, "root": sizes**0.5}.get(change, sizes)
        assert travel / travel.sum() == pytest.approx(wanted / wanted.sum(), rel=1e-8)
        assert len(travel) == (2 if change == "fewer" else 3)


@pytest.mark.parametrize(
    ("cohort", "weights", "says"),
    [
        ([1, 1], None, "client 1 is twice in the cohort: give it twice the weight"),
        ([1, 10], None, r"client ids must be in \[0, 10\), got 1 to 10"),
        ([-1, 3], None, "got -1 to 3"),
        ([[1, 2]], None, r"must return client ids, got int64 of shape \(1, 2\)"),
        ([0.5], None, "must return client ids, got float64"),
        ([1, 4], [1, 2, 3], "weights must be one number for each of 2 clients, got 3"),
        ([1, 4], [1, -2], "weights must be finite numbers >= 0.*got -2"),
        ([1, 4], [1, float("nan")], "got nan"),
        ([1, 4], [1, float("inf")], "got inf"),
        ([1, 4], ["a", "b"], "weights must be numbers >= 0"),
        ([1, 4], (weight for weight in (1, 2)), "one number per client of the cohort, got a generator"),
    ],
)
def test_what_is_no_cohort_is_refused(cohort: Any, weights: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        weighted(cohort, weights).begin_round()


def test_a_full_cohort_is_everybody() -> None:
    assert handler(7).sample_clients().tolist() == list(range(7))


@pytest.mark.parametrize("options", [{"cohort_size": 0}, {"cohort_size": 11}, {"sample_ratio": 1.2}])
def test_impossible_cohorts_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^a cohort has 1 to 10 clients \(num_clients\), got \d+$"):
        handler(10, **options)


def test_weights_are_the_sizes_of_the_cohort() -> None:
    server = handler(cohort_size=5)
    assert server.weights.shape == (0,)
    cohort = server.sample_clients()
    assert server.cohort is cohort
    assert server.weights.tolist() == [k + 1 for k in cohort]


@pytest.mark.parametrize(
    ("done", "accuracy", "stops"),
    [(0, None, False), (2, None, False), (3, None, True), (4, None, True), (1, 0.79, False), (1, 0.8, True)],
)
def test_stop_after_the_rounds_or_at_the_target(done: int, accuracy: float | None, stops: bool) -> None:
    server = handler(rounds=3, target_accuracy=0.8)
    server.round_idx = done
    server.metrics = None if accuracy is None else Metrics(accuracy, 0.5, 100)
    assert server.stop_condition() is stops


def test_without_a_target_no_accuracy_stops() -> None:
    server = handler(rounds=3)
    server.metrics = Metrics(1.0, 0.0, 100)
    assert not server.stop_condition()


def scalar(value: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_the_step_goes_along_the_mean_update_in_float64() -> None:
    server = handler(model=scalar(1.0), server_lr=0.5)
    server.step(torch.tensor([3.0], dtype=torch.float64))
    assert server.model_parameters.tolist() == [2.5]
    assert server.model.weight.item() == 2.5, "the vector is the model"
    small = handler(model=scalar(1.0))
    small.step(torch.tensor([2.0**-24 + 2.0**-50], dtype=torch.float64))
    assert small.model_parameters.item() == 1 + 2.0**-23, "rounded once, up; in float32 the half would round to even"


def test_whole_vectors_give_the_bits_of_the_exact_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    server = handler(4, nn.Linear(30, 10), cohort_size=4, server_lr=0.9)
    server.client_sizes = np.array([600, 1, 33, 250])
    server.sample_clients()
    reference = server.model_parameters.clone()
    rows = [reference + 0.1 * torch.randn(len(reference), generator=generator) for _ in range(4)]
    server.update_model(rows)
    by_rows = server.model_parameters.clone()
    exact = ExactSum(reference, 884, 600)
    for k in (2, 0, 3, 1):
        exact.add(rows[k], int(server.client_sizes[k]))
    server.model_parameters.copy_(reference)
    server.step(exact.mean())
    assert torch.equal(server.model_parameters, by_rows)
    mean = Aggregators.fedavg_aggregate(rows, server.weights.tolist())
    assert torch.allclose(by_rows, reference + 0.9 * (mean - reference), atol=1e-6)


def test_as_many_vectors_as_clients() -> None:
    server = handler(3)
    server.sample_clients()
    with pytest.raises(ValueError, match="zip"):
        server.update_model([server.model_parameters.clone()])


class Median(SyncParameterServerHandler):
    def aggregate(self, rows: Tensor, reference: Tensor) -> Tensor:
        return Aggregators.median_aggregate(rows)


class Unweighted(SyncParameterServerHandler):
    def update_model(self, model_parameters_list: list[Tensor]) -> None:
        self.model_parameters.copy_(torch.stack(model_parameters_list).mean(0))


class Momentum(SyncParameterServerHandler):
    def step(self, mean_update: Tensor) -> None:
        super().step(0.9 * mean_update)


class Both(Unweighted, Median):
    pass


@pytest.mark.parametrize(
    ("kind", "needs"),
    [(SyncParameterServerHandler, "sum"), (Momentum, "sum"), (Median, "blocks"), (Unweighted, "rows"), (Both, "rows")],
)
def test_what_is_overridden_decides_what_has_to_arrive(kind: type[SyncParameterServerHandler], needs: str) -> None:
    assert kind(nn.Linear(1, 1), 3).needs() == needs
    inherited = type("Inherited", (kind,), {})
    assert inherited(nn.Linear(1, 1), 3).needs() == needs


def test_aggregate_says_that_it_is_to_be_overridden() -> None:
    with pytest.raises(NotImplementedError, match="override aggregate"):
        handler().aggregate(torch.zeros(1, 1), torch.zeros(1))


def test_integer_buffers_keep_the_largest_value_of_the_cohort() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1))
    server = handler(model=model)
    assert server.integer_state().tolist() == [0, 0]
    server.update_integer_state([np.array([3, 4]), np.array([5, 1]), np.array([0, 2])])
    assert server.integer_state().tolist() == [5, 4]
    assert model[0].num_batches_tracked.dtype == torch.int64
    server.update_integer_state([])
    assert server.integer_state().tolist() == [5, 4]
    plain = handler()
    plain.update_integer_state([np.empty(0, np.int64)])
    assert plain.integer_state().shape == (0,)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6))
def test_a_cohort_that_agrees_takes_the_server_there(values: list[float]) -> None:
    """All clients end at the same w: whatever the weights, the mean is w, to the rounding of one float32."""
    server = handler(len(values), model=scalar(0.25))
    server.sample_clients()
    server.update_model([torch.tensor([values[0]])] * len(values))
    assert server.model_parameters.item() == pytest.approx(values[0], rel=2**-23, abs=2**-40)


def test_the_base_class_wants_both_methods() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ParameterServerBackendHandler(nn.Linear(1, 1))  # type: ignore[abstract]
