"""A large split is mapped from a copy that stands for its very pickle, or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from fedmpi.data import job_split
from fedmpi.data.job_split import read_checked
from fedmpi.data.split import PartitionIndex, map_split, write_map
from fedmpi.data.split_file import save_dict
from fedmpi.errors import PartitionError

SPLIT = {0: np.array([4, 2]), 1: np.array([0]), 2: np.array([5, 1, 3])}


@pytest.fixture
def large(tmp_path):
    """A pickle, and the folder of all data sets."""
    save_dict(SPLIT, tmp_path / "split.pkl")
    return tmp_path / "split.pkl", tmp_path / "data"


def read(large, large_bytes=1):
    return read_checked(*large, num_samples=6, num_clients=3, large_bytes=large_bytes)


def as_dict(index):
    return {client_id: index[client_id].tolist() for client_id in range(index.num_clients)}


def test_the_copy_is_read_instead_of_the_pickle(large, monkeypatch):
    first = read(large)
    assert as_dict(first) == {client_id: indices.tolist() for client_id, indices in SPLIT.items()}
    assert first.file is not None
    assert first.file.is_file()
    monkeypatch.setattr(job_split, "parse_dict", lambda *_: pytest.fail("the pickle is read"))
    again = read(large)
    assert as_dict(again) == as_dict(first)
    assert again.sha256() == first.sha256()
    with pytest.raises(ValueError, match="read-only"):
        again.indices[0] = 9


def test_a_small_split_has_no_copy(tmp_path):
    save_dict(SPLIT, tmp_path / "split.pkl")
    index = read((tmp_path / "split.pkl", tmp_path / "data"), job_split.LARGE_BYTES)
    assert index.file is None
    assert not (tmp_path / "data").exists()


def test_another_pickle_under_the_same_name_is_noticed(large):
    read(large)
    save_dict({**SPLIT, 0: np.array([2, 4])}, large[0])
    assert as_dict(read(large))[0] == [2, 4]


@pytest.mark.parametrize("size", [0, 8, 31, 40, 64, -8, -1])
def test_a_copy_cut_short_is_made_again(large, size):
    file = read(large).file
    content = file.read_bytes()
    file.write_bytes(content[:size])
    assert map_split(file) is None
    assert as_dict(read(large)) == as_dict(map_split(file))
    assert file.read_bytes() == content


@pytest.mark.parametrize("position", [0, 31, 32, 40, 75, -1])
def test_a_flipped_bit_is_noticed(large, position):
    file = read(large).file
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    assert map_split(file) is None
    assert as_dict(read(large))[2] == [5, 1, 3]


def test_without_a_folder_to_write_to_it_stays_in_memory(large):
    pickle, root = large
    root.write_text("no folder")
    assert read((pickle, root)).file is None


def test_a_copy_is_checked_like_the_pickle(large):
    read(large)
    with pytest.raises(PartitionError, match="holds 3 clients, --num-clients is 4"):
        read_checked(*large, num_samples=6, num_clients=4, large_bytes=1)
    with pytest.raises(PartitionError, match="holds index 5, the data has 5 samples"):
        read_checked(*large, num_samples=5, num_clients=3, large_bytes=1)
    with pytest.raises(PartitionError, match="no such file"):
        read_checked(large[0].with_name("none.pkl"), large[1], 6, 3)


@pytest.mark.parametrize("open_part", ["data", "data/mapped-splits", "file"])
def test_a_copy_that_others_may_write_is_not_believed(large, open_part):
    """Somebody puts a valid copy of another split under the name: its checksum says nothing about the pickle."""
    file = read(large).file
    other = PartitionIndex(np.array([0, 2, 3, 6]), np.array([1, 2, 0, 3, 4, 5]))
    write_map(other, file)
    assert as_dict(read(large))[0] == [1, 2]  # of this user's own doing
    (file if open_part == "file" else large[1].parent / open_part).chmod(0o777)
    assert map_split(file) is None
    assert map_split(file, whole=False) is None
    index = read(large)
    assert index.file is None
    assert as_dict(index)[0] == SPLIT[0].tolist()


def test_a_pickle_swapped_while_it_is_read_leaves_no_wrong_copy(large, monkeypatch):
    parse = job_split.parse_dict

    def swapping(data, name):
        save_dict({**SPLIT, 0: np.array([2, 4])}, large[0])
        return parse(data, name)

    monkeypatch.setattr(job_split, "parse_dict", swapping)
    assert as_dict(read(large))[0] == [4, 2]
    monkeypatch.undo()
    assert as_dict(read(large))[0] == [2, 4]
