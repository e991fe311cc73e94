"""What counts as hanging: silence, longer than what was seen, of a rank that is not waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedmpi.errors import EXIT_CRASH, EXIT_STOPPED
from fedmpi.lifecycle import progress, watchdog
from fedmpi.lifecycle.status import Silence
from fedmpi.lifecycle.watchdog import Watchdog
from fedmpi.mpi.node_status import NOBODY, NodeStatus, status_bytes
from fedmpi.mpi.waiting import Pending


def test_silence_is_told_from_a_slow_rank_by_what_was_seen():
    silence = Silence(10)
    assert silence.look("a", 100) == 0
    assert silence.look("a", 104) == 4
    assert silence.limit_s == 10
    assert silence.look("b", 108) == 0
    assert silence.limit_s == 24, "it went on after 8 s: three times that is not too long"
    assert silence.look("b", 132) == 24
    silence.forget()
    assert silence.look("b", 1000) == 0, "the process itself was stopped in between"
    assert silence.limit_s == 24


def test_the_status_shows_each_rank_what_the_others_do():
    memory = np.full(status_bytes(3), 7, np.uint8)
    views = [NodeStatus(memory, [2, 5, 6], rank) for rank in (2, 5, 6)]
    views[0].clear()
    assert views[2].speaker[0] == NOBODY
    assert views[1].read(6) == (0, "")
    views[2].show("client 7, round 3")
    views[2].show("client 8, round 3, " + "ä" * 500)
    count, text = views[0].read(6)
    assert count == 2
    assert text.startswith("client 8, round 3, ää")
    views[2].show("idle")
    assert views[0].read(6) == (3, "idle")
    assert views[0].read(5) == (0, "")
    views[1].speaker[0] = 5
    assert views[2].speaker[0] == 5


@pytest.fixture
def net():
    """Rank 1 of three on this host; rank 9 is on another."""
    memory = np.zeros(status_bytes(3), np.uint8)
    status = NodeStatus(memory, [0, 1, 2], 1)
    status.clear()
    said = []
    return SimpleNamespace(
        rank=1, node=[0, 1, 2], peers={}, status=status, activity="client 7, round 3", waits=False,
        waits_for=(None, 0.0), pending=None, said=said, others=[NodeStatus(memory, [0, 1, 2], rank) for rank in (0, 2)],
    )  # fmt: skip


def say(net, message, exit_code):
    """In the place of the end of the job."""
    net.said.append((message, exit_code))


def watched(net, seconds, each=lambda: None, timeout_s=0.4, policy=None, set_up_s=None):
    """What was said within some seconds in which `each` was called ever again."""
    stop = threading.Event()

    def alive():
        while not stop.wait(0.02):
            for other in net.others:
                other.show("alive")

    others = threading.Thread(target=alive)
    others.start()
    end = time.monotonic() + seconds
    with Watchdog(net, timeout_s, set_up_s or 600.0, say) as watched:
        if set_up_s is None:
            watched.begin_rounds(policy)
        while time.monotonic() < end and not net.said:
            each()
            time.sleep(0.02)
    stop.set()
    others.join()
    return net.said


def test_a_rank_that_hangs_says_where(net):
    ((message, code),) = watched(net, 20)[:1]
    assert code == EXIT_CRASH
    assert message.startswith("has made no progress for ")
    assert f"after {progress.steps()} steps" in message
    assert "test_watchdog.py" in message
    assert "in watched" in message


@pytest.mark.parametrize("sign", ["steps", "activity", "waits"])
def test_a_rank_that_works_or_waits_does_not_hang(net, sign):
    def each():
        if sign == "steps":
            progress.beat()
        if sign == "activity":
            net.activity += "."

    net.waits = sign == "waits"
    assert watched(net, 1.5, each) == []


def by_optimizer(model):
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1)  # of a model that nobody watches
    return optimizer.step


def by_hand(model):
    def step():
        with torch.no_grad():
            model.weight -= 0.1

    return step


def by_data(model):
    return lambda: model.weight.data.mul_(0.5)


def by_gradients(model):
    return lambda: model(torch.ones(1, 3)).sum().backward()  # accumulated, no step yet


def by_buffers(model):
    return lambda: model.count.add_(1)


@pytest.mark.parametrize("how", [by_optimizer, by_hand, by_data, by_gradients, by_buffers])
def test_a_users_own_loop_that_calls_nothing_of_ours_does_not_hang(net, how):
    model = torch.nn.Linear(3, 2)
    model.register_buffer("count", torch.zeros(1))
    progress.watch(model)
    assert watched(net, 1.5, how(model)) == []


def test_a_model_that_is_watched_and_stays_as_it_is_is_no_sign_of_life(net):
    model = torch.nn.Linear(3, 2)
    progress.watch(model)
    ((message, _),) = watched(net, 20)[:1]
    assert message.startswith("has made no progress for ")


def test_a_rank_that_prints_what_nobody_reads_does_not_hang(net, monkeypatch):
    monkeypatch.setattr(watchdog.streams, "is_stuck", lambda thread: thread == threading.main_thread().native_id)
    assert watched(net, 1.5) == []


def test_a_timeout_of_0_is_for_ever(net):
    assert watched(net, 1.5, timeout_s=0) == []


def test_a_rank_of_this_host_without_a_sign_of_life_is_named(net):
    net.waits = True
    silent = net.others.pop()
    silent.show("client 4, round 2, 17 steps so far")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        os.kill(process.pid, signal.SIGSTOP)
        net.peers = {2: process.pid}
        ((message, code),) = watched(net, 20)[:1]
        process.kill()
    assert code == EXIT_CRASH
    assert message.startswith(f"rank 2 (pid {process.pid}) of this host has shown no sign of life for ")
    assert message.endswith("client 4, round 2, 17 steps so far; it is stopped (SIGSTOP, or a debugger)")


class Policy:
    """A stop policy, which is its checkpoint policy too."""

    over: str | None = None
    writes_for_s, longest_s = 0.0, 0.1

    def __init__(self):
        self.checkpoints, self.noted = self, ""

    def overdue(self, ending_s):
        return self.over

    def note_stop(self, reason):
        self.noted = reason


ROUND = Pending(3, 0.1)


@pytest.mark.parametrize(("rank", "far", "limit_s"), [(0, 9, 4 * 0.4), (1, 0, 2 * 4 * 0.4)])
def test_the_server_and_a_trainer_of_another_host_wait_for_an_answer(net, rank, far, limit_s):
    net.rank, net.node = rank, [rank]
    net.waits, net.waits_for, net.pending = True, (far, time.monotonic()), ROUND
    assert watched(net, limit_s - 0.3) == [], "a limit for each of three clients, and one more"
    ((message, code),) = watched(net, 20)[:1]
    assert code == EXIT_CRASH
    assert message.startswith(f"rank {far} of another host has not answered for ")


@pytest.mark.parametrize(
    ("rank", "far", "pending"),
    [
        (0, 2, ROUND),  # of this host: its own status tells
        (1, 9, ROUND),  # no matter of a trainer's: it waits, as this one does, or the server sees to it
        (0, 9, Pending(4, 0.0)),  # of a client nothing is known
        (0, 9, None),  # before the first round
    ],
)
def test_who_is_not_waited_for_yet(net, rank, far, pending):
    net.rank, net.waits, net.waits_for, net.pending = rank, True, (far, time.monotonic() - 9), pending
    assert watched(net, 1.0) == []


def test_in_the_set_up_there_is_more_time(net):
    assert watched(net, 1.5, set_up_s=600.0) == []
    ((message, _),) = watched(net, 20, set_up_s=0.5)[:1]
    assert message.startswith("has made no progress for ")


def test_a_disk_that_takes_no_checkpoint_is_no_reason_to_go_on_without(net):
    policy = Policy()
    net.waits, policy.writes_for_s = True, 9.0
    ((message, code),) = watched(net, 20, policy=policy)[:1]
    assert (message, code) == ("a checkpoint has been under way to the disk for 9 s (--stall-timeout)", EXIT_CRASH)


def test_a_round_that_outlives_the_jobs_time_ends_it_with_75(net):
    policy = Policy()
    net.waits = True
    assert watched(net, 0.5, policy=policy) == []
    policy.over = "not one round fits"
    assert watched(net, 20, policy=policy)[0] == ("not one round fits", EXIT_STOPPED)
    assert policy.noted == "not one round fits"
