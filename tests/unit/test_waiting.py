"""A rank that waits wakes soon after a short wait and seldom during a long one, and notices that another is gone."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from fedmpi.errors import PeerLostError
from fedmpi.mpi import waiting
from fedmpi.mpi.waiting import Waiting


class Clock:
    """Time that passes only in polls (2 us), yields (2 us) and sleeps."""

    def __init__(self, monkeypatch):
        self.now, self.polls, self.sleeps = 100.0, 0, []
        monkeypatch.setattr(waiting.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(waiting.time, "sleep", self.sleep)
        monkeypatch.setattr(waiting.os, "sched_yield", lambda: self.pass_by(2e-6))

    def pass_by(self, seconds):
        self.now += seconds

    def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.now += seconds

    def request(self, done_after_s):
        """Is done so long from now."""
        clock, done = self, self.now + done_after_s

        def is_done():
            clock.polls += 1
            clock.pass_by(2e-6)
            return clock.now >= done

        return is_done


@pytest.mark.parametrize("ranks_per_core", [0.5, 1.0, 1.5, 5.5, 50.0])
@pytest.mark.parametrize("wait_s", [0.0, 1e-4, 1e-3, 1e-2, 1.0])
def test_short_waits_end_soon_and_long_ones_cost_little(monkeypatch, wait_s, ranks_per_core):
    clock, patience = Clock(monkeypatch), Waiting({})
    patience.ranks_per_core = ranks_per_core
    started = clock.now
    assert patience.until(clock.request(wait_s))
    late = clock.now - started - wait_s
    longest = 1e-4 if ranks_per_core <= 1 else min(1e-3, 3e-4 * ranks_per_core)
    assert late <= min(longest, 0.1 * wait_s + 1e-5) + 1e-5
    assert max(clock.sleeps, default=0.0) <= longest
    if wait_s >= 1e-2:
        assert clock.polls < 200 + wait_s / longest, "mostly asleep"


def test_patience_ends(monkeypatch):
    clock = Clock(monkeypatch)
    assert not Waiting({}).until(clock.request(10.0), patience_s=2.0)
    assert 2.0 <= clock.now - 100.0 < 2.1


def test_a_rank_that_is_gone_is_named():
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()

    begun = time.monotonic()
    with pytest.raises(PeerLostError, match=rf"rank 3 \(pid {gone.pid}\) is gone without a word"):
        Waiting({1: 1, 3: gone.pid}).until(lambda: False)
    assert time.monotonic() - begun < 5
