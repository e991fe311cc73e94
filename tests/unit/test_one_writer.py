"""A run folder has one writer: who lost it writes nothing more, links are not followed, nothing is overwritten."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from fedmpi.config import RunConfig
from fedmpi.errors import CheckpointError, FedmpiError, FilesystemError
from fedmpi.fedavg import FedAvg
from fedmpi.halves.algorithm_server import AlgorithmServer
from fedmpi.lifecycle.lock import FileLock
from fedmpi.report import run_folder
from fedmpi.report.history import History, read_history
from fedmpi.report.run_folder import RunFolder
from tests.unit.test_files import claim
from tests.unit.test_report import DATA, MADE_WITH, RECORD


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Run:
    """A job of one round at a time in a run folder."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.config = RunConfig(run_dir=str(path), **options)
        self.folder = RunFolder(self.config, DATA)
        self.server = AlgorithmServer(FedAvg(self.config), nn.Linear(2, 2), self.config)

    def begin(self) -> Run:
        self.folder.begin(self.config, MADE_WITH)
        if self.folder.stored:
            self.server.load_state_dict(self.folder.stored["server"]["half"])
        else:
            self.keep()
        return self

    def keep(self) -> None:
        self.folder.write(self.server.round_idx, {"half": self.server.state_dict()})
        self.folder.checkpoints.finish()

    def round(self) -> None:
        self.folder.on_round(RECORD.__class__(**{**vars(RECORD), "round_idx": self.server.round_idx}))
        self.server.round_idx += 1
        self.keep()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    made: list[Run] = []

    def start(**options: Any) -> Run:
        made.append(Run(tmp_path / "run", **options))
        return made[-1]

    yield start
    for one in made:
        one.folder.close()


def take_over(path: Path) -> None:
    """As a job on another machine does, with a lock that was not touched for a minute."""
    claim(path / run_folder.LOCK, host="other", pid=77)


WRITES: dict[str, Callable[[Run], object]] = {
    "a history line": lambda job: job.folder.on_round(RECORD),
    "a checkpoint": lambda job: job.keep(),
    "model.pt": lambda job: job.folder.on_end(job.server),
    "timeline.json": lambda job: job.folder.write_timeline('{"traceEvents": []}'),
    "config.yaml": lambda job: job.folder.begin(job.config, MADE_WITH),
    "put aside": lambda job: Run.begin(job),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_job_that_lost_its_folder_ends_with_the_line_of_a_folder_in_use(run: Any, tmp_path: Path, what: str) -> None:
    job = run(resume="never").begin()
    job.round()
    take_over(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(FilesystemError, match=rf"^--run-dir {tmp_path}/run is in use by other pid 77 since ") as caught:
        WRITES[what](job)
    assert caught.value.exit_code == 2
    assert contents(tmp_path / "run") == before, "nothing was written, put aside or removed"


def test_a_stop_note_of_a_job_that_lost_its_folder_is_not_written(run: Any, tmp_path: Path) -> None:
    job = run().begin()
    take_over(tmp_path / "run")
    job.folder.note_stop("SIGTERM")
    assert not (tmp_path / "run" / "stopped").exists()


def test_a_lock_that_was_removed_ends_the_job_too(run: Any, tmp_path: Path) -> None:
    """Another job may have come, used the folder and left."""
    job = run().begin()
    (tmp_path / "run" / run_folder.LOCK).unlink()
    with pytest.raises(FilesystemError, match=r"is no longer this job's: .*lock was removed"):
        job.folder.on_round(RECORD)


def test_what_a_loser_still_writes_reaches_no_file_of_the_winner(tmp_path: Path) -> None:
    """Between the last look at the lock and the write: the line goes to a file that no name leads to any more."""
    path = tmp_path / "history.jsonl"
    loser = History(path)
    loser.on_round(RECORD)
    winner = History(path, loser.num_bytes)
    os.write(loser._file, b"half a li")
    winner.on_round(RECORD)
    assert read_history(path) == [RECORD, RECORD]


# locks dated in the future


def test_a_lock_dated_in_the_future_is_watched_and_taken_over_when_it_stands_still(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    claim(tmp_path / "lock", age_s=-7200)
    with caplog.at_level(logging.INFO, logger="fedmpi"), FileLock(tmp_path / "lock", timeout_s=0, heartbeat_s=0.1):
        pass
    assert "which is dated in the future" in caplog.text


def test_a_lock_dated_in_the_future_that_is_touched_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder's file system is hours ahead; it lives."""
    ahead_s = [7200.0]
    real_sleep = time.sleep

    def touching(seconds: float) -> None:
        ahead_s[0] += 1
        os.utime(tmp_path / "lock", (time.time() + ahead_s[0],) * 2)
        real_sleep(seconds)

    claim(tmp_path / "lock", age_s=-7200)
    monkeypatch.setattr(time, "sleep", touching)
    with pytest.raises(FilesystemError, match="is in use by elsewhere pid 4242"):
        FileLock(tmp_path / "lock", timeout_s=0, heartbeat_s=0.1).__enter__()


@pytest.mark.parametrize(
    "fields",
    [
        {"host": "\x1b[31mred\nsecond line", "since": "\x07" * 200},
        {"host": "h" * 10**4},
        {"host": {"a": [1] * 100}},
        {"pid": 10**30},
        {"pid": -1},
        {"pid": 1.5},
        {"pid": float("nan")},
        {"started": None},
        {"more": 1},
    ],
)
def test_a_crafted_lock_is_told_in_one_printable_line(tmp_path: Path, fields: dict[str, Any]) -> None:
    claim(tmp_path / "lock", **fields)
    with pytest.raises(FilesystemError) as caught:
        FileLock(tmp_path / "lock", timeout_s=0).__enter__()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b"9" * 5000, b"[" * 3000, b'{"pid": ' + b"9" * 4000, b"\0" * 10**6])
def test_a_lock_that_is_no_lock_goes_stale_like_any_other(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lock"
    path.write_bytes(content)
    with pytest.raises(FilesystemError, match=r"is in use by an unknown process|it is longer than"):
        FileLock(path, timeout_s=0).__enter__()


def plant(path: Path, kind: str, target: Path) -> None:
    if kind == "link":
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to(target.with_name("nowhere"))
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["stopped", "history.jsonl", "config.yaml", "model.pt", "timeline.json", ".lock"])
def test_what_is_planted_in_a_run_folder_is_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "run").mkdir()
    plant(tmp_path / "run" / name, kind, precious)
    with pytest.raises(FilesystemError, match=name) as caught:
        Run(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert precious.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_checkpoint_folder_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    plant(tmp_path / "run" / "checkpoint", kind, tmp_path / "elsewhere")
    with pytest.raises(FilesystemError, match=r"run/checkpoint must be a folder, found a (link|pipe)"):
        Run(tmp_path / "run")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_links_planted_in_mid_run_are_replaced_or_refused(run: Any, tmp_path: Path) -> None:
    folder, precious = tmp_path / "run", tmp_path / "precious"
    precious.write_text("mine")
    job = run().begin()
    for name in ("stopped", "model.pt"):
        (folder / name).symlink_to(precious)
    job.folder.note_stop("SIGTERM")
    job.folder.on_end(job.server)
    assert not (folder / "stopped").is_symlink()
    assert not (folder / "model.pt").is_symlink()
    (folder / "checkpoint").rename(tmp_path / "elsewhere")
    (folder / "checkpoint").symlink_to(tmp_path / "elsewhere")
    held = contents(tmp_path / "elsewhere")
    with pytest.raises(FilesystemError, match="must be a folder, found a link"):
        job.round()
    assert contents(tmp_path / "elsewhere") == held
    assert precious.read_text() == "mine"


def test_a_link_to_the_run_folder_itself_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "there")
    job = Run(tmp_path / "run").begin()
    job.round()
    job.folder.close()
    assert len(read_history(tmp_path / "there" / "history.jsonl")) == 1


def test_a_history_with_two_names_changes_under_one_only(run: Any, tmp_path: Path) -> None:
    """A hard link: the other name keeps what it had."""
    precious = tmp_path / "precious"
    precious.write_text("mine\n")
    (tmp_path / "run").mkdir()
    os.link(precious, tmp_path / "run" / "history.jsonl")
    run(resume="never").begin().round()
    assert precious.read_text() == "mine\n"


# nothing is overwritten


def test_runs_put_aside_in_one_second_have_folders_of_their_own(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(strftime=lambda _: "20250102-030405"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "earlier-20250102-030405").symlink_to(tmp_path / "elsewhere")
    held = []
    for _ in range(3):
        job = run(resume="never").begin()
        job.round()
        job.folder.close()
        held.append((tmp_path / "run" / "history.jsonl").read_bytes())
    names = sorted(path.name for path in (tmp_path / "run").glob("earlier-*") if not path.is_symlink())
    assert names == ["earlier-20250102-030405-2", "earlier-20250102-030405-3"]
    assert [(tmp_path / "run" / name / "history.jsonl").read_bytes() for name in names] == held[:2]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_models_put_aside_are_not_overwritten(run: Any, tmp_path: Path) -> None:
    for content in ("first", "second"):
        job = run()
        if not job.folder.finished:
            job.begin()
        (tmp_path / "run" / "model.pt").write_text(content)
        job.folder.close()
        run().begin().folder.close()
    aside = sorted(path.name for path in (tmp_path / "run").glob("model-round-*"))
    assert [(tmp_path / "run" / name).read_text() for name in aside] == ["first", "second"]


# history in mid-run


def test_a_history_that_vanished_or_was_replaced_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.on_round(RECORD)
    path.unlink()
    history.on_round(RECORD)
    path.with_name("other").write_text("{}\n")
    path.with_name("other").replace(path)
    history.sync()
    with path.open("a") as file:
        file.write("a foreign line\n")
    history.on_round(RECORD)
    assert read_history(path) == [RECORD] * 3
    assert [record.getMessage().partition(" was ")[2] for record in caplog.records] == [
        "removed or replaced by another program in mid-run: written again",
        "removed or replaced by another program in mid-run: written again",
        "written to by another program in mid-run: written again",
    ]


def test_a_history_that_was_cut_ends_the_job(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.on_round(RECORD)
    os.truncate(path, 10)
    with pytest.raises(FilesystemError, match=r"history\.jsonl was cut by another program in mid-run: it has 10 bytes"):
        history.on_round(RECORD)
    assert path.stat().st_size == 10


def test_an_edit_of_equal_length_is_noticed_on_resume(run: Any, tmp_path: Path) -> None:
    job = run().begin()
    job.round()
    job.round()
    job.folder.close()
    path = tmp_path / "run" / "history.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"accuracy": 0.9125', b'"accuracy": 0.9999', 1))
    with pytest.raises(CheckpointError, match="the right number of lines, of which some were edited"):
        run()


def test_a_sparse_history_is_not_read_to_its_end(run: Any, tmp_path: Path) -> None:
    job = run().begin()
    job.round()
    job.folder.close()
    os.truncate(tmp_path / "run" / "history.jsonl", 200 * 10**9)
    started = time.monotonic()
    run().begin().folder.close()
    assert (tmp_path / "run" / "history.jsonl").stat().st_size < 10**4, "what no checkpoint knows of is cut off"
    assert time.monotonic() - started < 1


# crafted checkpoints


def craft(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A checkpoint with a right checksum and other content."""
    from fedmpi.lifecycle.checkpoint import read_state, snapshot, write_state

    state = read_state(path)
    change(state)
    copied = snapshot(state)
    with path.open("wb") as file:
        write_state(file, copied)


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state.setdefault(key, {})
        state[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "value", [10**30, -1, float("nan"), float("inf"), "3", None, True, [1], {"a": 1}, "\x1b[31m\n"]
)
@pytest.mark.parametrize(
    "keys",
    [
        ("history_bytes",),
        ("history_sha256",),
        ("server",),
        ("server", "half"),
        ("server", "half", "round_idx"),
        ("server", "half", "vector"),
        ("server", "half", "integers"),
        ("server", "costs"),
        ("server", "elapsed_s"),
        ("server", "pace"),
        ("server", "pace", "round_s"),
        ("run", "options"),
        ("run", "options", "client_lr"),
        ("run", "options", "\x1b[31m\n"),
        ("made_with",),
        ("changes",),
    ],
)
def test_odd_values_in_a_checkpoint_are_refused_in_one_line(
    run: Any, tmp_path: Path, keys: tuple[str, ...], value: Any
) -> None:
    job = run().begin()
    job.round()
    job.folder.close()
    craft(tmp_path / "run" / "checkpoint" / "round-000001.ckpt", put(*keys, value=value))
    started, said = time.monotonic(), ""
    try:
        run().begin().folder.close()
    except FedmpiError as error:
        said = str(error)
    assert said or keys[-1] in ("history_sha256", "elapsed_s", "round_s", "changes", "pace", "made_with"), "may be so"
    assert not said or said.isprintable()
    assert len(said) < 600
    assert time.monotonic() - started < 1


def test_a_checkpoint_under_the_name_of_another_round_is_refused(run: Any, tmp_path: Path) -> None:
    job = run().begin()
    job.round()
    job.folder.close()
    folder = tmp_path / "run" / "checkpoint"
    (folder / "round-999999.ckpt").write_bytes((folder / "round-000001.ckpt").read_bytes())
    with pytest.raises(CheckpointError, match="it holds round 1, its name says 999999"):
        run()


def test_a_timeline_goes_on_over_the_lives_of_a_run(run: Any, tmp_path: Path) -> None:
    def trace(name: str, host: str) -> str:
        events = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": host}}]
        return json.dumps(
            {"traceEvents": [*events, {"name": name, "ph": "X", "pid": 0, "tid": 0, "ts": 5.0, "dur": 1.0}]}
        )

    for name, host in (("one", "alpha"), ("two", "alpha"), ("three", "beta")):
        job = run().begin()
        job.folder.write_timeline(trace(name, host))
        job.folder.close()
    events = json.loads((tmp_path / "run" / "timeline.json").read_text())["traceEvents"]
    named = [(event["name"], event["pid"]) for event in events if event["ph"] == "X"]
    assert named == [("one", 0), ("two", 0), ("three", 1)]
    begins = [event["ts"] for event in events if event["ph"] == "X"]
    assert begins == [5.0, 11.0, 17.0], "one after the other, though no checkpoint has counted any time"
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == ["alpha", "beta"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"traceEvents": 3}',
        '{"traceEvents": [{"name": "a", "ph": "X", "pid": 0, "ts": 1e999, "dur": 0}]}',
        "9" * 5000,
        "[" * 5000,
        '{"traceEvents": [{"name": "a", "ph": "X", "pid": 0, "ts": NaN, "dur": 0}]}',
    ],
)
def test_a_timeline_of_something_else_is_put_aside(run: Any, tmp_path: Path, content: str) -> None:
    run().begin().folder.close()
    (tmp_path / "run" / "timeline.json").write_text(content)
    run().begin().folder.write_timeline('{"traceEvents": []}')
    assert json.loads((tmp_path / "run" / "timeline.json").read_text()) == {"traceEvents": []}
    assert (tmp_path / "run" / "timeline.json.other").read_text() == content
