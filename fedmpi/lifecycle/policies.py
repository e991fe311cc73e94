"""Between two rounds, on the server: keep a checkpoint, and decide whether there is to be another round."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fedmpi.lifecycle.signals import Deadline, StopSignals, name_of

EVERY_S = 60.0
"""Without `--checkpoint-every`: how often a checkpoint is written."""


class Keeper(Protocol):
    """Keeps the state of a run. Writing goes on beside the rounds."""

    @property
    def writes_for_s(self) -> float:
        """Seconds for which the state before has been under way to the disk; 0: it is there."""

    @property
    def longest_s(self) -> float:
        """The longest that writing has taken."""

    @property
    def how_to_go_on(self) -> str:
        """What to type for a job that goes on from what is kept."""

    def write(self, round_idx: int, state: Mapping[str, Any]) -> None:
        """Begin to keep `state`, as of now, after `round_idx` rounds."""

    def finish(self) -> None:
        """Return once what was begun is kept."""

    def note_stop(self, reason: str) -> None:
        """Leave word that the job ends with 75 in mid-round: some launchers report the killed ranks instead."""


class Boundary:
    """Knows when to keep a checkpoint and when to stop.

    Attributes:
        deadline: the end of the job's time, if there is one.
        longest_s: the longest round of this process, or of the one that wrote the checkpoint, before it has one.
        longest_client_s: the longest that a client took or may take, in this process or before.
    """

    def __init__(
        self,
        keeper: Keeper | None = None,
        every: int | None = None,
        signals: StopSignals | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        """Without a keeper nothing is kept.

        Args:
            keeper: of this run.
            every: keep after every so many rounds; None: every `EVERY_S`.
            signals: of this process.
            deadline: the end of the job's time.
        """
        self._keeper = keeper
        self._every = every
        self._signals = signals
        self.deadline = deadline
        self.longest_s = 0.0
        self.longest_client_s = 0.0
        self._stored_checkpoint_s = 0.0
        self._round_began: float | None = None
        self._rounds = 0
        self._too_short = False
        self._wanted = ""
        self._kept_at = time.monotonic()
        self._kept_round: int | None = None

    def on_stop_wanted(self, signal_number: int, rank: int) -> None:
        """`rank` was sent a signal."""
        self._wanted = self._wanted or f"{name_of(signal_number)} on rank {rank}"

    def begin(self, round_idx: int, state: Callable[[], Mapping[str, Any]], resumed: bool) -> None:
        """Before the first round: what was resumed is kept already; else see now whether the state can be kept."""
        if resumed:
            self._kept_round = round_idx
        self.keep(round_idx, state, wait=True)

    def after_round(self, round_idx: int, seconds: float, state: Callable[[], Mapping[str, Any]]) -> None:
        """`round_idx` rounds are done, the last took `seconds`: keep the state if it is time to."""
        self.longest_s = max(self.longest_s, seconds) if self._rounds else seconds
        self._rounds += 1
        self._round_began = None
        if self._keeper is None:
            return
        if self._every is not None:
            due = round_idx % self._every == 0
        else:
            due = time.monotonic() - self._kept_at >= EVERY_S and not self._keeper.writes_for_s
        if due:
            self.keep(round_idx, state)

    def keep(self, round_idx: int, state: Callable[[], Mapping[str, Any]], wait: bool = False) -> None:
        """Keep the state after `round_idx` rounds, unless it is kept; with `wait`, return once it is."""
        if self._keeper is None:
            return
        if self._kept_round != round_idx:
            self._keeper.write(round_idx, state())
            self._kept_at, self._kept_round = time.monotonic(), round_idx
        if wait:
            self._keeper.finish()

    @property
    def keeps(self) -> bool:
        """True if checkpoints are written."""
        return self._keeper is not None

    @property
    def how_to_go_on(self) -> str:
        """For the user, when a job is stopped."""
        if self._too_short and self.deadline is not None:
            return f"{self.deadline.remedy}: the same command would stop here again"
        return self._keeper.how_to_go_on if self._keeper else "nothing was kept"

    def stop_because(self) -> str | None:
        """Why there is to be no other round now; None: go on."""
        if self._signals is not None and self._signals.received:
            return name_of(self._signals.received)
        if self._wanted:
            return self._wanted
        left_s = self.deadline.left_s() if self.deadline else math.inf
        if self.deadline is None or left_s > self.needed_s():
            self._round_began = time.monotonic()
            return None
        self._too_short = not self._rounds
        first = "" if self._rounds else "not one round fits: "
        about = f"a round takes about {self.longest_s:.1f} s, " if self.longest_s else ""
        return f"{first}{about}{max(left_s, 0.0):.1f} s are left of {self.deadline.what}"

    def needed_s(self) -> float:
        """What a round and a checkpoint may take: the longest that each has taken."""
        writes = 2 if self._keeper and self._keeper.writes_for_s else 1
        return self.longest_s + writes * self.checkpoint_s

    @property
    def checkpoint_s(self) -> float:
        """The longest that writing a checkpoint has taken, in this process or before."""
        return max(self._stored_checkpoint_s, self._keeper.longest_s if self._keeper else 0.0)

    def state_dict(self) -> dict[str, float]:
        """What was measured, for a checkpoint."""
        return {"round_s": self.longest_s, "client_s": self.longest_client_s, "checkpoint_s": self.checkpoint_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin with what was measured before."""
        self.longest_s, self.longest_client_s = float(state["round_s"]), float(state["client_s"])
        self._stored_checkpoint_s = float(state["checkpoint_s"])

    def writes_for_s(self) -> tuple[float, float]:
        """Seconds for which a checkpoint has been under way (0: none is), and the longest that one has taken."""
        return (self._keeper.writes_for_s if self._keeper else 0.0), self.checkpoint_s

    def overdue(self, ending_s: float) -> str | None:
        """From another thread: why to give up the round under way, `ending_s` before the end; None: go on with it.

        The reason is noted beside the checkpoints.
        """
        began = self._round_began
        if self.deadline is None or began is None or self.deadline.left_s() > ending_s:
            return None
        for_s = time.monotonic() - began
        if self._rounds and for_s <= self.needed_s():
            return None  # it will end in time
        self._too_short = not self._rounds
        what = "a round takes longer than any before" if self._rounds else "not one round fits: a round takes longer"
        reason = f"{what}, more than {for_s:.1f} s, and {self.deadline.what} is over: {self.how_to_go_on}"
        if self._keeper is not None:
            note = threading.Thread(target=self._keeper.note_stop, args=(reason,), daemon=True)
            note.start()
            note.join(ending_s / 4)  # the disk may be what hangs
        return reason

    def note_stop(self, reason: str) -> None:
        """The job stops between two rounds, and all is kept."""
        if self._keeper is not None:
            self._keeper.note_stop(reason)
