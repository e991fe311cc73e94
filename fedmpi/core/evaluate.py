"""Evaluation in fixed chunks: any rank may take any chunk, and the sums are integers, so the result has no order.

Shapes: N test samples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedmpi.lifecycle import progress

CHUNK_SIZE = 100
"""Samples a chunk. A product's last bits depend on its shape, so this is the same whatever the number of ranks."""

_KEPT_BYTES = 2**26
"""Of chunks that are kept between evaluations: all of MNIST's, and enough of larger sets to hide the reading."""

_LOSS_SCALE = 2.0**24
_LOSS_LIMIT = 2.0**17  # a sample's loss from here on counts as non-finite; so 2^22 samples cannot overflow


@dataclass(frozen=True)
class Metrics:
    """Result of an evaluation: `loss` is inf when a sample's is not finite; both are NaN of no samples."""

    accuracy: float
    loss: float
    num_samples: int


class Evaluator:
    """Counts correct predictions and sums cross-entropy over chunks of a test set."""

    def __init__(self, num_samples: int, load: Callable[[int, int], tuple[Tensor, Tensor]]) -> None:
        """Over `num_samples` test samples.

        Args:
            num_samples: N.
            load: (start, stop) -> inputs and (stop - start,) labels, on the model's device.
        """
        self.num_samples = num_samples
        self._load = load
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # a rank's share is always the same chunks
        self._kept_bytes = 0

    @property
    def num_chunks(self) -> int:
        """Chunks the test set is cut into; the last may be shorter."""
        return -(-self.num_samples // CHUNK_SIZE)

    def evaluate(
        self, model: nn.Module, share: int, num_shares: int, renew: Callable[[int], None] | None = None
    ) -> NDArray[np.int64]:
        """(4,) int64 over chunks share::num_shares: samples, correct, fixed-point loss, samples with a non-finite loss.

        Restores the model's training mode. `renew`, for a model that may keep something, is called before each chunk,
        with its number.
        """
        training = model.training
        model.eval()
        correct, losses = [], [torch.empty(0, dtype=torch.float32, device="cpu")]
        with torch.no_grad():
            for chunk in range(share, self.num_chunks, num_shares):
                inputs, labels = self._chunk(chunk)
                if renew is not None:
                    renew(chunk)
                    inputs = inputs.clone()  # a user's forward may work in place
                logits = model(inputs)
                correct.append(logits.argmax(1) == labels)
                progress.beat()
                losses.append(functional.cross_entropy(logits, labels, reduction="none"))
            loss = torch.cat([each.cpu() for each in losses]).to(torch.float64)
            finite = loss.abs() < _LOSS_LIMIT  # false for NaN too
            fixed = loss[finite].mul(_LOSS_SCALE).round().to(torch.int64)
        model.train(training)
        num_correct = int(torch.cat(correct).sum()) if correct else 0
        return np.array([len(loss), num_correct, int(fixed.sum()), int((~finite).sum())], np.int64)

    def _chunk(self, chunk: int) -> tuple[Tensor, Tensor]:
        """A chunk's samples, kept for the next evaluation while there is room, else read again."""
        if chunk in self._kept:
            return self._kept[chunk]
        inputs, labels = self._load(chunk * CHUNK_SIZE, min((chunk + 1) * CHUNK_SIZE, self.num_samples))
        if self._kept_bytes + inputs.nbytes <= _KEPT_BYTES:
            self._kept_bytes += inputs.nbytes
            self._kept[chunk] = inputs, labels
        return inputs, labels


def metrics_of(sums: NDArray[np.int64]) -> Metrics:
    """The metrics of the sum, over all ranks, of what `Evaluator.evaluate` returned."""
    num_samples, correct, loss, non_finite = (int(value) for value in sums)
    if num_samples == 0:
        return Metrics(math.nan, math.nan, 0)
    return Metrics(correct / num_samples, math.inf if non_finite else loss / _LOSS_SCALE / num_samples, num_samples)
