"""Partitioners: complete, disjoint, no empty client, seeded, bounded; what cannot be done is refused."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi.config import DataConfig
from fedmpi.data.datasets import load_dataset
from fedmpi.data.partitioners import (
    PARTITIONERS,
    Partition,
    check_partition_options,
    dirichlet_slicing,
    make_partition,
    noniid_slicing,
    random_slicing,
)
from fedmpi.errors import ConfigError, PartitionError

quick = settings(max_examples=60, deadline=None, database=None)


def sizes_of(partition: Partition, num_samples: int, num_clients: int) -> np.ndarray:
    """The sizes, once every index is seen to occur exactly once and the ids are 0..K-1."""
    assert list(partition) == list(range(num_clients))
    assert all(indices.dtype == np.int64 for indices in partition.values())
    assert np.array_equal(np.sort(np.concatenate(list(partition.values()))), np.arange(num_samples))
    sizes = np.array([len(indices) for indices in partition.values()])
    assert sizes.min() >= 1
    return sizes


def equal(first: Partition, second: Partition) -> bool:
    return all(np.array_equal(first[client_id], second[client_id]) for client_id in first)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, np.ndarray, int, dict[str, Any], int]:
    """A partitioner, labels, clients, parameters and a seed that fit together."""
    num_clients = draw(st.integers(1, 30))
    shards_each = draw(st.integers(1, 4))
    num_samples = draw(st.integers(num_clients * shards_each, 400))
    labels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, draw(st.integers(1, 12)), num_samples)
    name = draw(st.sampled_from(sorted(PARTITIONERS)))
    parameters: dict[str, Any] = {
        "iid": {},
        "shards": {"num_shards": shards_each * num_clients},
        "dirichlet": {
            "alpha": draw(st.floats(5e-324, 1e308)),
            "min_samples": draw(st.integers(1, num_samples // num_clients)),
        },
    }[name]
    return name, labels, num_clients, parameters, draw(st.integers(0, 2**63 - 1))


@quick
@given(requests())
def test_complete_disjoint_and_the_same_again(request: tuple[str, np.ndarray, int, dict[str, Any], int]) -> None:
    name, labels, num_clients, parameters, seed = request
    first = PARTITIONERS[name].split(labels, num_clients, **parameters, rng=seed)
    sizes = sizes_of(first, len(labels), num_clients)
    again = PARTITIONERS[name].split(labels, num_clients, **parameters, rng=np.random.default_rng(seed))
    assert equal(first, again)
    if name == "iid":
        assert sizes.max() - sizes.min() <= 1
    if name == "dirichlet":
        assert sizes.min() >= parameters["min_samples"]


@pytest.mark.parametrize(
    ("name", "parameters"), [("iid", {}), ("shards", {"num_shards": 14}), ("dirichlet", {"alpha": 1})]
)
def test_another_seed_is_another_split(name: str, parameters: dict[str, Any]) -> None:
    labels = np.arange(100) % 10
    splits = [PARTITIONERS[name].split(labels, 7, **parameters, rng=seed) for seed in (0, 1)]
    assert sizes_of(splits[0], 100, 7).sum() == sizes_of(splits[1], 100, 7).sum()
    assert not equal(*splits)


def test_shards_are_those_of_the_paper() -> None:
    """200 shards of 300 over 100 clients: 600 samples each, and, with balanced classes, at most 2 digits (each
    class is a whole number of shards)."""
    labels = np.random.default_rng(0).permutation(np.arange(60000) % 10)
    partition = noniid_slicing(labels, 100, 200)
    assert set(sizes_of(partition, 60000, 100)) == {600}
    kinds = [len(set(labels[indices])) for indices in partition.values()]
    assert max(kinds) == 2
    order = np.argsort(labels, kind="stable")
    shards = {tuple(order[300 * s : 300 * (s + 1)]) for s in range(200)}
    for indices in partition.values():
        assert tuple(indices[:300]) in shards
        assert tuple(indices[300:]) in shards


def test_one_client_has_everything() -> None:
    labels = np.array([1, 0, 1])
    for partition in (random_slicing(labels, 1), noniid_slicing(labels, 1, 2), dirichlet_slicing(labels, 1, 0.1)):
        assert sizes_of(partition, 3, 1).tolist() == [3]


@pytest.mark.parametrize(("alpha", "median", "top_class"), [(0.1, 468, 0.73), (0.5, 514, 0.43), (1.0, 518, 0.32)])
def test_dirichlet_is_as_skewed_as_published(alpha: float, median: int, top_class: float) -> None:
    """The reference figures of label-Dirichlet with 50,000 samples, 100 clients and 10 classes."""
    labels = np.arange(50000) % 10
    medians, tops = [], []
    for seed in range(20):
        partition = dirichlet_slicing(labels, 100, alpha, rng=seed)
        medians.append(np.median(sizes_of(partition, 50000, 100)))
        tops += [np.bincount(labels[indices]).max() / len(indices) for indices in partition.values()]
    assert np.mean(medians) == pytest.approx(median, rel=0.07)
    assert np.mean(tops) == pytest.approx(top_class, abs=0.03)


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 0.1, 10000, 1e300])
def test_dirichlet_ends_where_redrawing_would_not(alpha: float) -> None:
    labels = np.arange(60000) % 10
    start = time.monotonic()
    assert sizes_of(dirichlet_slicing(labels, 1000, alpha, 40), 60000, 1000).min() >= 40
    assert set(sizes_of(dirichlet_slicing(labels, 1000, alpha, 60), 60000, 1000)) == {60}
    assert sizes_of(dirichlet_slicing(labels, 60000, alpha), 60000, 60000).max() == 1
    assert time.monotonic() - start < 20


def test_filled_up_clients_stay_skewed() -> None:
    labels = np.arange(60000) % 10
    partition = dirichlet_slicing(labels, 1000, 0.01, 40)
    top = [np.bincount(labels[indices]).max() / len(indices) for indices in partition.values()]
    assert np.mean(top) > 0.7


def test_many_clients() -> None:
    """Work grows with the samples, not with clients times classes or samples: a million clients take seconds."""
    labels = np.random.default_rng(0).integers(0, 10, 1_200_000)
    start = time.monotonic()
    for partition in (random_slicing(labels, 200_000), noniid_slicing(labels, 200_000, 400_000)):
        assert len(partition) == 200_000
    sizes_of(dirichlet_slicing(labels, 200_000, 0.5), 1_200_000, 200_000)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: random_slicing(y, 70), r"^60 samples .* 70 clients one each: --num-clients must be in \[1, 60\]$"),
        (lambda y: random_slicing(y, 0), r"--num-clients must be in \[1, inf\), got 0"),
        (lambda y: noniid_slicing(y, 70, 140), "60 samples cannot give 70 clients one each"),
        (lambda y: noniid_slicing(y, 7, 15), r"--num-shards must be a multiple of 7 \(--num-clients\), got 15"),
        (lambda y: noniid_slicing(y, 7, 0), "--num-shards must be a multiple of 7"),
        (lambda y: noniid_slicing(y, 7, 70), "60 samples cannot be cut into 70 shards"),
        (lambda y: dirichlet_slicing(y, 7, 0.1, 9), r"60 samples .* 9 each: --min-samples must be in \[1, 8\]"),
        (lambda y: dirichlet_slicing(y, 7, 0.1, 0), r"--min-samples must be in \[1, inf\), got 0"),
        (lambda y: dirichlet_slicing(y, 7, 0.0), r"--alpha must be in \(0, inf\), got 0"),
        (lambda y: dirichlet_slicing(y, 7, float("nan")), "got nan"),
        (lambda y: dirichlet_slicing(y, 7, float("inf")), "got inf"),
        (lambda y: dirichlet_slicing(y / 2, 7, 1.0), "labels must be one integer per sample, got float64"),
        (lambda y: noniid_slicing(y.reshape(6, 10), 7, 7), r"of shape \(6, 10\)"),
        (lambda y: noniid_slicing(object(), 1, 1), "object has no labels that can be read without its items"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call: Any, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        call(np.arange(60) % 10)


def test_any_data_set_will_do() -> None:
    """FedLab's order of arguments, and whatever carries the labels."""
    ours = load_dataset("synthetic")
    y = ours.train.y
    wanted = noniid_slicing(y, 4, 8, 1)
    tensors = (np.zeros(len(y)), y)
    for other in (ours, ours.train, y.tolist(), SimpleNamespace(targets=y), SimpleNamespace(labels=y.tolist()),
                  SimpleNamespace(tensors=tensors)):  # fmt: skip
        assert equal(wanted, noniid_slicing(other, 4, 8, 1))
        assert equal(random_slicing(y, 4), random_slicing(other, 4))


def test_text_labels() -> None:
    sizes_of(noniid_slicing(np.array(["cat", "dog"] * 5), 2, 4), 10, 2)


def test_defaults_and_options() -> None:
    labels = np.arange(1000) % 10
    assert equal(make_partition(DataConfig(num_clients=10), labels), random_slicing(labels, 10, 0))
    shards = DataConfig(num_clients=10, partition="shards", partition_seed=4)
    assert equal(make_partition(shards, labels), noniid_slicing(labels, 10, 20, 4))
    dirichlet = DataConfig(num_clients=10, partition="dirichlet")
    assert equal(make_partition(dirichlet, labels), dirichlet_slicing(labels, 10, 0.5, 1, 0))
    skewed = DataConfig(num_clients=10, partition="dirichlet", alpha=0.1)
    assert not equal(make_partition(skewed, labels), make_partition(dirichlet, labels))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(alpha=0.1), "^--alpha belongs to --partition dirichlet, but the split is --partition iid$"),
        (DataConfig(partition="shards", min_samples=2), "--min-samples belongs to --partition dirichlet"),
        (DataConfig(partition="dirichlet", num_shards=200), "--num-shards belongs to --partition shards"),
        (
            DataConfig(partition="shards", num_shards=150),
            r"--num-shards must be a multiple of 100 \(--num-clients\), got 150",
        ),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(config: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_partition_options(config)
    with pytest.raises(ConfigError, match=message):
        make_partition(config, np.arange(1000))
