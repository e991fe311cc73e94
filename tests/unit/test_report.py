"""History, progress lines, banner and run folder."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from fedmpi.config import RunConfig
from fedmpi.core.record import RoundRecord
from fedmpi.data.datasets import Dataset, Split
from fedmpi.data.split import PartitionIndex
from fedmpi.errors import CheckpointError, ConfigError, FilesystemError
from fedmpi.fedavg import FedAvg
from fedmpi.halves.algorithm_server import AlgorithmServer
from fedmpi.lifecycle.checkpoint import snapshot, write_state
from fedmpi.options import parse, result_hash
from fedmpi.report import progress, run_folder
from fedmpi.report.banner import banner
from fedmpi.report.history import History, check_history, read_history
from fedmpi.report.progress import Progress
from fedmpi.report.run_folder import RunFolder

RECORD = RoundRecord(
    round_idx=0,
    cohort=[1, 4, 7],
    num_samples=90,
    train_loss=0.5,
    accuracy=0.9125,
    loss=0.25,
    bytes_down=1200,
    bytes_up=1200,
    timings={"round_s": 2.0, "wire_bytes": 3000, "idle_share": 0.25},
)
NOT_EVALUATED = dataclasses.replace(RECORD, round_idx=1, accuracy=None, loss=None, train_loss=None)


# history.jsonl


def test_history_reads_back_what_was_written_round_by_round(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    assert path.read_text() == "", "there before the first round, so that a full disk shows before training"
    history.on_round(RECORD)
    assert read_history(path) == [RECORD]
    history.on_round(NOT_EVALUATED)
    assert read_history(path) == [RECORD, NOT_EVALUATED]
    assert len(path.read_text().splitlines()) == 2


def test_a_new_history_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).on_round(RECORD)
    History(path)
    assert read_history(path) == []


def test_a_history_goes_on_behind_what_a_checkpoint_knows_of(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.on_round(RECORD)
    known = history.num_bytes
    history.on_round(NOT_EVALUATED)
    with path.open("ab") as file:
        file.write(b'{"round_idx": 2, "coh')  # killed in mid-line
    again = History(path, known)
    again.on_round(dataclasses.replace(NOT_EVALUATED, num_samples=91))
    again.sync()
    assert read_history(path) == [RECORD, dataclasses.replace(NOT_EVALUATED, num_samples=91)]
    assert again.num_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda text: text[:-20], "2 lines, "),
        (lambda text: text[text.index(b"\n") + 1 :], "1 lines, "),
        (lambda text: text.replace(b'"round_idx": 1', b'"round_idx": 2'), "a last line of another round"),
        (lambda text: text.replace(b'{"round_idx": 1', b'["round_idx": 1'), "none of fedmpi's"),
        (lambda text: text[:-40] + b"\n" * 40, "41 lines, "),
    ],
)
def test_a_history_that_was_changed_is_noticed(tmp_path: Path, damage: Any, found: str) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.on_round(RECORD)
    history.on_round(NOT_EVALUATED)
    check_history(path, history.num_bytes, 2)
    path.write_bytes(path.read_bytes() + b"what was written after the checkpoint")
    check_history(path, history.num_bytes, 2)
    path.write_bytes(damage(path.read_bytes()[: history.num_bytes]))
    with pytest.raises(CheckpointError, match=r"does not go with the checkpoint, which is of round 2") as caught:
        check_history(path, history.num_bytes, 2)
    assert found in str(caught.value)
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        check_history(path, history.num_bytes, 2)


def test_history_never_holds_what_is_no_json(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        history.on_round(dataclasses.replace(RECORD, loss=float("nan")))
    assert read_history(tmp_path / "history.jsonl") == []


def test_a_history_that_cannot_be_written_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "history.jsonl"
    with pytest.raises(FilesystemError) as caught:
        History(path)
    assert str(caught.value) == f"{path} cannot be written: No such file or directory"


# the progress line


def lines_of(rounds: int, *records: RoundRecord) -> tuple[Progress, list[str]]:
    said: list[str] = []
    shown = Progress(rounds)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level = progress.logger.level
    progress.logger.addHandler(handler)
    progress.logger.setLevel(logging.INFO)
    try:
        for record in records:
            shown.on_round(record)
    finally:
        progress.logger.removeHandler(handler)
        progress.logger.setLevel(level)
    return shown, said


def test_a_line_says_round_accuracy_losses_speed_and_what_is_left() -> None:
    _, said = lines_of(20, RECORD, NOT_EVALUATED)
    assert said == [
        "round  1/20   accuracy  91.25 %   loss 0.2500   train loss 0.5000   1.5 clients/s   2.00 s   ETA 0:38",
        "round  2/20   train loss   none   1.5 clients/s   2.00 s   ETA 0:36",
    ]


def test_a_loss_that_is_not_finite_is_none() -> None:
    _, said = lines_of(1, dataclasses.replace(RECORD, loss=None))
    assert "accuracy  91.25 %   loss   none   train loss 0.5000" in said[0]
    assert said[0].endswith("ETA 0:00")


def test_the_time_left_follows_the_last_ten_rounds() -> None:
    def taking(round_idx: int, seconds: float) -> RoundRecord:
        return dataclasses.replace(RECORD, round_idx=round_idx, timings={**RECORD.timings, "round_s": seconds})

    _, said = lines_of(100, taking(0, 1000.0), *(taking(i, 2.0) for i in range(1, 11)))
    assert said[0].endswith("ETA 27:30:00")
    assert said[-1].endswith("ETA 2:58"), "89 rounds of 2 s; the slow first round is forgotten"


def test_the_summary_adds_up(tmp_path: Path) -> None:
    shown, _ = lines_of(2, RECORD, dataclasses.replace(NOT_EVALUATED, timings={**RECORD.timings, "idle_share": 0.75}))
    text = shown.summary("0123456789abcdef", tmp_path)
    assert re.fullmatch(
        rf"done: 2 rounds in \d+\.\d s, accuracy 91.25 %, 6 kB through MPI, trainers idle 50 %,"
        rf" model 0123456789abcdef, in {re.escape(str(tmp_path))}",
        text,
    )
    assert "0 rounds" in Progress(3).summary("", tmp_path)
    assert "accuracy not evaluated, 0 B through MPI, trainers idle 0 %" in Progress(3).summary("", tmp_path)


# the banner


def test_the_banner_says_what_runs_where_on_what() -> None:
    split = Split(np.zeros((30, 1, 8, 8), np.uint8), np.zeros(30, np.int64))
    dataset = Dataset("digits", split, split, 10, (0.0,), (1.0,), "")
    partition = PartitionIndex(np.array([0, 10, 18, 30]), np.arange(30))
    places = [
        ("alpha", "cpu", "server"),
        ("alpha", "cpu", "AVX2"),
        ("beta", "cuda:0", "H100"),
        ("beta", "cuda:0", "H100"),
    ]
    provenance = {
        "fedmpi": "0.1",
        "torch": "2.4",
        "mpi": "MPICH 5",
        "partition_sha256": "ab" * 32,
        "threads": 2,
        "engine": "fused",
    }
    config = RunConfig(dataset="digits", num_clients=3, model="2nn", batch_size=0, local_epochs=2)
    assert banner("FedAvg", config, places, dataset, partition, 15010, provenance, Path("runs/x")) == [
        "fedmpi 0.1: FedAvg on MPICH 5, torch 2.4",
        "ranks:  4 on alpha (2), beta (2)",
        "trains: 1 x cpu (AVX2), 2 x cuda:0 (H100), 2 threads each",
        "data:   digits, 30 training and 30 test samples; iid over 3 clients of 8-12 (split abababababab)",
        "model:  2nn, 15,010 vector entries; engine fused",
        "rounds: 20 with 1 clients each; 2 local epochs, batch all, client lr 0.1, seed 0",
        "output: runs/x",
    ]
    alone = banner("FedAvg", config, places[:1], dataset, partition, 1, {**provenance, "threads": 1}, Path("x"))
    assert alone[2] == "trains: 1 x cpu (server), 1 thread each"


# the run folder

DATA = {"dataset_sha256": "d" * 64, "partition_sha256": "p" * 64}


@pytest.fixture
def folders() -> Iterator[Any]:
    """Opens run folders and lets go of them after the test."""
    held: list[RunFolder] = []

    def open_folder(config: RunConfig, data: dict[str, object] = DATA) -> RunFolder:
        held.append(RunFolder(config, data))
        return held[-1]

    yield open_folder
    for folder in held:
        folder.close()


MADE_WITH = {"fedmpi": "0.1", "torch": "2.4", "threads": 1, "engine": "fused", "capability": ["AVX2"], "ranks": 3}


def train(folder: RunFolder, config: RunConfig, finish: bool = True) -> AlgorithmServer:
    """One round, or what is left of it."""
    server = AlgorithmServer(FedAvg(config), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), config)
    folder.begin(config, {**MADE_WITH, **DATA})
    if folder.stored is not None:
        server.load_state_dict(folder.stored["server"]["half"])
    else:
        folder.write(0, {"half": server.state_dict()})
    while server.round_idx < 1:
        folder.on_round(RECORD)
        server.round_idx = 1
        folder.write(1, {"half": server.state_dict()})
    folder.checkpoints.finish()
    if finish:
        folder.on_end(server)
    folder.close()
    return server


def test_what_a_run_leaves(folders: Any, tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path / "deep" / "run"), client_lr=1e-3)
    folder = folders(config)
    assert folder.path == tmp_path / "deep" / "run"
    assert not folder.finished
    server = train(folder, config)
    held = ["checkpoint", "config.yaml", "history.jsonl", "model.pt"]
    assert sorted(path.name for path in folder.path.iterdir()) == held
    assert sorted(path.name for path in (folder.path / "checkpoint").iterdir()) == [
        "round-000000.ckpt",
        "round-000001.ckpt",
    ]
    assert read_history(folder.path / "history.jsonl") == [RECORD]
    again = parse(RunConfig, ["--config", str(folder.path / "config.yaml")], "", "")
    assert again.run_dir is None, "so that it starts another run"
    assert result_hash(again) == result_hash(config)
    assert yaml.safe_load((folder.path / "config.yaml").read_text())["provenance"] == {**MADE_WITH, **DATA}
    state = torch.load(folder.path / "model.pt", weights_only=True)
    fresh = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    fresh.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[name]) for name, value in server.model.state_dict().items())
    assert state["1.num_batches_tracked"].dtype == torch.int64
    assert (folder.path / "model.pt").stat().st_size < 5000, (
        "tensors are views: the file must not hold the vector each time"
    )


def test_a_folder_in_use_is_refused_with_its_holder(folders: Any, tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    first = folders(config)
    started = time.monotonic()
    with pytest.raises(FilesystemError) as caught:
        folders(config)
    assert time.monotonic() - started < 5
    assert str(caught.value).startswith(
        f"--run-dir {tmp_path / 'run'} is in use by {socket.gethostname()} pid {os.getpid()} since "
    )
    first.close()
    folders(config).close()


def test_a_claim_of_a_dead_process_is_taken_over(folders: Any, tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    first = folders(config)
    lock = first.path / run_folder.LOCK
    claim = lock.read_text().replace(f'"pid": {os.getpid()}', f'"pid": {2**22 + 1}')  # above the largest pid of Linux
    first.close()
    lock.write_text(claim)
    folders(config)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_found_and_left_alone(folders: Any, tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    train(folders(config), config)
    held = contents(tmp_path / "run")
    harmless = {"verbose": True, "schedule": "static", "ethernet": "lo", "rounds": 50, "checkpoint_every": 7}
    for same in (config, dataclasses.replace(config, **harmless)):
        folder = folders(same)
        assert folder.finished
        assert folder.stored["server"]["half"]["round_idx"] == 1
        folder.close()
    assert contents(tmp_path / "run") == held


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"client_lr": 0.5}, "--client-lr 0.1, this one has 0.5"),
        ({"num_clients": 50}, "--num-clients 100, this one has 50"),
        ({"seed": 1}, "--seed 0, this one has 1"),
        ({"target_accuracy": 0.5}, "--target-accuracy unset, this one has 0.5"),
        ({"model": "2nn"}, "--model cnn, this one has 2nn"),
        ({"alpha": 0.1, "partition": "dirichlet"}, "--partition iid, this one has dirichlet"),
    ],
)
def test_a_run_with_other_settings_is_refused(
    change: dict[str, Any], flag: str, finish: bool, folders: Any, tmp_path: Path
) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    train(folders(config), config, finish)
    with pytest.raises(ConfigError) as caught:
        folders(dataclasses.replace(config, **change))
    assert str(caught.value) == (
        f"--run-dir {tmp_path / 'run'} holds a run with {flag}: name another, or --resume never to start over"
    )
    folders(config).close()  # the refusal let go of the folder


def test_a_run_on_another_split_is_refused(folders: Any, tmp_path: Path) -> None:
    """--partition-file names a file, not what is in it: equal options do not mean an equal run."""
    config = RunConfig(run_dir=str(tmp_path / "run"), partition_file="split.pkl")
    train(folders(config), config)
    with pytest.raises(ConfigError, match=r"holds a run with partition_sha256 p+, this one has q+: name another"):
        folders(config, {**DATA, "partition_sha256": "q" * 64})
    assert folders(dataclasses.replace(config, partition_file="moved.pkl")).finished


def test_a_run_goes_on_where_its_checkpoint_is(folders: Any, tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    vector = train(folders(config), config, finish=False).flat
    history = tmp_path / "run" / "history.jsonl"
    with history.open("a") as file:
        file.write("a line that no checkpoint knows of\n")
    left = tmp_path / "run" / "checkpoint" / ".round-000002.ckpt.abc.tmp"
    left.write_bytes(b"half a che")
    again = train(folders(dataclasses.replace(config, resume="must")), config)
    assert torch.equal(again.flat, vector)
    assert read_history(history) == [RECORD]
    assert not left.exists()
    assert (tmp_path / "run" / "model.pt").exists()


def test_more_rounds_put_the_finished_model_aside(folders: Any, tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    train(folders(config), config)
    model = (tmp_path / "run" / "model.pt").read_bytes()
    folder = folders(dataclasses.replace(config, rounds=50))
    folder.begin(config, MADE_WITH)
    assert not folder.finished
    assert (tmp_path / "run" / "model-round-1.pt").read_bytes() == model


def test_going_on_by_other_means_is_said_in_a_line(
    folders: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    train(folders(config), config, finish=False)
    with caplog.at_level(logging.WARNING, logger="fedmpi"):
        folder = folders(config)
        folder.begin(config, {**MADE_WITH, "torch": "2.5", "capability": ["AVX2", "AVX512"], "ranks": 7})
    assert [record.getMessage() for record in caplog.records] == [
        "this run began with torch 2.4, now 2.5; capability AVX2, now AVX2, AVX512: its last bits may differ from those"
        " of a run of one piece"
    ]


@pytest.mark.parametrize(
    "state", [{}, {"run": {}}, {"run": 3}, {"run": {"options": {}, "data": {}}}, {"history_bytes": "x"}]
)
def test_a_whole_checkpoint_of_something_else_is_refused(folders: Any, tmp_path: Path, state: dict[str, Any]) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    train(folders(config), config, finish=False)
    with (tmp_path / "run" / "checkpoint" / "round-000001.ckpt").open("wb") as file:
        write_state(file, snapshot(state))
    with pytest.raises((CheckpointError, ConfigError), match=r"is not one of this program|holds a run with"):
        folders(config)
    folders(dataclasses.replace(config, resume="never")).close()


def test_resume_must_wants_something_to_go_on_from(folders: Any, tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"), resume="must")
    with pytest.raises(ConfigError, match=rf"^--resume must: {tmp_path}/run holds no checkpoint to go on from$"):
        folders(config)


def test_a_finished_run_without_its_checkpoints_is_no_run_to_overwrite(folders: Any, tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    train(folders(config), config)
    for path in (tmp_path / "run" / "checkpoint").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match=r"holds model\.pt but no checkpoint to go on from: name another"):
        folders(config)


def test_resume_never_puts_aside_what_was_there(folders: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    train(folders(config), config)
    held = contents(tmp_path / "run")
    other = dataclasses.replace(config, client_lr=0.5, resume="never")
    folder = folders(other)
    with caplog.at_level(logging.WARNING, logger="fedmpi"):
        folder.begin(other, MADE_WITH)
    folder.close()
    (aside,) = (tmp_path / "run").glob("earlier-*")
    assert contents(aside) == held
    assert read_history(tmp_path / "run" / "history.jsonl") == []
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder.path}: starting over; what was there is now in {aside.name}"
    ]


def test_an_empty_history_is_nothing_to_keep(folders: Any, tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    folder = folders(config)
    folder.begin(config, {})
    folder.begin(config, {})
    assert not list(folder.path.glob("earlier-*"))


def test_folders_of_the_same_second_have_names_of_their_own(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(strftime=lambda _: "20250102-030405"))
    config = RunConfig(dataset="digits", model="my.models:a b/c")
    names = [str(folders(config).path) for _ in range(3)]
    usual = "runs/digits-my.models_a_b_c-20250102-030405"
    assert names == [usual, f"{usual}-2", f"{usual}-3"]


def test_a_folder_that_cannot_be_made_is_said(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FilesystemError, match=rf"^--run-dir {tmp_path}/file/run: cannot be made \(Not a directory\)$"):
        folders(RunConfig(run_dir=str(tmp_path / "file" / "run")))
    (tmp_path / "runs").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FilesystemError, match=r"^runs/mnist-cnn-[\d-]+: cannot be made \(.*\); --run-dir names another$"
    ):
        folders(RunConfig())
