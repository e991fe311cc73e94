"""Labels of a user's data set, read without its items: an item may be a picture that is decoded first.

What stores no labels, or stores them where nobody can know their order, is refused with a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmpi.errors import PartitionError, shown

_ATTRIBUTES = ("targets", "labels", "y")
_INSTEAD = "pass the labels instead, one integer per sample"


def labels_of(dataset: Any) -> NDArray[Any]:
    """The labels (N,) of a data set.

    Args:
        dataset: labels (list, array, tensor); a `Split` or `Dataset` of ours (its training split); a torchvision-like
            data set with `.targets`, `.labels` or `.y` (as stored, before any `target_transform`); torch's `Subset`,
            `ConcatDataset` and `TensorDataset` of two tensors over such.

    Raises:
        PartitionError: it has no labels that can be read without its items, or they are not one integer (or text) per
            sample.
    """
    source = _without_split(dataset)
    stored = source if _is_plain(source) else None
    if stored is None and hasattr(source, "datasets") and hasattr(source, "cumulative_sizes"):  # torch's ConcatDataset
        labels = np.concatenate([labels_of(part) for part in source.datasets])
    elif stored is None and {"dataset", "indices"} <= set(getattr(source, "__dict__", ())):  # its Subset, no wrapper
        labels = _subset(source)
    else:
        if stored is None:
            stored = next((getattr(source, name) for name in _ATTRIBUTES if hasattr(source, name)), None)
        if stored is None and len(getattr(source, "tensors", ())) == 2:  # torch's TensorDataset of inputs and labels
            stored = source.tensors[1]
        if stored is None:
            raise PartitionError(f"{_named(source)} has no labels that can be read without its items: {_INSTEAD}")
        labels = _as_array(stored, source)
    if _length(source) not in (None, len(labels)):
        raise PartitionError(f"{_named(source)} has {_length(source)} samples but {len(labels)} labels: {_INSTEAD}")
    return labels


def count_of(dataset: Any) -> int:
    """N: the samples of anything that `labels_of` takes, or of any data set with a length.

    Raises:
        PartitionError: it has no length, or one that does not count samples.
    """
    source = _without_split(dataset)
    if isinstance(source, Mapping | str | bytes) or hasattr(source, "batch_sampler"):
        raise PartitionError(f"{_named(source)} is no data set: pass one, or its labels")
    length = _length(source)
    if length is not None:
        return length
    try:
        return len(labels_of(source))
    except PartitionError as error:
        raise PartitionError(f"{_named(source)} has neither a length nor labels: {_INSTEAD}") from error


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except (TypeError, NotImplementedError, AssertionError, RuntimeError):  # how a data set without a length says so
        return None


def _without_split(dataset: Any) -> Any:
    """Return the training split of a `Dataset` of ours; torchvision's `.train` is a bool."""
    train = getattr(dataset, "train", None)
    return train if hasattr(train, "x") and hasattr(train, "y") else dataset


def _named(source: Any) -> str:
    return shown(type(source).__name__)


def _is_plain(source: Any) -> bool:
    return isinstance(source, list | tuple | range | np.ndarray) or hasattr(source, "__array__")


def _subset(source: Any) -> NDArray[Any]:
    if source.dataset is source:
        raise PartitionError(f"{_named(source)} is a part of itself: {_INSTEAD}")
    labels, indices = labels_of(source.dataset), _as_array(source.indices, source)
    if indices.dtype.kind not in "iu":
        raise PartitionError(f"{_named(source)} must have integers as indices, got {indices.dtype}")
    try:
        return np.asarray(labels[indices])
    except IndexError as error:
        raise PartitionError(f"{_named(source)} has indices that its data set of {len(labels)} has not") from error


def _as_array(stored: Any, source: Any) -> NDArray[Any]:
    name = "labels" if stored is source else f"the labels of {_named(source)}"
    if not _is_plain(stored):
        raise PartitionError(f"{name} must be a list, an array or a tensor, got {_named(stored)}: {_INSTEAD}")
    for item in stored if isinstance(stored, list | tuple) else ():
        if not isinstance(item, int | str | bytes | np.generic) and getattr(item, "ndim", None) != 0:
            raise PartitionError(f"{name} must be one integer per sample, got {_named(item)}: {_INSTEAD}")
    try:
        stored = stored.detach() if hasattr(stored, "detach") else stored
        labels = np.asarray(stored.cpu() if hasattr(stored, "cpu") else stored)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last: a tensor without values
        raise PartitionError(f"{name} are no array ({shown(str(error))})") from error
    if labels.ndim == 1 and len(labels) == 0:
        return labels.astype(np.int64)
    if labels.ndim != 1 or labels.dtype.kind not in "iubUS":
        raise PartitionError(f"{name} must be one integer per sample, got {labels.dtype} of shape {labels.shape}")
    return labels
