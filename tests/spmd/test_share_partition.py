"""All ranks get the split: mapped from one file where they can all see it, else sent."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from fedmpi import job
from fedmpi.config import RunConfig
from fedmpi.data.datasets import load_dataset
from fedmpi.data.job_split import resolve_partition
from fedmpi.data.split import PartitionIndex
from fedmpi.mpi.setup import on_every_rank, on_root


@pytest.fixture
def share(net, tmp_path_factory, monkeypatch):
    """Shares a split from a folder that all ranks see."""
    monkeypatch.setattr(job, "resolve_partition", partial(resolve_partition, large_bytes=1))
    root = on_root(net, lambda: str(tmp_path_factory.mktemp("data")))
    config = RunConfig(dataset="synthetic", num_clients=30, data_dir=root)
    dataset = load_dataset("synthetic", root)
    return lambda: job.share_partition(net, config, dataset)


def alike(net, index):
    held = on_every_rank(net, (index.offsets.tolist(), index.indices.tolist()))
    return all(each == held[0] for each in held) and sorted(held[0][1]) == list(range(2000))


def test_a_large_split_is_mapped_once_it_has_a_copy(net, agree, share):
    first, sha256 = share()  # makes the split
    second, same = share()  # makes the copy
    third, _ = share()
    agree(first.file is None and second.file is not None and third.file == second.file, (first.file, second.file))
    agree(sha256 == same and alike(net, third) and np.array_equal(first.indices, third.indices))


@pytest.mark.parametrize("seen", ["nothing", "another split"])
def test_it_is_sent_to_all_where_one_rank_cannot_see_the_copy(net, agree, share, monkeypatch, seen):
    share()
    whole, _ = share()
    if net.rank == net.size - 1:
        other = None if seen == "nothing" else PartitionIndex(whole.offsets[:5], whole.indices[:9])
        monkeypatch.setattr(job, "map_split", lambda *_, **__: other)
    index, _ = share()
    agree(index.file is None, index.file)
    agree(alike(net, index))
