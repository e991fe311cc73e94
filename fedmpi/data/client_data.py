"""A client's samples as tensors, ready to train on.

Shapes: N samples of the data set, n of a client.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmpi.core.evaluate import Evaluator
from fedmpi.core.memory_format import laid_out
from fedmpi.data.datasets import Dataset, Split
from fedmpi.data.split import PartitionIndex
from fedmpi.errors import ConfigError


class ClientData:
    """The training set cut by a split. Samples stay in the memory-mapped file until their client is visited."""

    def __init__(self, dataset: Dataset, partition: PartitionIndex, device: torch.device) -> None:
        """`partition` holds indices into `dataset.train`; clients are trained on `device`."""
        self._samples = Samples(dataset, dataset.train, device)
        self.partition = partition
        self.input_shape = dataset.input_shape
        self.num_classes = dataset.num_classes

    def num_samples(self, client_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample counts of those clients."""
        offsets = self.partition.offsets
        return offsets[client_ids + 1] - offsets[client_ids]

    def load(self, client_id: int, order: NDArray[np.int64] | None = None) -> tuple[Tensor, Tensor]:
        """(n, ...) float32 normalised inputs and (n,) int64 labels of one client, in buffers of their own.

        Args:
            client_id: the client.
            order: permutation of its samples; None: as the split lists them.
        """
        indices = self.partition[client_id]
        return self._samples.take(indices if order is None else indices[order])

    def take(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The same of any samples of the training set, in that order."""
        return self._samples.take(indices)


def test_evaluator(
    dataset: Dataset, device: torch.device, memory_format: torch.memory_format, num_samples: int | None
) -> Evaluator:
    """Evaluates a model on the test split, images in that layout.

    Args:
        dataset: the data set.
        device: where the model is.
        memory_format: layout of images.
        num_samples: so many of the test samples, spread evenly; None: all.

    Raises:
        ConfigError: there are fewer.
    """
    total = len(dataset.test)
    if num_samples is not None and num_samples > total:
        raise ConfigError(f"--eval-samples must be in [1, {total}] (test samples of {dataset.name}), got {num_samples}")
    count = num_samples or total
    samples, chosen = Samples(dataset, dataset.test, device), np.arange(count) * total // count

    def load(start: int, stop: int) -> tuple[Tensor, Tensor]:
        inputs, labels = samples.take(chosen[start:stop])
        return laid_out(inputs, memory_format), labels

    return Evaluator(count, load)


class Samples:
    """One split of a data set, read as a model sees it: (x / 255 - mean) / std for uint8, (x - mean) / std for float32.

    A GPU holds the split as it is stored, if half of its free memory does; its batches then never cross the bus.
    """

    def __init__(self, dataset: Dataset, split: Split, device: torch.device) -> None:
        """Samples of `split` on `device`."""
        self._x, self._y, self._device = np.asarray(split.x), np.asarray(split.y), device  # a memmap is slow to index
        scale = 255.0 if split.x.dtype == np.uint8 else 1.0
        shape = (1, -1) + (1,) * (split.x.ndim - 2)
        self._mean = torch.tensor(dataset.mean, dtype=torch.float32, device=device).view(shape) * scale
        self._std = torch.tensor(dataset.std, dtype=torch.float32, device=device).view(shape) * scale
        self._resident: tuple[Tensor, Tensor] | None = None
        if device.type == "cuda" and split.x.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
            self._resident = torch.tensor(split.x, device=device), torch.tensor(split.y, device=device)

    def take(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(n, ...) float32 inputs and (n,) int64 labels, in that order."""
        if self._resident is not None:
            chosen = torch.tensor(indices, device="cpu", pin_memory=True).to(self._device, non_blocking=True)
            raw, labels = (each.index_select(0, chosen) for each in self._resident)
        else:
            raw, labels = (torch.from_numpy(np.take(each, indices, axis=0)) for each in (self._x, self._y))
            if self._device.type == "cuda":
                raw, labels = (each.pin_memory().to(self._device, non_blocking=True) for each in (raw, labels))
        return raw.to(torch.float32).sub_(self._mean).div_(self._std), labels
