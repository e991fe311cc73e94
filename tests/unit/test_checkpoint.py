"""Checkpoints: what goes in comes out, two generations, and whatever is damaged or hostile is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from fedmpi.errors import CheckpointError, FilesystemError
from fedmpi.lifecycle import checkpoints
from fedmpi.lifecycle.checkpoint import read_state, snapshot, write_state
from fedmpi.lifecycle.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]

STATE = {
    "round_idx": 12,
    "vector": torch.linspace(-1, 1, 1000),
    "none": None,
    "deep": {"lr": 0.1, "name": "adäm", "moments": [np.arange(6.0).reshape(2, 3), np.zeros((0, 4), np.int64)]},
    "scalar": np.array(7, np.int32),
    "flags": [True, False],
}


def saved(path: Path, state: Any) -> Path:
    with path.open("wb") as file:
        write_state(file, snapshot(state))
    return path


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        alike = isinstance(right, np.ndarray) and (left.dtype, left.shape) == (right.dtype, right.shape)
        return alike and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return set(left) == set(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    assert same(STATE, read_state(saved(tmp_path / "a", STATE)))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.sampled_from(["bool", "uint8", "int8", "int16", "int32", "int64", "float32", "float64"]),
    st.lists(st.integers(0, 4), max_size=4),
)
def test_any_state_comes_back_as_it_was(tmp_path_factory: Any, value: Any, dtype: str, shape: list[int]) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    tensor = torch.from_numpy(array)
    state = {
        "value": value,
        "arrays": [array, array[..., ::-1] if shape else array],
        "tensors": [tensor, tensor.transpose(0, -1) if shape else tensor],
    }
    path = tmp_path_factory.mktemp("any") / "a"
    if isinstance(value, dict) and set(value) in ({"array"}, {"tensor"}):
        return  # the names that are taken
    assert same(state, read_state(saved(path, state)))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({1: 2}, r"state\['x'\] is a dict"),
        ([{"y": object()}], r"state\['x'\]\[0\]\['y'\] is a object"),
        (np.float64(0.5), r"state\['x'\] is a float64"),
        (np.array([object()]), r"state\['x'\] is an array of object"),
        (torch.zeros(2, dtype=torch.complex64), r"state\['x'\] is an array of complex64"),
        ({"array": 3}, r"state\['x'\] is a dict"),
        ({"tensor": 3}, r"state\['x'\] is a dict"),
        (b"bytes", r"state\['x'\] is a bytes"),
    ],
)
def test_what_cannot_be_kept_is_named_before_it_is_needed(value: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        snapshot({"x": value})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        torch.nn.Parameter(torch.ones(2)),
        torch.arange(6).reshape(2, 3)[:, 1],
    ],
)
def test_a_tensor_comes_back_as_a_tensor_that_training_may_write(tmp_path: Path, tensor: torch.Tensor) -> None:
    back = read_state(saved(tmp_path / "a", {"x": tensor}))["x"]
    assert same(tensor, back)
    back += 1
    assert same(tensor, read_state(tmp_path / "a")["x"])


def test_an_array_of_the_other_byte_order_keeps_its_values(tmp_path: Path) -> None:
    state = read_state(saved(tmp_path / "a", {"x": np.arange(3, dtype=">f8")}))
    assert same(np.arange(3.0), state["x"])


def test_any_reader_of_safetensors_reads_a_checkpoint(tmp_path: Path) -> None:
    tensors = load_file(saved(tmp_path / "a", STATE))
    assert torch.equal(tensors["state['vector']"], STATE["vector"])  # type: ignore[arg-type]  # a tensor


def test_a_snapshot_does_not_follow_what_training_does(tmp_path: Path) -> None:
    vector = torch.zeros(3)
    copied = snapshot({"vector": vector})
    vector += 1
    with (tmp_path / "a").open("wb") as file:
        write_state(file, copied)
    assert read_state(tmp_path / "a")["vector"].tolist() == [0, 0, 0]


# what is damaged


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: b"", "is empty"),
        (lambda content: content[:-1], "does not match its checksum"),
        (lambda content: content[: len(content) // 2], "does not match its checksum"),
        (lambda content: content + b"\0", "does not match its checksum"),
        (lambda content: content[:40], "does not match its checksum"),
        (lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:], "does not match its checksum"),
        (lambda content: b"PK\3\4" + content, "is no checkpoint of this version"),
        (lambda content: content.replace(b"checkpoint 2", b"checkpoint 3"), "is no checkpoint of this version"),
        (lambda content: content.replace(b"checkpoint 2", b"checkpoint x"), "is no checkpoint of this version"),
        (lambda content: b"fedmpi checkpoint 1 " + content, "is no checkpoint of this version"),
        (lambda content: save({"a": torch.ones(3)}), "is no checkpoint of this version"),
    ],
)
def test_damage_is_noticed(tmp_path: Path, damage: Any, said: str) -> None:
    path = saved(tmp_path / "a", STATE)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"^{said}"):
        read_state(path)


def signed(content: bytes) -> bytes:
    """`content` with its checksum, if it has a place for one."""
    summed = re.sub(b'"sha256":"[^"]*"', b'"sha256":"' + b"0" * 64 + b'"', content, count=1)
    digest = hashlib.sha256(summed).hexdigest().encode()
    return summed.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest, 1)


def crafted(entries: str, state: str = "{}", body: bytes = b"") -> bytes:
    """A file whose checksum and length are right."""
    metadata = json.dumps({"format": "fedmpi checkpoint 2", "sha256": "", "state": state}, separators=(",", ":"))
    header = f'{{"__metadata__":{metadata}{entries}}}'.encode()
    header = header.replace(b'"sha256":""', b'"sha256":"' + b"0" * 64 + b'"')
    return signed(len(header).to_bytes(8, "little") + header + body)


def entry(dtype: str, shape: object, end: int, name: str = "a") -> str:
    return f',"{name}":{{"dtype":"{dtype}","shape":{json.dumps(shape)},"data_offsets":[0,{end}]}}'


@pytest.mark.parametrize(
    ("entries", "state", "body"),
    [
        ("", "", b""),
        ("", "[]", b""),
        ("", "3", b""),
        ("", '{"a": {"tensor": 0}}', b""),
        ("", '{"a": {"tensor": "a"}}', b""),
        ("", '{"a": {"array": ["a"]}}', b""),
        (entry("F32", [10**9, 10**9], 0), "{}", b""),
        (entry("F32", [-1], 4), "{}", b"0000"),
        (entry("F32", [1.0], 4), "{}", b"0000"),
        (entry("F32", [2], 4), "{}", b"0000"),
        (entry("O", [1], 8), "{}", b"00000000"),
        (entry("BF16", [1], 2), '{"a": {"array": "a"}}', b"00"),
        ("", '{"a":' * 100000 + "1" + "}" * 100000, b""),
        ("", "[" * 100000 + "]" * 100000, b""),
        ("", "9" * 5000, b""),
        ("", "cos\nsystem\n(S'touch /tmp/x'\ntR.", b""),
    ],
)
def test_a_hostile_file_with_a_right_checksum_is_refused(tmp_path: Path, entries: str, state: str, body: bytes) -> None:
    (tmp_path / "a").write_bytes(crafted(entries, state, body))
    with pytest.raises(CheckpointError, match=r"^(does not hold what its header promises|has a header of more than)"):
        read_state(tmp_path / "a")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (entry("F32", [3], 12), "does not match its checksum"),
        (entry("F32", [3], -1), "does not match its checksum"),
        (',"a":3', "does not match its checksum"),
        (',"a":', "does not match its checksum"),
        (',"a":' + "[" * 100000 + "]" * 100000, "does not match its checksum"),
        (',"a":{"data_offsets":[0,1e999]}', "does not match its checksum"),
    ],
)
def test_a_header_that_does_not_go_with_the_file_is_damage(tmp_path: Path, entries: str, said: str) -> None:
    (tmp_path / "a").write_bytes(crafted(entries))
    with pytest.raises(CheckpointError, match=f"^{said}"):
        read_state(tmp_path / "a")


@pytest.mark.parametrize(
    "content",
    [
        lambda: crafted("".join(entry("U8", [0], 0, f"{i}") for i in range(340_000))),
        lambda: crafted("".join(entry("U8", [0], 0, f"{i}") for i in range(70_000))),
        lambda: crafted("", "[" + "[]," * 340_000 + "0]"),
        lambda: crafted("", "[" + "{}," * 1_000_000 + "0]"),
        lambda: crafted("", "[" + "0," * 2_000_000 + "0]"),
        lambda: crafted("", '{"a": {"array": 0}}' + " " * 2**22),
        lambda: b"fedmpi checkpoint 1 " + b"0" * 64 + b'\n{"state": {}, "arrays": [' + b'["|u1", [0]],' * 340_000,
        lambda: (2**63).to_bytes(8, "little") + b'{"__metadata__":{"format":"fedmpi checkpoint 2"' + b" " * 10**7,
    ],
    ids=["arrays", "fewer", "lists", "dicts", "numbers", "white", "format 1", "endless"],
)
def test_a_bomb_takes_neither_time_nor_memory(tmp_path: Path, content: Any) -> None:
    (tmp_path / "a").write_bytes(content())
    del content
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(CheckpointError):
        read_state(tmp_path / "a")
    took_s, (_, peak) = time.monotonic() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took_s < 1
    assert peak < 50 * 10**6


def test_as_many_tensors_as_a_header_may_name_fit_into_the_bound(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(crafted("".join(entry("U8", [0], 0, f"{i}") for i in range(18_000))))
    code = (
        "import resource, sys, pathlib; from fedmpi.lifecycle.checkpoint import read_state\n"
        "def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = most(); read_state(pathlib.Path(sys.argv[1])); print(most() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert int(done.stdout) < 100_000, "kilobytes"


def test_thousands_of_mutations_are_refused_or_harmless(tmp_path: Path) -> None:
    """With the checksum of the mutated content, so that it is the parser that is tried."""
    content, rng = saved(tmp_path / "a", STATE).read_bytes(), random.Random(0)
    refused = 0
    for _ in range(3000):
        mutated = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(min(len(mutated), 900))
            kind = rng.randrange(3)
            if kind == 0:
                mutated[at] = rng.randrange(256)
            elif kind == 1:
                size = rng.randint(1, 20)
                mutated[at : at + size] = rng.randbytes(size) if rng.random() < 0.3 else b" " * size
            else:
                part = rng.choice([b"[", b"}", b'"', b"9" * 30, b"\n", b"-", b"null", b"1e999", b"\xff"])
                mutated[at : at + len(part)] = part
        (tmp_path / "a").write_bytes(signed(bytes(mutated)))
        try:
            assert isinstance(read_state(tmp_path / "a"), dict)
        except CheckpointError:
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize("start", [0, 1, 500, None])
def test_a_sparse_file_of_200_gigabytes_is_not_read(tmp_path: Path, start: int | None) -> None:
    path = saved(tmp_path / "a", STATE)
    path.write_bytes(path.read_bytes()[:start])
    os.truncate(path, 200 * 10**9)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"is no checkpoint of this version|does not match its checksum"):
        read_state(path)
    assert time.monotonic() - started < 1


def test_a_sparse_file_that_keeps_its_promise_is_not_read_either(tmp_path: Path) -> None:
    content = crafted(entry("U8", [200 * 10**9], 200 * 10**9))
    (tmp_path / "a").write_bytes(content)
    os.truncate(tmp_path / "a", len(content) + 200 * 10**9)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"nearly all of them holes|more than this machine has memory"):
        read_state(tmp_path / "a")
    assert time.monotonic() - started < 1


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    saved(tmp_path / "a", STATE)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "folder").mkdir()
    for name, said in (("pipe", "no regular file"), ("link", "it is a link"), ("folder", "Is a directory")):
        with pytest.raises(CheckpointError, match=rf"^cannot be read \({'it is ' * (name == 'pipe')}{said}"):
            read_state(tmp_path / name)


def test_too_much_beside_arrays_is_said_when_it_is_kept(tmp_path: Path) -> None:
    """Else it would be written, and could not be read again."""
    with pytest.raises(CheckpointError, match="keep its numbers in arrays"):
        snapshot({"losses": [0.5] * 10**6})


def test_a_checkpoint_of_another_version_is_not_passed_over(tmp_path: Path) -> None:
    """It may be whole and newer: to go on from an older one would lose it."""
    store = Checkpoints(tmp_path)
    store.begin()
    keep(store, 5, 10)
    newest = tmp_path / "round-000010.ckpt"
    newest.write_bytes(newest.read_bytes().replace(b"checkpoint 2", b"checkpoint 3"))
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path).load()
    assert str(caught.value) == (
        f"{newest} is no checkpoint of this version of fedmpi but of another (format 3, not 2): go on with that one,"
        " or --resume never to start over"
    )


def test_a_checkpoint_of_format_1_is_another_versions(tmp_path: Path) -> None:
    """Not a damaged one: it is whole, and the version that wrote it goes on from it."""
    header = b'{"state": {}, "arrays": []}\n'
    (tmp_path / "round-000001.ckpt").write_bytes(
        b"fedmpi checkpoint 1 " + hashlib.sha256(header).hexdigest().encode() + b"\n" + header
    )
    with pytest.raises(CheckpointError, match=r"of fedmpi but of another \(format 1, not 2\): go on with that one"):
        Checkpoints(tmp_path).load()


# the folder


def keep(store: Checkpoints, *rounds: int) -> None:
    for round_idx in rounds:
        store.write(round_idx, {"round_idx": round_idx, "vector": torch.full((100,), float(round_idx))}, lambda: None)
    store.finish()


def test_two_generations_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoint")
    assert store.load() is None
    store.begin()
    keep(store, 0, 5, 10, 1000000)
    assert [path.name for path in store.names()] == ["round-1000000.ckpt", "round-000010.ckpt"]
    state = Checkpoints(tmp_path / "checkpoint").load()
    assert state is not None
    assert state["round_idx"] == 1000000
    assert store.longest_s > 0


def test_a_damaged_newest_one_falls_back_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Checkpoints(tmp_path)
    store.begin()
    keep(store, 5, 10)
    newest = tmp_path / "round-000010.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = Checkpoints(tmp_path)
    with caplog.at_level(logging.WARNING, logger="fedmpi"):
        state = again.load()
    assert state is not None
    assert state["round_idx"] == 5
    assert [record.getMessage() for record in caplog.records] == [
        f"checkpoint {newest} does not match its checksum: it is damaged or cut: going on from round-000005.ckpt"
    ]
    again.begin()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000005.ckpt", "round-000010.ckpt.damaged"]


def test_all_damaged_is_never_round_0(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.begin()
    keep(store, 5, 10)
    (tmp_path / "round-000005.ckpt").write_bytes(b"")
    (tmp_path / "round-000010.ckpt").write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path).load()
    assert str(caught.value) == (
        f"no checkpoint in {tmp_path} is whole: round-000010.ckpt is no checkpoint of this version of fedmpi;"
        " round-000005.ckpt is empty; --resume never starts over"
    )


def test_rank_0_goes_on_while_one_is_written(tmp_path: Path) -> None:
    store, may_go_on = Checkpoints(tmp_path), threading.Event()
    store.begin()
    store.write(1, {"a": 1}, lambda: may_go_on.wait(10) and None)  # type: ignore[func-returns-value]
    assert store.writes_for_s > 0
    assert not store.names()
    may_go_on.set()
    store.finish()
    assert store.writes_for_s == 0
    assert len(store.names()) == 1


def test_what_cannot_be_written_is_raised_and_the_older_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(tmp_path)
    store.begin()
    keep(store, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "write_state", full)
        store.write(2, {"a": 1}, lambda: None)
        with pytest.raises(FilesystemError, match=r"round-000002\.ckpt cannot be written: No space left on device"):
            store.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001.ckpt"]
    keep(store, 3)
    assert len(store.names()) == 2


def test_no_failure_of_the_thread_is_lost(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.begin()

    def out_of_memory() -> None:
        raise MemoryError("no room")

    store.write(1, {"a": 1}, out_of_memory)
    with pytest.raises(MemoryError, match="no room"):
        store.finish()
