"""Pure aggregators over rows: (K, P) clients' vectors, or any block of their columns, -> (P,).

Shapes: K cohort, P vector entries (or a block of them).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Aggregators:
    """FedLab's name for ways to make one vector of many."""

    @staticmethod
    def fedavg_aggregate(
        serialized_params_list: list[Tensor] | Tensor, weights: list[float] | Tensor | None = None
    ) -> Tensor:
        """(P,) float32: the weighted mean, summed in float64 in the order of the rows; equal weights when None."""
        rows = _stack(serialized_params_list).to(torch.float64)
        if weights is None:
            return rows.mean(0).float()
        w = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
        return (w / w.sum()).matmul(rows).float()

    @staticmethod
    def median_aggregate(serialized_params_list: list[Tensor] | Tensor) -> Tensor:
        """(P,) float32: the coordinate-wise median, the mean of the middle two when K is even.

        Source: Yin et al., "Byzantine-robust distributed learning", ICML 2018, arXiv 1803.01498, option I.
        """
        rows = _stack(serialized_params_list).sort(0).values
        middle = len(rows) // 2
        if len(rows) % 2:
            return rows[middle].clone()
        return ((rows[middle - 1].double() + rows[middle].double()) / 2).float()

    @staticmethod
    def fedasync_aggregate(server_param: Tensor, new_param: Tensor, alpha: float | Tensor) -> Tensor:
        """(P,) float32: (1 - alpha) server_param + alpha new_param, in float64.

        Source: Xie et al., "Asynchronous federated optimization", 2019, arXiv 1903.03934, algorithm 1.

        Raises:
            ValueError: vectors of two shapes, or alpha outside [0, 1].
        """
        if server_param.shape != new_param.shape:
            raise ValueError(f"two vectors of one shape are mixed, got {server_param.shape} and {new_param.shape}")
        share = float(alpha)
        if not 0 <= share <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {share}")
        return ((1 - share) * server_param.double() + share * new_param.double()).float()


def _stack(rows: list[Tensor] | Tensor) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.stack(rows)
