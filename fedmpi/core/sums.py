"""The exact sums of one exchange: one per bucket of clients and segment of the vector that comes back.

Shapes: V entries of a flat vector, K clients in the cohort.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedmpi.core.exactsum import ExactSum, Reference
from fedmpi.core.order import Collect, Order
from fedmpi.core.segments import Layout, Segments
from fedmpi.mpi.comm import Comm
from fedmpi.mpi.tree import sum_bins


class UpdateSums:
    """Sums of weighted updates `back - sent` of an order's clients; this rank's part, or all of it on the server."""

    def __init__(self, layout: Layout, sent: Sequence[Tensor], order: Order) -> None:
        """Start empty.

        Args:
            layout: of the flat vectors.
            sent: (V,) float32 each, what the server sent.
            order: its cohort, weights and buckets.
        """
        self._order, self._layout = order, layout
        rows = order.weight_rows()
        summed = [segment for segment in layout.sent_up() if order.collect == Collect.SUM or segment.name == "b"]
        self._rows = {segment.name: rows[i if len(rows) > 1 else 0] for i, segment in enumerate(layout.sent_up())}
        self._segments = summed
        self._references = [{segment.name: Reference(one[segment.columns]) for segment in summed} for one in sent]
        buckets = order.buckets if len(order.buckets) else np.zeros(len(order.cohort), np.int64)
        self._sums: dict[tuple[int, str], ExactSum] = {}
        for bucket in range(order.num_buckets):
            for segment in summed:
                i = layout.sent_up().index(segment) if len(rows) > 1 else 0
                total = int(self._rows[segment.name][buckets == bucket].sum())
                reference = self._references[0][segment.name]
                self._sums[bucket, segment.name] = ExactSum(reference, total, int(order.unit_max[i]))

    def add(self, client_id: int, back: Tensor) -> bool:
        """Add what one client sends back, (V,) float32.

        Returns:
            False if some of it is not finite.
        """
        place = self._order.place_of(client_id)
        bucket, references = self._order.bucket_of(place), self._references[self._order.send_of(place)]
        finite = True
        for segment in self._segments:
            exact, weight = self._sums[bucket, segment.name], int(self._rows[segment.name][place])
            finite &= exact.add(back[segment.columns], weight, reference=references[segment.name]) is not None
        return finite

    def add_group(self, client_ids: Sequence[int], update: Tensor) -> bool:
        """Add what clients of one bucket together came to: (T,) float64, the sum of their weighted updates of `w`.

        Returns:
            False if it does not fit or is not finite; then nothing was added.
        """
        places = [self._order.place_of(client_id) for client_id in client_ids]
        exact = self._sums[self._order.bucket_of(places[0]), "w"]
        return exact.add_group(update, int(self._rows["w"][places].sum()))

    def sum_over_ranks(self, comm: Comm) -> None:
        """Collective. The server's sums become those over all ranks."""
        for exact in self._sums.values():
            sum_bins(comm, exact.buffers(exact.num_bins), exact.buffers)

    def mean(self, bucket: int) -> Segments:
        """Return a bucket's weighted mean update, float64; zeros in segments that are not summed."""
        return self._filled(bucket, total=False)

    def total(self, bucket: int) -> Segments:
        """Return the weighted sum of a bucket's updates, float64, in units of the integer weights."""
        return self._filled(bucket, total=True)

    def _filled(self, bucket: int, total: bool) -> Segments:
        result = Segments.zeros(self._layout, torch.float64)
        for segment in self._segments:
            exact = self._sums[bucket, segment.name]
            result.flat[segment.columns] = (exact.total() if total else exact.mean()).cpu()
        return result
