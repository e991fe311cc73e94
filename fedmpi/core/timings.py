"""Parts of the server's time in one round."""

from __future__ import annotations

import time
from typing import Any

from fedmpi.mpi.comm import Comm


class RoundTimings:
    """Laps of the server's round, and the trainers' busy seconds.

    The call order is (start, sent, busy ..., collected) per exchange, stepped, start, sent for an evaluation, timings.
    """

    def __init__(self, comm: Comm) -> None:
        """The first round of the run begins now."""
        self._comm = comm
        self._laps: dict[str, float] = {}
        self._busy: dict[int, float] = {}
        self._elapsed_s = 0.0
        self.restart()

    def resume(self, elapsed_s: float) -> None:
        """Go on with a run that has taken so long in its jobs before."""
        self._elapsed_s = elapsed_s

    def restart(self) -> None:
        """The first round of this job begins now."""
        self._last = self._begun = time.perf_counter()
        self._run_begun = self._begun - self._elapsed_s
        self._bytes = self._comm.bytes_sent

    @property
    def elapsed_s(self) -> float:
        """Seconds that the run has taken so far, in all its jobs."""
        return time.perf_counter() - self._run_begun

    def start(self) -> None:
        """The next order is being decided."""
        self._last = time.perf_counter()

    def sent(self) -> None:
        """Order and vector are out."""
        self._lap("broadcast_s")

    def busy(self, rank: int, seconds: float) -> None:
        """`rank` has trained for so long."""
        self._busy[rank] = self._busy.get(rank, 0.0) + seconds

    def collected(self) -> None:
        """All updates have come."""
        self._lap("collect_s")

    def stepped(self) -> None:
        """The global model is new."""
        self._lap("step_s")

    def timings(self, evaluated: bool) -> dict[str, Any]:
        """Seconds of the round that ends now, and start the next."""
        if evaluated:
            self._lap("evaluate_s")
        now = time.perf_counter()
        trainers = [self._busy.get(rank, 0.0) for rank in range(min(1, self._comm.size - 1), self._comm.size)]
        longest = max(trainers)
        laps = {**self._laps, "train_s": longest, "round_s": now - self._begun, "elapsed_s": now - self._run_begun}
        laps["collect_s"] = max(0.0, laps.get("collect_s", 0.0) - longest)
        laps["idle_share"] = 1 - sum(trainers) / len(trainers) / longest if longest else 0.0
        laps["wire_bytes"] = self._comm.bytes_sent - self._bytes
        self._bytes, self._begun, self._laps, self._busy = self._comm.bytes_sent, now, {}, {}
        rounded: dict[str, Any] = {name: round(value, 6) for name, value in laps.items()}
        idle = [longest - value for value in trainers]
        lists = {"busy_s": trainers, "idle_s": idle}
        return {**rounded, **{name: [round(value, 6) for value in each] for name, each in lists.items()}}

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now
