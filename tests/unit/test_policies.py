"""Signals set a flag; deadlines come from an option or from Slurm; policies write checkpoints and stop the job."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmpi.lifecycle import signals as signals_module
from fedmpi.lifecycle.policies import CheckpointPolicy, StopPolicy
from fedmpi.lifecycle.signals import (
    Deadline,
    StopSignals,
    job_deadline,
    parse_slurm_time,
    slurm_deadline,
    slurm_seconds_left,
)
from fedmpi.mpi.processes import process_age_s


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    }
    yield StopSignals()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_noted_and_nothing_else(signals: StopSignals, number: signal.Signals) -> None:
    signals.catch()
    assert signals.received == 0
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received == number, "the first one is told"


@pytest.mark.usefixtures("signals")
def test_a_hangup_that_was_ignored_at_the_start_stays_ignored() -> None:
    """`nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = StopSignals()
    for _ in range(2):
        signals.catch()
        os.kill(os.getpid(), signal.SIGHUP)
    assert signals.received == 0


def test_ctrl_c_is_noted_once_and_ends_the_job_at_the_second_time(
    signals: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    signals.catch_interrupt(said.append)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the same key press, by way of the launcher
    assert signals.received == signal.SIGINT
    assert said == ["interrupted: stopping at the end of this round; press Ctrl-C again to stop at once"]
    later = time.monotonic() + 0.3
    monkeypatch.setattr(signals_module.time, "monotonic", lambda: later)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:07", 7),
        ("59:30", 3570),
        ("1:00:00", 3600),
        ("2-03:04:05", 183845),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_slurms_way_to_write_a_time(text: str, seconds: float | None) -> None:
    assert parse_slurm_time(text) == seconds


def in_job(folder: Path, job: str = "17") -> Path:
    """A process table in which this process runs below Slurm's daemon of a step of that job."""
    for pid, parent, title in ((os.getpid(), 4, "python"), (4, 1, f"slurmstepd: [{job}.0]")):
        (folder / "proc" / str(pid)).mkdir(parents=True, exist_ok=True)
        (folder / "proc" / str(pid) / "stat").write_text(f"{pid} (x) S {parent} 1")
        (folder / "proc" / str(pid) / "cmdline").write_bytes(title.encode() + b"\0")
    return folder / "proc"


def squeue(folder: Path, body: str) -> dict[str, str]:
    (folder / "squeue").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "squeue").chmod(0o755)
    return {"PATH": str(folder), "SLURM_JOB_ID": "17"}


def test_slurm_is_asked_for_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = squeue(tmp_path, 'case "$*" in *--jobs=17*--format=%L*) echo " 1:40" ;; *) exit 1 ;; esac')
    monkeypatch.setenv("PATH", environ["PATH"])
    assert slurm_seconds_left("17", environ) == 100
    found = slurm_deadline(environ, in_job(tmp_path))
    assert found is not None
    assert found.what == "the time limit of Slurm job 17"
    assert 95 < found.left_s() <= 100
    assert 85 < found.less(10).left_s() <= 90


def test_a_task_of_an_array_asks_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = '*--jobs=17_3*) echo "1:40" ;; *--jobs=18*) echo "3:20" ;; *) echo "1:40"; echo "2:40" ;;'
    environ = squeue(tmp_path, f'case "$*" in {answers} esac')
    monkeypatch.setenv("PATH", environ["PATH"])
    environ = {**environ, "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    found = slurm_deadline(environ, in_job(tmp_path))
    assert found is not None
    assert found.what == "the time limit of Slurm job 17_3"
    del environ["SLURM_ARRAY_TASK_ID"]
    several = slurm_deadline({**environ, "SLURM_JOB_END_TIME": str(time.time() + 100)}, in_job(tmp_path))
    assert several is not None, "what does not parse is no answer"
    environ |= {"SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "18"}
    other = slurm_deadline(environ, in_job(tmp_path, "18"))
    assert other is not None, "the array's variables are another job's"
    assert other.what == "the time limit of Slurm job 18"


def test_the_earlier_of_two_deadlines_counts() -> None:
    slurm = Deadline(200, "the time limit of Slurm job 5")
    own = job_deadline(50, 100, slurm)
    assert own == Deadline(150, "--max-seconds 100", "raise --max-seconds")
    assert job_deadline(50, 100, None) == own
    assert job_deadline(150, 100, slurm) == slurm
    assert job_deadline(50, None, slurm) == slurm
    assert job_deadline(50, None, None) is None


def test_a_job_that_is_over_left_its_number_in_this_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = squeue(tmp_path, "exit 0") | {"SLURM_JOB_END_TIME": str(time.time() + 5)}
    monkeypatch.setenv("PATH", environ["PATH"])
    assert slurm_deadline(environ, in_job(tmp_path)) is None


@pytest.mark.parametrize("body", ["exit 1", "exec sleep 30", None])
def test_where_slurm_does_not_answer_the_environment_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str | None
) -> None:
    environ = squeue(tmp_path, body) if body else {"SLURM_JOB_ID": "17"}
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if body and "sleep" in body else str(tmp_path))
    environ["PATH"] = os.environ["PATH"]
    assert slurm_deadline(environ, in_job(tmp_path), 0.5) is None
    left = slurm_seconds_left("17", {**environ, "SLURM_JOB_END_TIME": str(time.time() + 100)}, 0.5)
    assert left is not None
    assert 95 < left <= 100
    assert slurm_seconds_left("17", {**environ, "SLURM_JOB_END_TIME": "tomorrow"}, 0.5) is None
    for end in (time.time() - 100, "nan", "inf", "-inf"):
        assert slurm_seconds_left("17", {**environ, "SLURM_JOB_END_TIME": str(end)}, 0.5) is None


def test_outside_a_task_of_that_job_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue(tmp_path, f"touch {tmp_path}/asked; echo 0:10")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm_deadline({"PATH": os.environ["PATH"]}) is None
    left_over = {"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": str(time.time() + 5), "SLURM_TASK_PID": "1"}
    assert slurm_deadline({"PATH": os.environ["PATH"]} | left_over) is None
    assert slurm_deadline({"PATH": os.environ["PATH"]} | left_over, in_job(tmp_path, "170")) is None, "another job's"
    assert not (tmp_path / "asked").exists()


def test_the_age_of_this_process() -> None:
    before = process_age_s()
    time.sleep(0.05)
    assert 0 < before < process_age_s()


# the policies


class Disk:
    """Keeps in memory."""

    writes_for_s = 0.0
    longest_s = 0.0
    how_to_go_on = "run it again"

    def __init__(self) -> None:
        self.checkpoints: Any = self
        self.kept: list[int] = []
        self.finished = 0

    def write(self, round_idx: int, state: Any) -> None:
        assert state == {"rounds": round_idx}
        self.kept.append(round_idx)

    def finish(self) -> None:
        self.finished += 1

    def note_stop(self, reason: str) -> None:
        self.noted = reason


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def stop_policy(clock: Clock, disk: Disk | None = None, every: int | None = None, **options: Any) -> StopPolicy:
    return StopPolicy(CheckpointPolicy(disk, every, clock), clock=clock, **options)


def run(policy: StopPolicy, clock: Clock, rounds: range, seconds: float) -> int:
    """Rounds of so many seconds until the policy says stop; how many there were."""
    for done in rounds:
        if policy.begin_round() is not None:
            return done
        clock.now += seconds
        policy.after_round(seconds)
        policy.checkpoints.after_round(done + 1, lambda done=done: {"rounds": done + 1})  # type: ignore[misc]
    return rounds.stop


def test_every_nth_round_and_the_last_is_kept_once(clock: Clock) -> None:
    disk = Disk()
    policy = stop_policy(clock, disk, every=3)
    policy.checkpoints.begin(0, lambda: {"rounds": 0}, resumed=False)
    run(policy, clock, range(6), 1.0)
    policy.checkpoints.write(6, lambda: {"rounds": 6}, wait=True)
    assert disk.kept == [0, 3, 6]
    assert disk.finished == 2, "at the beginning and at the end it waits for the disk"


def test_by_time_it_is_once_a_minute_and_not_while_one_is_written(clock: Clock) -> None:
    disk = Disk()
    policy = stop_policy(clock, disk)
    policy.checkpoints.begin(7, lambda: {"rounds": 7}, resumed=True)
    run(policy, clock, range(7, 20), 25.0)
    assert disk.kept == [10, 13, 16, 19]
    disk.writes_for_s = 5.0
    run(policy, clock, range(20, 30), 25.0)
    assert disk.kept == [10, 13, 16, 19]


def test_without_a_store_nothing_is_written_and_nothing_fails(clock: Clock) -> None:
    policy = stop_policy(clock)
    policy.checkpoints.begin(0, dict, resumed=False)
    assert run(policy, clock, range(100), 25.0) == 100
    policy.checkpoints.write(100, dict, wait=True)


def test_a_signal_here_or_elsewhere_stops(clock: Clock) -> None:
    here = StopSignals()
    policy = stop_policy(clock, signals=here)
    assert policy.begin_round() is None
    here.received = signal.SIGTERM
    assert policy.begin_round() == "SIGTERM"
    elsewhere = stop_policy(clock)
    elsewhere.on_signal(signal.SIGUSR1, 3)
    elsewhere.on_signal(signal.SIGTERM, 4)
    assert elsewhere.begin_round() == "SIGUSR1 on rank 3"


def test_no_round_is_begun_that_would_not_end_in_time(clock: Clock) -> None:
    """10 s a round, 2 s a checkpoint, 95 s: the ninth round ends at 90 s and its checkpoint at 92."""
    disk = Disk()
    disk.longest_s = 2.0
    policy = stop_policy(clock, disk, deadline=Deadline(clock.now + 95, "--max-seconds 95"))
    assert run(policy, clock, range(100), 10.0) == 9
    assert policy.begin_round() == "a round takes about 10.0 s, 5.0 s are left of --max-seconds 95"


def test_the_margin_is_the_longest_round_seen(clock: Clock) -> None:
    policy = stop_policy(clock, deadline=Deadline(clock.now + 100, "x"))
    run(policy, clock, range(1), 40.0)
    assert run(policy, clock, range(1, 100), 5.0) == 5, "40 + 4 x 5 = 60: 40 are left, no more than the longest"


def test_a_time_that_is_shorter_than_a_round_says_so(clock: Clock) -> None:
    policy = stop_policy(clock, Disk(), deadline=Deadline(clock.now + 30, "the time limit of Slurm job 5", "more time"))
    assert policy.begin_round() is None, "nothing is known yet"
    assert policy.how_to_go_on == "run it again"
    policy.longest_s = 50.0  # from the checkpoint
    assert policy.begin_round() == (
        "not one round fits: a round takes about 50.0 s, 30.0 s are left of the time limit of Slurm job 5"
    )
    assert policy.how_to_go_on == "more time: the same command would stop here again"


def test_a_round_is_given_up_only_when_it_is_late_and_the_end_is_near(clock: Clock) -> None:
    disk = Disk()
    policy = stop_policy(clock, disk, deadline=Deadline(clock.now + 100, "--max-seconds 100", "raise --max-seconds"))
    assert policy.overdue(2.0) is None, "no round is under way"
    assert policy.begin_round() is None
    clock.now += 97
    assert policy.overdue(2.0) is None
    clock.now += 1.5
    assert policy.overdue(2.0) == (
        "not one round fits: a round takes longer, more than 98.5 s, and --max-seconds 100 is over: "
        "raise --max-seconds: the same command would stop here again"
    )
    policy.after_round(98.5)
    assert policy.overdue(2.0) is None


def test_a_round_that_is_not_late_is_left_alone_to_the_end(clock: Clock) -> None:
    policy = stop_policy(clock, deadline=Deadline(clock.now + 100, "x"))
    run(policy, clock, range(1), 49.5)
    assert policy.begin_round() is None
    clock.now += 49
    assert policy.overdue(2.0) is None
    clock.now += 2
    late = policy.overdue(2.0)
    assert late is not None
    assert late.startswith("a round takes longer than any before, more than 51.0 s, and x is over: nothing was kept")


def test_what_was_measured_goes_on_with_the_run(clock: Clock) -> None:
    disk = Disk()
    disk.longest_s = 7.0
    first = stop_policy(clock, disk)
    run(first, clock, range(3), 20.0)
    first.longest_client_s = 4.0
    again = stop_policy(clock, Disk(), deadline=Deadline(clock.now + 26, "x"))
    again.load_state_dict(first.state_dict())
    assert again.state_dict() == {"round_s": 20.0, "client_s": 4.0, "checkpoint_s": 7.0}
    assert again.begin_round() == "not one round fits: a round takes about 20.0 s, 26.0 s are left of x"


def test_a_checkpoint_under_way_is_waited_for_before_the_last(clock: Clock) -> None:
    disk = Disk()
    policy = stop_policy(clock, disk, deadline=Deadline(clock.now + 20, "x"))
    disk.longest_s, policy.longest_s = 5.0, 12.0
    assert policy.begin_round() is None
    disk.writes_for_s = 1.0
    assert policy.begin_round() is not None
