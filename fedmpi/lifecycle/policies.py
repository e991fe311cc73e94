"""Between two rounds, on the server: one policy says when to write a checkpoint, the other when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fedmpi.lifecycle.checkpoints import Checkpoints
from fedmpi.lifecycle.signals import Deadline, StopSignals, name_of

EVERY_S = 60.0
"""Without `--checkpoint-every`: how often a checkpoint is written."""

Clock = Callable[[], float]


class Store(Protocol):
    """The run folder.

    Attributes:
        checkpoints: its checkpoints.
        how_to_go_on: the advice for a job that goes on from the last one.
    """

    checkpoints: Checkpoints

    @property
    def how_to_go_on(self) -> str: ...

    def write(self, round_idx: int, state: Mapping[str, Any]) -> None:
        """Begin to write `state`, as of now, after `round_idx` rounds."""

    def note_stop(self, reason: str) -> None:
        """Leave word that the job ends with 75: in mid-round some launchers report the killed ranks instead."""


class CheckpointPolicy:
    """Writes a checkpoint after every Nth round, or every so many seconds.

    Attributes:
        longest_before_s: the longest that writing took in the jobs of the run before this one.
    """

    def __init__(self, store: Store | None = None, every: int | None = None, clock: Clock = time.monotonic) -> None:
        """Without a store nothing is written; `every` None: about every `EVERY_S` seconds."""
        self._store = store
        self._every = every
        self._clock = clock
        self.longest_before_s = 0.0
        self._written_at = clock()
        self._written_round: int | None = None

    @property
    def is_on(self) -> bool:
        """True if checkpoints are written."""
        return self._store is not None

    @property
    def longest_s(self) -> float:
        """The longest that writing has taken, in this process or before."""
        return max(self.longest_before_s, self._store.checkpoints.longest_s if self._store else 0.0)

    @property
    def writes_for_s(self) -> float:
        """Seconds for which a checkpoint has been under way; 0: none is."""
        return self._store.checkpoints.writes_for_s if self._store else 0.0

    @property
    def how_to_go_on(self) -> str:
        """The advice for a user whose job is stopped."""
        return self._store.how_to_go_on if self._store else "nothing was kept"

    def begin(self, round_idx: int, state: Callable[[], Mapping[str, Any]], resumed: bool) -> None:
        """Before the first round: the resumed state is on disk already; else see now whether it can be written."""
        if resumed:
            self._written_round = round_idx
        self.write(round_idx, state, wait=True)

    def after_round(self, round_idx: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Write the state after `round_idx` rounds if it is time to."""
        due = self._clock() - self._written_at >= EVERY_S and not self.writes_for_s
        if due if self._every is None else round_idx % self._every == 0:
            self.write(round_idx, state)

    def write(self, round_idx: int, state: Callable[[], Mapping[str, Any]], wait: bool = False) -> None:
        """Write the state after `round_idx` rounds, unless that is done; with `wait`, return once it is on disk."""
        if self._store is None:
            return
        if self._written_round != round_idx:
            self._store.write(round_idx, state())
            self._written_at, self._written_round = self._clock(), round_idx
        if wait:
            self._store.checkpoints.finish()

    def note_stop(self, reason: str) -> None:
        """Leave word beside the checkpoints of why the job stops."""
        if self._store is not None:
            self._store.note_stop(reason)


class StopPolicy:
    """Stops a job before its last round: after a signal, or when the next round would not end in time.

    Attributes:
        checkpoints: the other policy.
        deadline: the end of the job's time, if there is one.
        longest_s: the longest round of this process, or of the one that wrote the checkpoint, before it has one.
        longest_client_s: the longest that a client took or may take, in this process or before.
    """

    def __init__(
        self,
        checkpoints: CheckpointPolicy | None = None,
        signals: StopSignals | None = None,
        deadline: Deadline | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """With the signals of this process and the end of the job's time; None: there is none."""
        self.checkpoints = checkpoints or CheckpointPolicy()
        self._signals = signals
        self.deadline = deadline
        self._clock = clock
        self.longest_s = 0.0
        self.longest_client_s = 0.0
        self._round_began: float | None = None
        self._rounds = 0
        self._first_is_too_long = False
        self._signal = ""

    def on_signal(self, signal_number: int, rank: int) -> None:
        """Note that `rank` was sent a signal."""
        self._signal = self._signal or f"{name_of(signal_number)} on rank {rank}"

    def begin_round(self) -> str | None:
        """Return why there is to be no other round; None: it has begun."""
        if self._signals is not None and self._signals.received:
            return name_of(self._signals.received)
        if self._signal:
            return self._signal
        left_s = self._left_s()
        if self.deadline is None or left_s > self.needed_s:
            self._round_began = self._clock()
            return None
        self._first_is_too_long = not self._rounds
        first = "" if self._rounds else "not one round fits: "
        about = f"a round takes about {self.longest_s:.1f} s, " if self.longest_s else ""
        return f"{first}{about}{max(left_s, 0.0):.1f} s are left of {self.deadline.what}"

    def after_round(self, seconds: float) -> None:
        """Note that a round is done, and took so long."""
        self.longest_s = max(self.longest_s, seconds) if self._rounds else seconds
        self._rounds += 1
        self._round_began = None

    @property
    def needed_s(self) -> float:
        """The longest that a round and a checkpoint have taken, and the checkpoint under way."""
        writes = 2 if self.checkpoints.writes_for_s else 1
        return self.longest_s + writes * self.checkpoints.longest_s

    @property
    def how_to_go_on(self) -> str:
        """The advice for a user whose job is stopped."""
        if self._first_is_too_long and self.deadline is not None:
            return f"{self.deadline.remedy}: the same command would stop here again"
        return self.checkpoints.how_to_go_on

    def overdue(self, ending_s: float) -> str | None:
        """Return why to give up the round under way, `ending_s` before the end; None: go on. From any thread."""
        began = self._round_began
        if self.deadline is None or began is None or self._left_s() > ending_s:
            return None
        for_s = self._clock() - began
        if self._rounds and for_s <= self.needed_s:
            return None  # it will end in time
        self._first_is_too_long = not self._rounds
        what = "a round takes longer than any before" if self._rounds else "not one round fits: a round takes longer"
        return f"{what}, more than {for_s:.1f} s, and {self.deadline.what} is over: {self.how_to_go_on}"

    def _left_s(self) -> float:
        return self.deadline.at - self._clock() if self.deadline else math.inf

    def state_dict(self) -> dict[str, float]:
        """Return the measured times, for a checkpoint."""
        times = {"round_s": self.longest_s, "client_s": self.longest_client_s}
        return {**times, "checkpoint_s": self.checkpoints.longest_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin with the times that were measured before."""
        self.longest_s, self.longest_client_s = float(state["round_s"]), float(state["client_s"])
        self.checkpoints.longest_before_s = float(state["checkpoint_s"])
