"""Reasons to stop a job before its last round: a signal, and the end of its time."""

from __future__ import annotations

import contextlib
import math
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from fedmpi.mpi.processes import PROC
from fedmpi.mpi.slurm import in_slurm_job

_SAME_KEY_S = 0.2  # Ctrl-C reaches a rank twice, from the terminal and from the launcher, in one instant
_SLURM_ANSWERS_S = 10.0


class StopSignals:
    """SIGTERM, SIGUSR1 and SIGHUP set a flag and nothing else; so does SIGINT from `catch_interrupt` on, once.

    Attributes:
        received: the signal that asked this process to stop; 0: none.
    """

    def __init__(self) -> None:
        """Begin without catching a signal."""
        self._wishes = [signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: a terminal that closes is no wish
            self._wishes.append(signal.SIGHUP)
        self.received = 0
        self._before: dict[int, Any] = {}
        self._say: Callable[[str], None] | None = None
        self._interrupted = 0.0

    def catch(self) -> None:
        """From now on SIGTERM, SIGUSR1 and, unless it was ignored, SIGHUP are noted. In the main thread only."""
        for number in self._wishes:
            self._set(number, self._note)

    def catch_interrupt(self, say: Callable[[str], None] | None = None) -> None:
        """From now on SIGINT is noted too, and told by `say`; a second one is a KeyboardInterrupt."""
        self._say = say
        self._set(signal.SIGINT, self._interrupt)

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _set(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        self._before.setdefault(number, signal.getsignal(number))
        signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._interrupted:
            self._interrupted = now
            self._note(number, None)
            if self._say is not None:
                self._say("interrupted: stopping at the end of this round; press Ctrl-C again to stop at once")
        elif now - self._interrupted > _SAME_KEY_S:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Deadline:
    """The end of this job's time.

    Attributes:
        at: by `time.monotonic`, which no change of the clock moves.
        what: whose limit it is, for messages.
        remedy: what to do where it leaves no time for a round.
    """

    at: float
    what: str
    remedy: str = "give it more time"

    def left_s(self) -> float:
        """Return the seconds until then."""
        return self.at - time.monotonic()

    def less(self, seconds: float) -> Deadline:
        """Return a deadline that is so much earlier."""
        return replace(self, at=self.at - seconds)


def slurm_deadline(
    environ: Mapping[str, str], proc: Path = PROC, patience_s: float = _SLURM_ANSWERS_S
) -> Deadline | None:
    """Return the end of the Slurm job that this process runs in, if any. May start a child process: call it before MPI.

    Variables that another job left behind name no job of this process, and nobody is asked.
    """
    job = environ.get("SLURM_JOB_ID")
    if not job or not in_slurm_job(job, environ, proc):
        return None
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    if task and job == array:  # one task of an array has the array's own number: alone it stands for all tasks
        job = f"{array}_{task}"
    left_s = slurm_seconds_left(job, environ, patience_s)
    if left_s is None:
        return None
    return Deadline(time.monotonic() + left_s, f"the time limit of Slurm job {job}", "give the job more time (--time)")


def job_deadline(started: float, max_seconds: float | None, slurm: Deadline | None) -> Deadline | None:
    """Return the earlier of `slurm` and --max-seconds after `started` (`time.monotonic`), if there is one."""
    if max_seconds is None:
        return slurm
    own = Deadline(started + max_seconds, f"--max-seconds {max_seconds:g}", "raise --max-seconds")
    return min(own, slurm or own, key=lambda deadline: deadline.at)


def slurm_seconds_left(job: str, environ: Mapping[str, str], patience_s: float = _SLURM_ANSWERS_S) -> float | None:
    """Return the seconds that Slurm gives `job`; else by the end time in the environment; None: no limit is known."""
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--states=RUNNING", f"--jobs={job}", "--format=%L"],
            capture_output=True, text=True, timeout=patience_s, env=dict(environ), check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        done = None
    answer = done.stdout.strip() if done is not None and done.returncode == 0 else "?"
    left_s = parse_slurm_time(answer)
    if left_s is not None or answer in ("", "UNLIMITED", "NOT_SET"):  # "": a variable left over in this shell
        return left_s
    with contextlib.suppress(KeyError, ValueError):
        left_s = float(environ["SLURM_JOB_END_TIME"]) - time.time()
        return left_s if 0 < left_s < math.inf else None  # a job that still runs is not over: another's variable
    return None


def parse_slurm_time(text: str) -> float | None:
    """Return the seconds of Slurm's [days-][[hours:]minutes:]seconds, as in "1-02:03:04" or "0:07"; else None."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def name_of(signal_number: int) -> str:
    """Return such as "SIGTERM"."""
    return signal.Signals(signal_number).name
