"""A client's samples as tensors, ready to train on.

Shapes: N samples of the data set, n of a client.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmpi.core.evaluate import Evaluator
from fedmpi.core.layout import laid_out
from fedmpi.data.datasets import Dataset, Split
from fedmpi.data.partition_index import PartitionIndex


class ClientData:
    """The training set cut by a split. Samples stay in the memory-mapped file until their client is visited."""

    def __init__(self, dataset: Dataset, partition: PartitionIndex) -> None:
        """`partition` holds indices into `dataset.train`."""
        self._dataset = dataset
        self._partition = partition

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self._dataset.input_shape

    def num_samples(self, client_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample counts of those clients."""
        return self._partition.sizes[client_ids]

    def load(self, client_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(n, ...) float32 normalised inputs and (n,) int64 labels of one client, in buffers of their own."""
        indices = self._partition[client_id]
        return normalised(self._dataset, self._dataset.train, indices, device)


def test_evaluator(dataset: Dataset, device: torch.device, memory_format: torch.memory_format) -> Evaluator:
    """Evaluates a model on the test split, images in that layout."""

    def load(start: int, stop: int) -> tuple[Tensor, Tensor]:
        inputs, labels = normalised(dataset, dataset.test, slice(start, stop), device)
        return laid_out(inputs, memory_format), labels

    return Evaluator(len(dataset.test), load)


def normalised(
    dataset: Dataset, split: Split, indices: NDArray[np.int64] | slice, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Samples `indices` of `split` on `device`: (x / 255 - mean) / std for uint8, (x - mean) / std for float32."""
    raw = torch.from_numpy(np.require(split.x[indices], requirements=["C", "W"]))
    labels = torch.from_numpy(np.require(split.y[indices], requirements=["C", "W"]))
    if device.type == "cuda":
        raw, labels = raw.pin_memory(), labels.pin_memory()
    inputs = raw.to(device, non_blocking=True).to(torch.float32)
    shape = (1, -1) + (1,) * (inputs.dim() - 2)
    scale = 255.0 if split.x.dtype == np.uint8 else 1.0
    mean = torch.tensor(dataset.mean, device=device).view(shape)
    std = torch.tensor(dataset.std, device=device).view(shape)
    inputs.sub_(mean * scale).div_(std * scale)
    return inputs, labels.to(device, non_blocking=True)
