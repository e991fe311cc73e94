"""The line a user watches: where the run is, how good it is, how long it will take."""

from __future__ import annotations

import logging
import time
from collections import deque
from pathlib import Path

from fedmpi.core.record import RoundRecord
from fedmpi.core.server_loop import ServerHalf

logger = logging.getLogger(__name__)


class Progress:
    """Logs one line per round, and a summary at the end."""

    def __init__(self, rounds: int, elapsed_s: float = 0.0) -> None:
        """`rounds` in all; the jobs of this run before this one have taken `elapsed_s`."""
        self._rounds = rounds
        self._elapsed_s = elapsed_s
        self._in_all = 0
        self._begun = time.perf_counter()
        self._recent: deque[float] = deque(maxlen=10)
        self._accuracies: list[float] = []
        self._done = 0
        self._wire_bytes = 0.0
        self._idle = 0.0

    def on_round(self, record: RoundRecord) -> None:
        """Log the line of this round."""
        seconds = record.timings["round_s"]
        self._recent.append(seconds)
        self._done += 1
        self._in_all = record.round_idx + 1
        self._wire_bytes += record.timings["wire_bytes"]
        self._idle += record.timings["idle_share"]
        left = (self._rounds - record.round_idx - 1) * sum(self._recent) / len(self._recent)
        parts = [f"round {record.round_idx + 1:>{len(str(self._rounds))}}/{self._rounds}"]
        if record.accuracy is not None:
            self._accuracies.append(record.accuracy)
            parts.append(f"accuracy {100 * record.accuracy:6.2f} %")
            parts.append("loss " + ("  none" if record.loss is None else f"{record.loss:6.4f}"))
        parts.append("train loss " + ("  none" if record.train_loss is None else f"{record.train_loss:6.4f}"))
        parts.append(f"{len(record.cohort) / seconds:.1f} clients/s")
        parts.append(f"{seconds:.2f} s")
        parts.append(f"ETA {_clock(left)}")
        logger.info("%s", "   ".join(parts))

    def on_end(self, handler: ServerHalf) -> None:
        """Do nothing: `summary` is called once all ranks know that the run is over."""

    def summary(self, model_hash: str, run_dir: Path) -> str:
        """Return the outcome of the run in one line."""
        seconds = time.perf_counter() - self._begun
        accuracy = f"{100 * self._accuracies[-1]:.2f} %" if self._accuracies else "not evaluated"
        idle = 100 * self._idle / max(self._done, 1)
        before = f" ({self._in_all} in {self._elapsed_s + seconds:.1f} s in all)" if self._elapsed_s else ""
        return (
            f"done: {self._done} rounds in {seconds:.1f} s{before}, accuracy {accuracy},"
            f" {_size(self._wire_bytes)} through MPI, trainers idle {idle:.0f} %, model {model_hash}, in {run_dir}"
        )


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"
