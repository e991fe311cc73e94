"""Power-of-choice: the candidates with the largest losses train."""

from __future__ import annotations

import math

import pytest
import torch

from fedmpi.algorithms.power_of_choice import PowerOfChoice
from fedmpi.errors import ConfigError
from fedmpi.fedavg import FedAvg
from tests.rounds import noise, play, points, stack, two_weights


def test_one_round_by_hand() -> None:
    """Four clients of one sample, w = 1/2: label 1 of a larger x fits worst, its loss is log(1 + exp(x)).

    x = 1, 2, 3 with label 1 and 9 with label 0: losses 1.313, 2.127, 3.049, 0.000. Two train: clients 1 and 2.
    Gradients p x: w = 1/2 - lr (p_1 2 + p_2 3) / 2 with p = 1 / (1 + exp(-x)).
    """
    data = points([1, 2, 3, 9], [1, 1, 1, 0])
    played = play(
        PowerOfChoice, data, [1] * 4, lambda: two_weights(0.5), cohort_size=2, candidates=4, client_lr=0.25,
    )  # fmt: skip
    p1, p2 = (1 / (1 + math.exp(-x)) for x in (2, 3))
    assert played.records[0].cohort == [1, 2]
    assert played.w[0].item() == pytest.approx(0.5 - 0.25 * (2 * p1 + 3 * p2) / 2, rel=1e-6)
    asked = [math.log(1 + math.exp(x)) for x in (1, 2, 3)] + [math.log(1 + math.exp(-9))]
    assert played.records[0].reported["local_loss"] == pytest.approx(sum(asked) / 4, abs=1e-6)


def test_of_equal_losses_the_first_train() -> None:
    played = play(PowerOfChoice, points([1] * 5, [0] * 5), [1] * 5, cohort_size=2, candidates=5)
    assert played.records[0].cohort == [0, 1]


def test_with_as_many_candidates_as_trained_clients_it_is_fedavg() -> None:
    options = {"batch_size": 4, "rounds": 3, "cohort_size": 3}
    chosen = play(PowerOfChoice, noise(), [10] * 6, stack, candidates=3, **options)
    plain = play(FedAvg, noise(), [10] * 6, stack, **options)
    assert torch.equal(chosen.vector, plain.vector)
    assert chosen.records == plain.records
    assert not torch.equal(play(PowerOfChoice, noise(), [10] * 6, stack, **options).vector, plain.vector)


def test_a_client_without_samples_comes_last() -> None:
    played = play(PowerOfChoice, points([5, 5], [0, 0]), [0, 1, 0, 1], lambda: two_weights(2.0), cohort_size=2)
    assert played.records[0].cohort == [1, 3]


def test_asking_costs_no_model_on_the_way_back() -> None:
    """Down: four candidates and two trained clients get two entries each. Up: four numbers, and two models."""
    played = play(PowerOfChoice, points([1, 2, 3, 4], [0] * 4), [1] * 4, cohort_size=2, candidates=4)
    assert (played.records[0].bytes_down, played.records[0].bytes_up) == (6 * 2 * 4, 4 * 8 + 2 * 2 * 4)


def test_the_number_of_candidates_has_bounds() -> None:
    config = PowerOfChoice.Config
    assert config(num_clients=20, cohort_size=4).num_candidates == 8
    assert config(num_clients=20, cohort_size=15).num_candidates == 20
    for candidates in (3, 21):
        with pytest.raises(ConfigError, match=rf"--candidates must be in \[4, 20\].*got {candidates}"):
            config(num_clients=20, cohort_size=4, candidates=candidates).check()
