"""The clients of an exchange, and their weights, as a server's author gives them.

Shapes: K clients in the cohort.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fedmpi.core.order import ClientUpdate, IntArray
from fedmpi.errors import ConfigError


def cohort_size(num_clients: int, sample_ratio: float) -> int:
    """Return the nearest count (half up) to a share of the clients, at least 1."""
    return max(1, math.floor(sample_ratio * num_clients + 0.5))


def sample_cohort(seed: int, num_clients: int, count: int) -> IntArray:
    """(count,) distinct client ids, ascending; uniform."""
    return np.sort(np.random.default_rng(seed).choice(num_clients, count, replace=False, shuffle=False))


def checked_cohort(
    cohort: ArrayLike, num_clients: int, rule: str = "a cohort is client ids in one row"
) -> tuple[IntArray, IntArray]:
    """Return (K,) ascending client ids, and (K,) the places in `cohort` that they come from.

    Args:
        cohort: (K,) client ids in any order.
        num_clients: ids are below.
        rule: the beginning of the sentence that refuses anything else.

    Raises:
        ConfigError: they are no clients, or one of them comes twice.
    """
    ids = np.asarray(cohort)
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and len(ids)):
        raise ConfigError(f"{rule}, got {ids.dtype} of shape {ids.shape}")
    ids = ids.astype(np.int64)
    order = np.argsort(ids, kind="stable")
    ascending = ids[order]
    if len(ids) and not 0 <= ascending[0] <= ascending[-1] < num_clients:
        raise ConfigError(f"client ids must be in [0, {num_clients}), got {ascending[0]} to {ascending[-1]}")
    if (twice := ascending[1:][ascending[1:] == ascending[:-1]]).size:
        raise ConfigError(f"client {twice[0]} is twice in the cohort: give it twice the weight instead")
    return ascending, order


def weight_unit(given: Any, integers: IntArray) -> float:
    """Return what 1 of the integer weights is worth in the author's units.

    Args:
        given: (K,) weights as they were given, in any order.
        integers: (K,) what `exactsum.integer_weights` made of them.
    """
    largest = float(np.max(np.asarray(given, np.float64), initial=0.0))
    most = int(integers.max(initial=0))
    return 1.0 if largest == most or not most else largest / most


def aligned(values: ArrayLike | None, order: IntArray, name: str) -> IntArray | None:
    """Return integers per client, in ascending order of client ids."""
    if values is None:
        return None
    given = np.asarray(values)
    if given.shape != order.shape or (given.dtype.kind not in "iu" and given.size):
        raise ConfigError(
            f"{name} must be one integer for each of {len(order)} clients, got {given.dtype} {given.shape}"
        )
    return given.astype(np.int64)[order]


def reported_means(updates: Sequence[ClientUpdate], ids: IntArray, weights: IntArray) -> dict[str, float]:
    """Return the weighted means of what visits of these clients reported, by name; NaN if the weights are 0."""
    weight_of = dict(zip(ids.tolist(), weights.tolist(), strict=True))
    inside = [update for update in updates if update.client_id in weight_of]
    means = {}
    for name in sorted({name for update in inside for name in update.reported}):
        numbers = [(weight_of[u.client_id], u.reported[name]) for u in inside if name in u.reported]
        told = [(weight, value) for weight, value in numbers if weight]  # 0 x NaN would be NaN
        whole = sum(weight for weight, _ in told)
        means[name] = math.fsum(weight * value for weight, value in told) / whole if whole else math.nan
    return means
