"""Files that somebody else may have written: whatever stands in them, a clean refusal, and no code is run."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmpi.config import RunConfig
from fedmpi.data.split_file import VERSION, Manifest, load_dict, manifest_path, read_manifest
from fedmpi.errors import CheckpointError, ConfigError, FedmpiError, PartitionError
from fedmpi.options import parse, to_yaml
from fedmpi.report.history import History, check_history
from tests.unit.test_report import RECORD

TOKENS = [
    b"(", b"}", b"]", b"R", b"c", b"\x93", b"\x94", b"\x80", b"9" * 30, b"\n", b"-", b"null", b"1e999", b"\xff",
    b"!!python/object/apply:os.system [touch x]", b"cos\nsystem\n(S'touch x'\ntR.", b"{" * 50, b"*x", b"&x",
]  # fmt: skip


def mutated(content: bytes, dice: random.Random, deepest: int = 4000) -> bytes:
    """One to four bytes or tokens of it changed, cut out or put in."""
    changed = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(min(len(changed), deepest) or 1)
        what = dice.randrange(4)
        if what == 0 and changed:
            changed[at % len(changed)] = dice.randrange(256)
        elif what == 1:
            del changed[at : at + dice.randint(1, 40)]
        elif what == 2:
            changed[at:at] = dice.choice(TOKENS)
        else:
            del changed[at + dice.randrange(200) :]
    return bytes(changed)


@pytest.fixture(params=[200, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def mutations(request: pytest.FixtureRequest) -> int:
    """How many files to try."""
    return int(request.param)


def refusals(mutations: int, content: bytes, path: Path, read: Callable[[], Any], error: type[FedmpiError]) -> int:
    """How many files were refused; each by `error`, briefly."""
    dice, said = random.Random(0), []
    for _ in range(mutations):
        path.write_bytes(mutated(content, dice))
        try:
            read()
        except error as refused:
            said.append(str(refused))
    assert max(map(len, said)) < 1000
    return len(said)


@pytest.fixture(autouse=True)
def nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tokens above would make a file x."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "x").exists()


@pytest.mark.filterwarnings("ignore")  # of NumPy and the parsers, on what they read
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_partition_pickles(mutations: int, tmp_path: Path, protocol: int) -> None:
    split = {client: np.arange(client * 10, client * 10 + 10) for client in range(5)}
    path = tmp_path / "split.pkl"
    count = refusals(mutations, pickle.dumps(split, protocol), path, lambda: load_dict(str(path)), PartitionError)
    assert count > mutations / 4


@pytest.mark.filterwarnings("ignore")
def test_manifests(mutations: int, tmp_path: Path) -> None:
    path = tmp_path / "split.pkl"
    made = Manifest(VERSION, "mnist", "d" * 64, 60000, 100, "dirichlet", {"alpha": 0.5}, 0, "p" * 64)
    content, file = json.dumps(dataclasses.asdict(made), indent=1).encode(), manifest_path(path)
    assert refusals(mutations, content, file, lambda: read_manifest(path), PartitionError) > mutations / 4


def test_histories(mutations: int, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    for _ in range(3):
        history.on_round(RECORD)
    size, content = history.num_bytes, path.read_bytes()
    assert refusals(mutations, content, path, lambda: check_history(path, size, 3), CheckpointError) > mutations / 2


@pytest.mark.filterwarnings("ignore")
def test_yaml(mutations: int, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    content = to_yaml(RunConfig(dataset="digits", client_lr=0.5, alpha=0.1), {"ranks": 3}).encode()
    count = refusals(mutations, content, path, lambda: parse(RunConfig, ["--config", str(path)], "", ""), ConfigError)
    assert count > mutations / 4


def test_json_that_is_deep_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text("[" * 100_000 + "]" * 100_000 + "\n")
    with pytest.raises(CheckpointError, match="none of fedmpi's"):
        check_history(path, path.stat().st_size, 1)
