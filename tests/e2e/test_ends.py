"""However a job ends, it ends for all ranks within seconds, with a true exit code and one readable message."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.e2e.conftest import SMALL, under_open_mpi

MODEL = """
import logging, os, sys, time
from torch import nn
class Net(nn.Module):
    def __init__(self, act, training):
        super().__init__()
        self.layer, self.act, self.when = nn.Linear(784, 10), act, training
    def forward(self, x):
        if self.training is self.when:
            self.act()
        return self.layer(x.flatten(1))
def boom():
    raise ValueError("boom")
train = lambda shape, classes: Net(boom, True)
evaluate = lambda shape, classes: Net(boom, False)
exit0 = lambda shape, classes: Net(lambda: os._exit(0), False)
exit5 = lambda shape, classes: Net(lambda: os._exit(5), True)
sysexit = lambda shape, classes: Net(lambda: sys.exit(0), True)
def hang():
    global steps
    steps += 1
    while steps > 45 and not slow:
        pass
    time.sleep(0.3 * slow)
steps, slow = 0, "FEDMPI_TEST_SLOW" in os.environ
chatty = lambda shape, classes: Net(lambda: logging.getLogger("fedmpi").warning("%s chatty", 4000 * "x"), True)
printing = lambda shape, classes: Net(lambda: print(1000 * "x"), True)
slow_step = lambda shape, classes: Net(lambda: time.sleep(1), True)
endless = lambda shape, classes: Net(hang, True)
killed = lambda shape, classes: Net(lambda: os.kill(os.getpid(), 9), False)
"""
ENDS_WITHIN_S = 10


@pytest.fixture
def bad_model(tmp_path):
    (tmp_path / "bad.py").write_text(MODEL)


def gone(job) -> bool:
    """Whether no process of the job is left, or will be in a moment."""
    end = time.monotonic() + 5
    while job.ranks() and time.monotonic() < end:
        time.sleep(0.05)
    return not job.ranks()


@pytest.mark.usefixtures("bad_model")
@pytest.mark.parametrize(
    ("what", "num_ranks"),
    [
        ("train", 2),
        ("evaluate", 3),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [("train", 1), ("train", 5), ("evaluate", 1)]),
    ],
)
def test_an_exception_on_a_rank_ends_all_with_1_and_one_traceback(start, what, num_ranks):
    running = start(num_ranks, *SMALL, "--model", f"bad:{what}")
    result = running.end()
    assert result.code == 1, result.text
    assert result.text.count("Traceback (most recent call last)") == 1, result.text
    assert result.text.count("ValueError: boom") == 1
    assert "round 0" in result.err
    assert "host " in result.err
    assert gone(running)


@pytest.mark.usefixtures("bad_model")
@pytest.mark.parametrize(
    ("what", "code", "said"),
    [("exit0", 1, "os._exit(0)"), ("exit5", 5, "os._exit(5)"), ("sysexit", 1, "sys.exit(0)")],
)
@pytest.mark.parametrize("num_ranks", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_that_leaves_in_mid_run_does_not_pass_for_done(start, what, code, said, num_ranks):
    running = start(num_ranks, *SMALL, "--model", f"bad:{what}")
    result = running.end()
    assert result.code == code, result.text
    assert result.text.count(said) == 1, result.text
    assert "Traceback" not in result.text
    assert gone(running)


@pytest.mark.usefixtures("bad_model")
def test_a_rank_that_kills_itself(start):
    running = start(3, *SMALL, "--model", "bad:killed")
    result = running.end()
    assert result.code != 0
    assert "signal 9" in result.text
    assert "Traceback" not in result.text
    assert gone(running)


@pytest.mark.parametrize("which", [0, 2, pytest.param(1, marks=pytest.mark.slow)])
def test_sigkill_of_any_rank(start, which):
    running = start(3, *SMALL, "--rounds", "100000")
    running.wait_for_round(2)
    victim = running.ranks()[which]
    begun = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    result = running.end(30)
    assert result.code != 0
    assert time.monotonic() - begun < ENDS_WITHIN_S
    assert gone(running)
    assert len(result.history()) >= 2
    assert not (running.run_dir / "model.pt").exists()


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c(start, times):
    running = start(4, *SMALL, "--rounds", "100000")
    running.wait_for_round(2)
    begun = time.monotonic()
    for i in range(times):
        time.sleep(0.3 * bool(i))
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGINT)
    result = running.end(30)
    if under_open_mpi():  # its launcher ends the job itself, in its own way
        assert result.code not in (0, 2, 3), result.text
    else:
        assert result.code == 75 if times == 1 else result.code not in (0, 2, 3, 75), result.text
        assert result.text.count("interrupted") == 1, "it is told once, and at once"
    assert time.monotonic() - begun < ENDS_WITHIN_S
    assert "Traceback" not in result.text
    assert gone(running)
    assert len(result.history()) >= 2


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_divergence_is_code_3_and_names_client_and_round(job, num_ranks):
    result = job(num_ranks, *SMALL, "--client-lr", "1e30")
    assert result.code == 3, result.text
    wanted = "not finite after training in round 0: lower --client-lr"
    said = [line for line in result.err.splitlines() if wanted in line]
    assert len(said) == 1, result.text
    assert "fedmpi: ERROR: the models of clients " in said[0]
    assert "Traceback" not in result.text
    assert result.history() == []


@pytest.mark.parametrize("which", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_noticed_and_named(start, which):
    running = start(3, *SMALL, "--rounds", "100000", "--stall-timeout", "3")
    running.wait_for_round(20)
    victim = running.ranks()[which]
    begun = time.monotonic()
    os.kill(victim, signal.SIGSTOP)
    result = running.end(30)
    assert result.code == 1, result.text
    assert time.monotonic() - begun < 3 + ENDS_WITHIN_S
    assert f"rank {which} (pid {victim}) of this host has shown no sign of life for " in result.err
    assert "it is stopped (SIGSTOP, or a debugger)" in result.err
    assert result.err.count("no sign of life") == 1
    assert gone(running)
    assert len(result.history()) >= 20


@pytest.mark.usefixtures("bad_model")
def test_an_endless_forward_is_noticed_and_shown(start):
    running = start(2, *SMALL, "--model", "bad:endless", "--stall-timeout", "3")
    result = running.end(60)
    assert result.code == 1, result.text
    assert "rank 1, host " in result.err
    assert "round 0] has made no progress for " in result.err
    assert "steps (--stall-timeout). It is at\n" in result.err
    assert "in hang" in result.err, "its Python stack"
    assert result.err.count("has made no progress") == 1
    assert gone(running)


@pytest.mark.slow
@pytest.mark.usefixtures("bad_model")
def test_a_client_that_takes_longer_than_the_timeout_is_no_stall(job):
    """10 steps of 0.3 s a client; a rank that waits meanwhile is none either."""
    options = [*SMALL, "--rounds", "1", "--cohort-size", "3", "--stall-timeout", "2"]
    result = job(3, *options, "--model", "bad:endless", env={"FEDMPI_TEST_SLOW": "1"})
    assert result.code == 0, result.text


@pytest.mark.slow
@pytest.mark.usefixtures("bad_model")
@pytest.mark.parametrize("num_ranks", [0, 3])
def test_a_round_that_outlives_max_seconds_is_given_up_in_its_middle(job, num_ranks):
    """70 steps of a second; outside Slurm."""
    launcher = () if num_ranks == 0 else None
    result = job(num_ranks, *SMALL, "--model", "bad:slow_step", "--max-seconds", "20", launcher=launcher)
    assert result.code == 75, result.text
    assert result.seconds < 30
    assert "not one round fits: a round takes longer, more than " in result.err
    assert result.err.rstrip().endswith("raise --max-seconds: the same command would stop here again"), result.err
    assert result.history() == []


@pytest.mark.slow
@pytest.mark.usefixtures("bad_model")
@pytest.mark.parametrize("num_ranks", [0, 3])
def test_a_log_that_nobody_reads_does_not_hold_the_job(start, num_ranks):
    """840 kB of log, more than pipes hold, and a watchdog that would not wait long."""
    launcher = () if num_ranks == 0 else None
    running = start(num_ranks, *SMALL, "--model", "bad:chatty", "--stall-timeout", "3", launcher=launcher)
    running.wait_for_round(3, 60)  # nothing reads its pipes so far
    result = running.end()
    assert result.code == 0, result.text
    assert "no progress" not in result.text
    assert result.text.count("xxx chatty") >= 210, "and the steps of a trial before"


@pytest.mark.slow
@pytest.mark.usefixtures("bad_model")
def test_a_rank_whose_own_print_nobody_reads_is_no_hang(start):
    running = start(1, *SMALL, "--model", "bad:printing", "--stall-timeout", "2", launcher=())
    time.sleep(15)  # it has printed what a pipe holds, and waits
    assert running.process.poll() is None
    assert running.end().code == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_the_launcherless_rank_stops_it_with_75(start, number):
    running = start(1, *SMALL, "--rounds", "100000", launcher=())
    running.wait_for_round(2)
    os.kill(running.process.pid, number)
    result = running.end(30)
    assert result.code == 75, result.text
    assert f"{signal.Signals(number).name}: stopping after round " in result.err


def test_a_good_run_ends_without_an_abort(start):
    for i in range(2):
        running = start(3, *SMALL, name=f"run{i}")
        result = running.end()
        assert result.code == 0
        assert not any(word in result.text.lower() for word in ("abort", "bad termination", "traceback", "error"))
        assert (running.run_dir / "model.pt").exists()
        assert len(result.history()) == 3
        assert gone(running)
