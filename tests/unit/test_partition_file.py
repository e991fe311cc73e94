"""Partition files: whose pickles load, which are refused and run nothing, manifests, and the split of a job."""

from __future__ import annotations

import json
import pickle
import re
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi.config import RunConfig
from fedmpi.data import job_split
from fedmpi.data.datasets import Dataset, load_dataset
from fedmpi.data.job_split import SplitFiles, partition_name, resolve_partition
from fedmpi.data.partitioners import random_slicing
from fedmpi.data.split import PartitionIndex, check_partition
from fedmpi.data.split_file import load_dict, save_dict
from fedmpi.errors import FilesystemError, PartitionError

SPLIT = {0: np.array([4, 1, 300_000_000_000]), 1: np.array([7]), 2: np.array([0, 2])}
RAN: list[str] = []


def partition_sha256(partition: dict[int, Any]) -> str:
    return PartitionIndex.from_dict(partition).sha256()


def same(partition: dict[int, Any], wanted: dict[int, Any] = SPLIT) -> bool:
    return list(partition) == list(wanted) and all(
        partition[k].dtype == np.int64 and partition[k].tolist() == list(wanted[k]) for k in wanted
    )


def numpy1(data: bytes) -> bytes:
    """The pickle as NumPy 1 spells it."""
    for module in ("multiarray", "numeric"):
        old, new = f"numpy._core.{module}".encode(), f"numpy.core.{module}".encode()
        data = data.replace(bytes([len(old)]) + old, bytes([len(new)]) + new).replace(b"c" + old, b"c" + new)
        if data[1] >= 4 and data[2:3] == b"\x95":  # the frame is shorter now; without it, it is not checked
            data = data[:2] + data[11:]
    return data


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("spelling", [bytes, numpy1])
@pytest.mark.parametrize("kind", ["<i8", ">i8", "i4", "u1", "u8", "list", "scalars", "tuple"])
def test_pickles_of_all_kinds_load(tmp_path: Path, protocol: int, spelling: Any, kind: str) -> None:
    wanted = SPLIT if kind in ("<i8", ">i8", "u8", "list", "scalars", "tuple") else {0: [4, 1, 200], 1: [7], 2: [0, 2]}
    make = {"list": lambda v: [int(i) for i in v], "scalars": lambda v: [np.int64(i) for i in v], "tuple": tuple}
    convert = make.get(kind, lambda v: np.asarray(v).astype(kind))
    if kind == "tuple":
        convert = lambda v: tuple(int(i) for i in v)  # noqa: E731  # as short as its neighbours
    data = spelling(pickle.dumps({k: convert(v) for k, v in wanted.items()}, protocol))
    if spelling is numpy1:
        assert b"_core" not in data
    (tmp_path / "a.pkl").write_bytes(data)
    loaded = load_dict(tmp_path / "a.pkl")
    assert same(loaded, wanted)
    loaded[0][0] = 9  # FedLab's users shuffle in place


def test_protocol_5_uses_frombuffer_when_it_can() -> None:
    assert b"_frombuffer" in pickle.dumps(SPLIT, 5)


@settings(max_examples=40, deadline=None, database=None)
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5), max_size=8))
def test_save_and_load(lists: list[list[int]]) -> None:
    partition = dict(enumerate(lists))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pkl"
        save_dict(partition, path)
        assert same(load_dict(path), partition)
        plain = pickle.loads(path.read_bytes())  # what FedLab does
        assert same(plain, partition)


class Evil:
    """Its pickle calls a function; so it must not be called."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def ran(text: str) -> None:
    RAN.append(text)


def objects_array() -> np.ndarray:
    return np.array([1, "a", None], dtype=object)


FIFTY = list(range(50))
PROTO = b"\x80\x04"
HOSTILE = {
    "a function": pickle.dumps({0: Evil(ran, "x")}),
    "eval": pickle.dumps({0: Evil(eval, "RAN.append(1)")}),
    "as a key": pickle.dumps({Evil(ran, "x"): [1]}),
    "protocol 0": pickle.dumps({0: Evil(ran, "x")}, 0),
    "inst": b"(S'x'\ni" + __name__.encode() + b"\nran\n.",
    "an object": pickle.dumps({0: Path("a")}),
    "object array": pickle.dumps({0: objects_array()}),
    "float array": pickle.dumps({0: np.array([1.0])}),
    "bool array": pickle.dumps({0: np.array([True])}),
    "structured": pickle.dumps({0: np.zeros(1, [("a", "i4")])}),
    "datetime": pickle.dumps({0: np.zeros(1, "M8[s]")}),
    "2-d": pickle.dumps({0: np.zeros((2, 2), np.int64)}),
    "a float": pickle.dumps({0: [1.5]}),
    "a bool": pickle.dumps({0: [True]}),
    "text": pickle.dumps({0: "12"}),
    "nested": pickle.dumps({0: [[1]]}),
    "text key": pickle.dumps({"0": [1]}),
    "bool key": pickle.dumps({True: [1]}),
    "no dict": pickle.dumps([1, 2]),
    "a set": pickle.dumps({0: {1}}),
    "too large": pickle.dumps({0: [2**70]}),
    "too large for int64": pickle.dumps({0: np.array([2**63], np.uint64)}),
    "empty file": b"",
    "no pickle": b"PK\x03\x04 nothing of the kind",
    "cut": pickle.dumps(SPLIT)[:-20],
    "huge shape": pickle.dumps({0: np.array([1])}, 2).replace(b"K\x01\x85", b"\x8a\x05\0\0\0\0\x7f\x85"),
    "huge array": PROTO + b"cnumpy\nndarray\n\x8a\x05\0\0\0\0\x7f\x85R.",
    "huge bytes": PROTO + b"c__builtin__\nbytes\n\x8a\x05\0\0\0\0\x7f\x85R.",
    "huge new": PROTO + b"cnumpy\nndarray\n\x8a\x05\0\0\0\0\x7f\x85\x81.",
    "huge string": PROTO + b"\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "huge string still": PROTO + b"\x96" + struct.pack("<Q", 2**62) + b"x.",
    "one array, many clients": (
        PROTO + b"}(K\x00C" + bytes([200]) + bytes(200) + b"\x94K\x01h\x00u."
    ),
    "shared list": pickle.dumps(dict.fromkeys(range(200), FIFTY)),
    "extension": PROTO + b"\x82\x01.",
    "persistent": PROTO + b"K\x01Q.",
    "changing a constructor": PROTO + b"c_codecs\nencode\n}X\x08\0\0\0__name__K\x01sb.",
    "slots of a constructor": PROTO + b"c_codecs\nencode\nN}X\x0c\0\0\0__defaults__NS\x86b.",
    "calling a number": PROTO + b"K\x01)R.",
    "itself": PROTO + b"]\x94h\x00a.",
    "dtype": PROTO + b"cnumpy\ndtype\nX\x02\0\0\0O8\x89\x88\x87R.",
    "scalar": pickle.dumps({0: [np.float64(1)]}),
    "big int": PROTO + b"I" + b"9" * 5000 + b"\n.",
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_everything_else_is_refused_and_runs_nothing(tmp_path: Path, case: str) -> None:
    (tmp_path / "a.pkl").write_bytes(HOSTILE[case])
    RAN.clear()
    modules = set(sys.modules)
    with pytest.raises(PartitionError, match=r"^[^\n]*a\.pkl[^\n]+$") as caught:
        load_dict(tmp_path / "a.pkl")
    assert RAN == []
    assert set(sys.modules) == modules
    assert len(str(caught.value)) < 600


def test_the_refusal_names_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(HOSTILE["eval"])
    with pytest.raises(PartitionError, match=r"is refused: it asks for builtins\.eval, which is no integer array"):
        load_dict(tmp_path / "a.pkl")


@settings(max_examples=200, deadline=None, database=None)
@given(st.data())
def test_damaged_bytes_give_one_line_or_integers(data: st.DataObject) -> None:
    content = bytearray(pickle.dumps(SPLIT, data.draw(st.integers(2, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pkl"
        path.write_bytes(content)
        refused, loaded = "", {}
        try:
            loaded = load_dict(path)
        except PartitionError as error:
            refused = str(error)
        assert "\n" not in refused
        assert all(type(k) is int and v.dtype == np.int64 for k, v in loaded.items())


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(PartitionError, match=r"no such file; python -m fedmpi\.data\.prepare makes splits"):
        load_dict(tmp_path / "a.pkl")
    with pytest.raises(PartitionError, match="cannot be read: Is a directory"):
        load_dict(tmp_path)


def test_save_refuses_what_is_no_index(tmp_path: Path) -> None:
    for indices in ([1.5], np.array([1.5]), "12", np.zeros((1, 1), int)):
        with pytest.raises(PartitionError, match="client 0: indices must be"):
            save_dict({0: indices}, tmp_path / "a.pkl")
    with pytest.raises(FilesystemError):
        save_dict({0: [1]}, tmp_path / "no" / "a.pkl")
    assert list(tmp_path.iterdir()) == []


def test_the_index() -> None:
    index = PartitionIndex.from_dict({1: [5], 0: [3, 1]})
    assert index.offsets.tolist() == [0, 2, 3]
    assert index.indices.tolist() == [3, 1, 5]
    assert index.num_clients == 2
    assert index.sizes.tolist() == [2, 1]
    assert index[1].tolist() == [5]
    assert np.shares_memory(index[0], index.indices)
    for client_id in (-1, 2):
        with pytest.raises(IndexError):
            index[client_id]
    assert partition_sha256({0: [3, 1], 1: [5]}) == index.sha256()
    assert len({partition_sha256(p) for p in ({0: [3, 1], 1: [5]}, {0: [1, 3], 1: [5]}, {0: [3], 1: [1, 5]})}) == 3


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ({0: [0], 1: [1], 2: [2]}, "X holds 3 clients, --num-clients is 2"),
        ({1: [0], 2: [1]}, r"X: 2 clients must have the ids 0..1, found \[1, 2\]; to renumber a split: {k: "),
        ({"0": [0], "1": [1]}, "X: 2 clients must have the ids"),
        ({0: [0], 1: []}, "X: client 1 holds no sample"),
        ({0: [0], 1: [2, 9]}, r"X: client 1 holds index 9, the data has 4 samples \(0..3\)"),
        ({0: [-1], 1: [2]}, "X: client 0 holds index -1"),
        ({0: [1, 3], 1: [2, 3]}, r"X: sample 3 occurs 2 times \(clients 0 and 1\)"),
        ({0: [1], 1: [2, 2]}, r"X: sample 2 occurs 2 times \(clients 1 and 1\)"),
        ({0: np.array([1.0]), 1: [2]}, "X: indices must be integers, got float64"),
        ({0: [[1]], 1: [2]}, "X: the indices of a client must be one list of integers"),
    ],
)
def test_a_split_that_does_not_fit(partition: dict[Any, Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        check_partition(partition, 4, 2, "X")


def test_a_split_that_leaves_samples_out(caplog: pytest.LogCaptureFixture) -> None:
    assert check_partition({0: [0], 1: [2]}, 4, 2, "X").sizes.tolist() == [1, 1]
    assert [record.message for record in caplog.records] == ["X uses 2 of 4 samples"]
    check_partition({0: [0, 1], 1: [2, 3]}, 4, 2, "X")
    assert len(caplog.records) == 1


@pytest.fixture(scope="module")
def synthetic() -> Dataset:
    return load_dataset("synthetic")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


def run_config(**options: Any) -> RunConfig:
    return RunConfig(**{"dataset": "synthetic", "num_clients": 7, **options})


def test_the_split_of_a_job_is_made_once(tmp_path: Path, synthetic: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    index, sha256, path = resolve_partition(run_config(), synthetic, tmp_path)
    assert path == tmp_path / "synthetic" / "partitions" / "synthetic-iid-clients=7-seed=0.pkl"
    assert sha256 == index.sha256() == partition_sha256(random_slicing(synthetic, 7))
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.manifest.json"]
    manifest = json.loads((path.parent / f"{path.name}.manifest.json").read_text())
    assert manifest == {
        "version": 1, "dataset": "synthetic", "dataset_sha256": synthetic.sha256, "num_samples": 2000, "num_clients": 7,
        "partition": "iid", "parameters": {}, "seed": 0, "sha256": sha256,
    }  # fmt: skip
    monkeypatch.setattr(SplitFiles, "make", lambda *args: pytest.fail("made twice"))
    again, same_sha256, same_path = resolve_partition(run_config(seed=5), synthetic, tmp_path)
    assert (same_sha256, same_path) == (sha256, path)
    assert np.array_equal(again.indices, index.indices)


def test_different_settings_have_different_files() -> None:
    settings = [
        {}, {"partition_seed": 1}, {"num_clients": 8}, {"dataset": "digits"}, {"partition": "shards"},
        {"partition": "shards", "num_shards": 7}, {"partition": "dirichlet"}, {"partition": "dirichlet", "alpha": 0.1},
        {"partition": "dirichlet", "alpha": 0.1 + 1e-16}, {"partition": "dirichlet", "alpha": 100.0},
        {"partition": "dirichlet", "min_samples": 2},
    ]  # fmt: skip
    assert len({partition_name(run_config(**options)) for options in settings}) == len(settings)
    assert partition_name(run_config(partition="shards")) == partition_name(
        run_config(partition="shards", num_shards=14)
    )


@pytest.mark.parametrize("damage", ["cut", "other", "no manifest", "bad manifest", "manifest of other data", "empty"])
def test_a_damaged_split_is_made_again(
    tmp_path: Path, synthetic: Dataset, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, sha256, path = resolve_partition(run_config(), synthetic, tmp_path)
    assert path is not None
    manifest = path.with_name(path.name + ".manifest.json")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other":
        save_dict(random_slicing(synthetic, 7, 1), path)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text("{")
    else:
        manifest.write_text(manifest.read_text().replace(synthetic.sha256, "0" * 64))
    assert resolve_partition(run_config(), synthetic, tmp_path)[1:] == (sha256, path)
    assert [record.message.endswith(": made again") for record in caplog.records] == [True]
    assert partition_sha256(load_dict(path)) == sha256
    caplog.clear()
    resolve_partition(run_config(), synthetic, tmp_path)
    assert caplog.records == []


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, synthetic: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = resolve_partition(run_config(), synthetic, tmp_path / "rw")
    with monkeypatch.context() as patch:
        patch.setattr(job_split, "writable", lambda folder: False)
        patch.setattr(Path, "mkdir", lambda *args, **options: pytest.fail("tried to write"))
        patch.setattr(job_split, "FileLock", lambda *args, **options: pytest.fail("tried to write"))
        assert resolve_partition(run_config(), synthetic, tmp_path / "rw")[1:] == kept[1:]
        assert caplog.records == []
        assert resolve_partition(run_config(), synthetic, tmp_path / "ro")[1:] == (kept[1], None)
    assert len(caplog.records) == 1
    (tmp_path / "file").touch()  # writable says yes, and then it is not
    monkeypatch.setattr(job_split, "writable", lambda folder: True)
    assert resolve_partition(run_config(), synthetic, tmp_path / "file")[1:] == (kept[1], None)


def test_what_cannot_be_split_leaves_nothing(tmp_path: Path, synthetic: Dataset) -> None:
    with pytest.raises(PartitionError, match="2000 samples cannot give 2001 clients one each"):
        resolve_partition(run_config(num_clients=2001), synthetic, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_user(tmp_path: Path, synthetic: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    _, sha256, path = resolve_partition(run_config(), synthetic, tmp_path)
    assert path is not None
    config = run_config(partition_file=str(path))
    assert resolve_partition(config, synthetic)[1:] == (sha256, path)
    assert caplog.records == []
    path.with_name(path.name + ".manifest.json").unlink()
    assert resolve_partition(config, synthetic)[1:] == (sha256, path)
    assert [record.message for record in caplog.records] == [
        f"{path} has no manifest: whether it was made for synthetic cannot be checked"
    ]


def test_a_file_made_for_something_else(tmp_path: Path, synthetic: Dataset, digits: Dataset) -> None:
    _, _, path = resolve_partition(run_config(), synthetic, tmp_path)
    assert path is not None
    with pytest.raises(
        PartitionError,
        match=rf"made for synthetic \(hash {synthetic.sha256[:8]}\), the data is digits \(hash {digits.sha256[:8]}\)$",
    ):
        resolve_partition(run_config(dataset="digits", partition_file=str(path)), digits)
    with pytest.raises(PartitionError, match="holds 7 clients, --num-clients is 8"):
        resolve_partition(run_config(num_clients=8, partition_file=str(path)), synthetic)
    save_dict(random_slicing(synthetic, 7, 1), path)
    with pytest.raises(PartitionError, match="is not the split of its manifest"):
        resolve_partition(run_config(partition_file=str(path)), synthetic)


def test_no_file_of_the_user_says_how_to_make_it(tmp_path: Path, synthetic: Dataset) -> None:
    config = run_config(partition="dirichlet", alpha=0.1, partition_file=str(tmp_path / "a.pkl"))
    wanted = (
        "python -m fedmpi.data.prepare --dataset synthetic --num-clients 7 --partition dirichlet --alpha 0.1 "
        f"--out {tmp_path}"
    )
    with pytest.raises(PartitionError, match=re.escape(wanted) + "$"):
        resolve_partition(config, synthetic)
