"""The trimmed mean: values at both ends of a coordinate do not count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmpi.algorithms.trimmed_mean import TrimmedMean
from fedmpi.fedavg import FedAvg
from tests.rounds import noise, play, points, stack


def test_one_round_by_hand() -> None:
    """Five clients of one sample of label 0, x = 1, 2, 3, 4, 100, lr = 1: at w = 0 client k gets to x_k / 2.

    A share of 0.2 drops one of five at each end: (1 + 1.5 + 2) / 3 = 1.5, where the mean is 11; 0.4 leaves the median.
    """
    data = points([1, 2, 3, 4, 100], [0] * 5)
    for share, value in ((0.0, 11.0), (0.2, 1.5), (0.39, 1.5), (0.4, 1.5), (0.19, 11.0)):
        played = play(TrimmedMean, data, [1] * 5, client_lr=1.0, trimmed_share=share)
        assert played.w.tolist() == [value, -value], share
    assert play(TrimmedMean, data, [1] * 5, client_lr=1.0, trimmed_share=0.2, server_lr=0.5).w[0] == 0.75


@pytest.mark.parametrize(("share", "num_clients", "cut"), [(0.29, 100, 29), (0.1, 30, 3), (0.3, 10, 3), (0.49, 2, 0)])
def test_a_share_is_rounded_down_to_whole_clients(share: float, num_clients: int, cut: int) -> None:
    algorithm = TrimmedMean(TrimmedMean.Config(trimmed_share=share))
    values = torch.arange(num_clients, dtype=torch.float32).reshape(-1, 1) ** 3
    mean = algorithm.trimmed(values.flip(0), values[0])
    assert mean.item() == values[cut : num_clients - cut].to(torch.float64).mean().item()


def test_with_nothing_trimmed_it_is_fedavg_of_equal_clients() -> None:
    """On numbers of few bits (x of 3 bits, lr 1/4, four clients), where both ways to add are exact."""
    data = points([1, 2, -3, 4, 5, -6, 7, 1], [0, 1, 0, 0, 1, 1, 0, 1])
    trimmed = play(TrimmedMean, data, [2] * 4, client_lr=0.25, trimmed_share=0.0)
    plain = play(FedAvg, data, [2] * 4, client_lr=0.25, group_clients=1)
    assert torch.equal(trimmed.vector, plain.vector)
    assert trimmed.records == plain.records


def test_with_nothing_trimmed_it_is_the_mean() -> None:
    """On any numbers: to the last bit but one, after one round. BatchNorm's statistics to the last."""
    trimmed = play(TrimmedMean, noise(), [20, 20, 20], stack, batch_size=8, trimmed_share=0.0)
    plain = play(FedAvg, noise(), [20, 20, 20], stack, batch_size=8)
    torch.testing.assert_close(trimmed.w, plain.w, rtol=2.0**-23, atol=0)
    num_trainable = len(plain.w)
    assert torch.equal(trimmed.vector[num_trainable:], plain.vector[num_trainable:])


def test_it_is_numpys() -> None:
    """scipy.stats.trim_mean by hand, over the models of clients that were run one by one."""
    options = {"batch_size": 8, "client_lr": 0.3}
    sizes = [12] * 5
    alone = []
    for client_id in range(5):

        class One(FedAvg):
            chosen = client_id

            def round(self, s: object) -> None:
                mean = s.mean([self.chosen], self.client_update)  # type: ignore[attr-defined]  # a Server
                s.step("w", mean.w)  # type: ignore[attr-defined]  # a Server

        alone.append(play(One, noise(), sizes, stack, **options).w.numpy())
    ascending = np.sort(np.stack(alone).astype(np.float64), 0)
    played = play(TrimmedMean, noise(), sizes, stack, trimmed_share=0.25, **options)
    np.testing.assert_array_equal(played.w.numpy(), ascending[1:4].mean(0).astype(np.float32))
