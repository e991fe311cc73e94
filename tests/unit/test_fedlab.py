"""FedLab's page as it stands: its data lines on data sets of torchvision and torch, its spellings, its aggregator."""

from __future__ import annotations

import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset, random_split
from torchvision.datasets import CIFAR10, MNIST, ImageFolder

import fedmpi
from fedmpi import Aggregators, MessageCode, fedlab, noniid_slicing, random_slicing
from fedmpi.data.datasets import Split
from fedmpi.data.labels import labels_of
from fedmpi.data.raw_sets import write_idx
from fedmpi.errors import PartitionError

N = 60
LABELS = np.random.default_rng(0).integers(0, 10, N).astype(np.uint8)


def mnist(folder: Path) -> MNIST:
    """The class itself, over files in its format."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        write_idx(raw / f"{split}-images-idx3-ubyte", np.zeros((N, 28, 28), np.uint8))
        write_idx(raw / f"{split}-labels-idx1-ubyte", LABELS)
    return MNIST(str(folder), train=True, target_transform=unread, transform=unread)


def unread(*_: Any) -> Any:
    raise AssertionError("an item was read")


def cifar(_: Path) -> CIFAR10:
    dataset = CIFAR10.__new__(CIFAR10)
    dataset.data, dataset.targets, dataset.train = np.zeros((N, 32, 32, 3), np.uint8), LABELS.tolist(), True
    return dataset


def image_folder(folder: Path) -> ImageFolder:
    """Files that are no pictures: whoever opens one fails."""
    for i, label in enumerate(np.sort(LABELS)):
        (folder / str(label)).mkdir(exist_ok=True)
        (folder / str(label) / f"{i:02d}.png").touch()
    return ImageFolder(str(folder))


class Wrapper:
    """A data set of a user's, whose items nobody may read."""

    __getitem__ = unread

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return N


class Stream(IterableDataset[Any]):
    __iter__ = unread


HALVES = [Subset(Wrapper(targets=LABELS), range(30)), Subset(Wrapper(labels=LABELS.tolist()), np.arange(30, N))]
SETS: dict[str, Callable[[Path], Any]] = {
    "MNIST": mnist,
    "CIFAR10": cifar,
    "list": lambda _: LABELS.tolist(),
    "tuple": lambda _: tuple(LABELS.tolist()),
    "array": lambda _: LABELS,
    "array.array": lambda _: np.asarray(array.array("B", LABELS.tobytes())),
    "tensor": lambda _: torch.from_numpy(LABELS),
    "list of tensors": lambda _: list(torch.from_numpy(LABELS)),
    "TensorDataset": lambda _: TensorDataset(torch.zeros(N, 2), torch.from_numpy(LABELS)),
    "Subset of all": lambda _: Subset(Wrapper(targets=torch.from_numpy(LABELS)), list(range(N))),
    "ConcatDataset of Subsets": lambda _: ConcatDataset(HALVES),
    "Subset of ConcatDataset": lambda _: Subset(ConcatDataset(HALVES), torch.arange(N)),
    "targets as a list": lambda _: Wrapper(targets=LABELS.tolist()),
    "targets as a tensor": lambda _: Wrapper(targets=torch.from_numpy(LABELS), train=True),
    "labels beside a train method": lambda _: Wrapper(labels=LABELS, train=unread),
    "Split": lambda _: Split(np.zeros((N, 1, 2, 2), np.uint8), LABELS.astype(np.int64)),
}


def alike(first: dict[int, Any], second: dict[int, Any]) -> bool:
    return list(first) == list(second) and all(np.array_equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", SETS)
def test_its_data_lines(name: str, tmp_path: Path) -> None:
    trainset = SETS[name](tmp_path)
    wanted = noniid_slicing(LABELS, num_clients=10, num_shards=20)
    assert alike(noniid_slicing(trainset, num_clients=10, num_shards=20), wanted)
    assert alike(random_slicing(trainset, num_clients=10), random_slicing(LABELS, num_clients=10))


def test_labels_of_folders_and_random_splits(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    assert alike(noniid_slicing(folder, 5, 10), noniid_slicing(np.sort(LABELS), 5, 10))
    part, _ = random_split(Wrapper(targets=LABELS), [40, 20], torch.Generator().manual_seed(1))
    assert alike(noniid_slicing(part, 5, 10), noniid_slicing(LABELS[part.indices], 5, 10))
    assert alike(random_slicing(Wrapper(), 5), random_slicing(LABELS, 5))  # a length is enough


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        (Wrapper(), "Wrapper has no labels that can be read without its items: pass the labels instead, one integer"),
        (Wrapper(dataset=Wrapper(targets=LABELS)), "Wrapper has no labels"),
        (Subset(Wrapper(), [0, 1]), "Wrapper has no labels"),
        (Subset(Wrapper(targets=LABELS), [0, N]), "Subset has indices that its data set of 60 has not"),
        (Subset(Wrapper(targets=LABELS), LABELS > 4), "Subset must have integers as indices, got bool"),
        (ConcatDataset([Wrapper(targets=LABELS), Wrapper()]), "Wrapper has no labels"),
        (TensorDataset(torch.zeros(N)), "TensorDataset has no labels"),
        (TensorDataset(torch.zeros(N), torch.zeros(N), torch.zeros(N)), "TensorDataset has no labels"),
        (Wrapper(targets=LABELS[:9]), "Wrapper has 60 samples but 9 labels"),
        (Wrapper(targets=lambda: LABELS), "the labels of Wrapper must be a list, an array or a tensor, got function"),
        (Wrapper(targets=np.zeros((N, 10))), r"the labels of Wrapper must be one .*, got float64 of shape \(60, 10\)"),
        (torch.zeros(N), "labels must be one integer per sample, got float32"),
        ([(torch.zeros(2), 1)] * N, "labels must be one integer per sample, got tuple"),
        ([[1, 2], [3]], "labels must be one integer per sample, got list"),
        (Stream(), "Stream has no labels"),
        ({"train": LABELS}, "dict has no labels"),
        (None, "NoneType has no labels"),
        ([10**30] * N, "labels (are no array|must be one integer per sample, got object)"),
    ],
)  # fmt: skip
def test_sets_without_labels_are_refused_before_items_are_read(dataset: Any, reason: str) -> None:
    with pytest.raises(PartitionError, match=reason):
        noniid_slicing(dataset, 2, 2)


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        (Stream(), "Stream has neither a length nor labels: pass the labels instead"),
        (DataLoader(Wrapper(targets=LABELS)), "DataLoader is no data set"),  # its length counts batches
        ({"train": LABELS}, "dict is no data set"),
        ("mnist", "str is no data set"),
        (7, "int has neither a length nor labels"),
        (torch.tensor(7), "Tensor has neither a length nor labels"),
    ],
)
def test_sets_without_a_length_are_refused(dataset: Any, reason: str) -> None:
    with pytest.raises(PartitionError, match=reason):
        random_slicing(dataset, 2)


def test_message_codes_in_both_spellings() -> None:
    names = ["ParameterRequest", "GradientUpdate", "ParameterUpdate", "EvaluateParams", "Exit", "SetUp"]
    values = list(zip(names, range(6), strict=True))
    assert [(name, int(MessageCode[name])) for name, _ in values] == values
    assert MessageCode.Exit is MessageCode.EXIT
    assert len(MessageCode) == 6


def test_fedasync_aggregate() -> None:
    server, new = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    mixed = Aggregators.fedasync_aggregate(server, new, 0.25)
    assert mixed.tolist() == [1.5, 1.0]
    assert mixed.dtype == torch.float32
    assert server.tolist() == [1.0, 2.0]
    assert torch.equal(Aggregators.fedasync_aggregate(server, new, torch.tensor(1.0)), new)
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got"):
            Aggregators.fedasync_aggregate(server, new, alpha)
    with pytest.raises(ValueError, match="two vectors of one shape are mixed"):
        Aggregators.fedasync_aggregate(server, new.view(2, 1), 0.5)


def test_its_names_are_the_packages() -> None:
    assert set(fedlab.__all__) <= set(fedmpi.__all__)
    assert all(getattr(fedlab, name) is getattr(fedmpi, name) for name in fedlab.__all__)


class Delegating:
    """The common wrapper that adds a transform, and hands all else on."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["dataset"], name)

    def __len__(self) -> int:
        return len(self.dataset)


def test_a_wrapper_around_a_subset_is_no_subset() -> None:
    """Its labels were those of the subset's indices, taken twice."""
    data = TensorDataset(torch.zeros(10, 2), torch.arange(10))
    with pytest.raises(PartitionError, match="Delegating has no labels that can be read without its items"):
        labels_of(Delegating(Subset(data, list(range(9, -1, -1)))))
    shorter = Subset(data, [0, 1, 2])
    shorter.__class__ = type("Shorter", (Subset,), {"__len__": lambda self: 2})
    with pytest.raises(PartitionError, match="Shorter has 2 samples but 3 labels"):
        labels_of(shorter)
