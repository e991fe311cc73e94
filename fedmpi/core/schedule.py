"""Which trainer takes which client. The choice never changes a result, only how long the slowest trainer works."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

CLIENT_BASE_SAMPLES = 20
"""Fixed cost of a client (reset, accumulate, report), in samples of local training that take as long."""


def place(
    cohort: NDArray[np.int64], num_samples: NDArray[np.int64], num_trainers: int, num_clients: int
) -> NDArray[np.int64]:
    """Longest processing time first: the costliest client left goes to the least loaded trainer.

    With as many clients in all as trainers, client k always goes to trainer k (rank k + 1), whoever else takes part; a
    cohort with as many clients as trainers is placed in order.

    Args:
        cohort: (K,) client ids, ascending.
        num_samples: (K,) their sample counts.
        num_trainers: trainer ranks.
        num_clients: clients in all.

    Returns:
        (K,) trainer indices in [0, num_trainers).

    Source: Graham, "Bounds on multiprocessing timing anomalies", 1969.
    """
    if num_clients == num_trainers:
        return cohort.copy()
    if len(cohort) == num_trainers:
        return np.arange(num_trainers)
    trainers = np.zeros(len(cohort), np.int64)
    loads = [(0, trainer) for trainer in range(num_trainers)]
    for i in np.argsort(-num_samples, kind="stable"):
        load, trainer = heapq.heappop(loads)
        trainers[i] = trainer
        heapq.heappush(loads, (load + int(num_samples[i]) + CLIENT_BASE_SAMPLES, trainer))
    return trainers
