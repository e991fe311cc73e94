"""Assignment of clients to trainers. The choice never changes a result, only how long the slowest trainer works."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

_BASE_SAMPLES = 20
"""Fixed cost of a client (reset, accumulate, report), in samples of local training that take as long."""

_MEMORY = 0.8  # of what was seen up to the last round, this much counts in the next


class CostModel:
    """Cost of training a client: base + samples x rate, fitted to the seconds that clients have taken.

    Attributes:
        moments: (5,) all that was learnt: sums of 1, n, n^2, seconds, n x seconds.
    """

    def __init__(self) -> None:
        """Before the first client the base counts as so many samples."""
        self.moments = np.zeros(5)

    def observe(self, num_samples: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        """Learn from the clients of one round: (K,) sample counts and (K,) wall times."""
        n = num_samples.astype(np.float64)
        new = np.array([len(n), n.sum(), n @ n, seconds.sum(), n @ seconds])
        self.moments = _MEMORY * self.moments + new

    def costs(self, num_samples: NDArray[np.int64]) -> NDArray[np.float64]:
        """(K,) expected costs, in seconds or, before anything was observed, in samples."""
        count, total, squares, seconds, products = self.moments
        spread = count * squares - total * total
        if spread > 1e-9 * squares:
            rate = (count * products - total * seconds) / spread
            base = (seconds - rate * total) / count
            if rate > 0:
                return max(base, 0.0) + rate * num_samples
        return _BASE_SAMPLES + num_samples.astype(np.float64)


def place(
    cohort: NDArray[np.int64], costs: NDArray[np.float64], num_trainers: int, num_clients: int
) -> NDArray[np.int64]:
    """Longest processing time first: the costliest client left goes to the least loaded trainer.

    With as many clients in all as trainers, client k always goes to trainer k (rank k + 1), whoever else takes part; a
    cohort with as many clients as trainers is placed in order.

    Args:
        cohort: (K,) client ids, ascending.
        costs: (K,) their expected costs.
        num_trainers: trainer ranks.
        num_clients: clients in all.

    Returns:
        (K,) trainer indices in [0, num_trainers).

    Source: Graham, "Bounds on multiprocessing timing anomalies", 1969.
    """
    if is_pinned(len(cohort), num_trainers, num_clients):
        return cohort.copy() if num_clients == num_trainers else np.arange(num_trainers)
    trainers = np.zeros(len(cohort), np.int64)
    loads = [(0.0, trainer) for trainer in range(num_trainers)]
    for i in np.argsort(-costs, kind="stable"):
        load, trainer = heapq.heappop(loads)
        trainers[i] = trainer
        heapq.heappush(loads, (load + float(costs[i]), trainer))
    return trainers


def is_pinned(cohort_size: int, num_trainers: int, num_clients: int) -> bool:
    """Return True if each client has a trainer of its own, so that there is nothing to balance."""
    return num_trainers in (num_clients, cohort_size)


def queue(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """(K,) each client's place in the queue from which idle trainers draw the next: the costliest first."""
    places = np.empty(len(costs), np.int64)
    places[np.argsort(-costs, kind="stable")] = np.arange(len(costs))
    return places
