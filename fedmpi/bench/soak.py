"""python -m fedmpi.bench soak: a long run that is killed and resumed at random, against the same run left alone.

Both end with the same model and history, or this says so and ends with 1. The run left alone is watched for growth of
memory, open files and threads, and for rounds that become slower. It starts its own jobs: no mpirun before it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fedmpi.bench.parser import Parser
from fedmpi.core.vector import vector_hash
from fedmpi.errors import EXIT_CRASH, EXIT_DONE, EXIT_STOPPED, ConfigError
from fedmpi.logs import set_up_logging
from fedmpi.mpi.launcher import announced

logger = logging.getLogger("fedmpi.bench")

_WINDOW = 200  # rounds that are compared at the beginning and at the end
_GROWTH_MB = 15.0  # what Python's and torch's pools take in the meantime
_SLOWER = 1.25  # this much is noise


@dataclasses.dataclass(frozen=True)
class Usage:
    """Memory, open files and threads of a rank."""

    memory_mb: float
    """Resident."""
    files: int
    """Open."""
    threads: int

    def __str__(self) -> str:
        return f"{self.memory_mb:.0f} MB, {self.files} open files, {self.threads} threads"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a run."""

    model: str
    history: str
    seconds: list[float]


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="python -m fedmpi.bench soak", description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=2000, help="of each run (default: 2000)")
    parser.add_argument("--ranks", type=int, default=5, help="of each job (default: 5)")
    parser.add_argument("--kills", type=int, default=12, help="times that the run is interrupted (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of when, which rank, and how (default: 0)")
    options = parser.parse_args(argv)
    if any(one.size > 1 for one in announced()):
        raise ConfigError("bench soak starts its own jobs: call it without mpirun")
    if options.rounds < 2 * _WINDOW:
        raise ConfigError(f"--rounds must be {2 * _WINDOW} or more, got {options.rounds}")
    set_up_logging(0, None)
    with tempfile.TemporaryDirectory(prefix="fedmpi-soak-") as folder:
        wrong = _soak(Path(folder), options)
    for line in wrong:
        logger.error("%s", line)
    return EXIT_CRASH if wrong else EXIT_DONE


def _soak(folder: Path, options: argparse.Namespace) -> list[str]:
    """Return what did not hold, one line per finding."""
    begun = time.monotonic()
    alone = _Run(folder / "alone", options.ranks, options.rounds)
    early, late = alone.watch()
    left_alone = alone.outcome()
    logger.info(
        "left alone:  %d rounds in %.0f s, model %s", options.rounds, time.monotonic() - begun, left_alone.model
    )
    seconds = left_alone.seconds
    first, last = statistics.median(seconds[20 : 20 + _WINDOW]), statistics.median(seconds[-_WINDOW:])
    logger.info("a round:     %.1f ms at the beginning, %.1f ms at the end", 1e3 * first, 1e3 * last)
    for rank, (a, b) in enumerate(zip(early, late, strict=True)):
        logger.info("rank %d:      %s; at the end %s", rank, a, b)
    harmed = _Run(folder / "harmed", options.ranks, options.rounds)
    told = harmed.harm(random.Random(options.seed), options.kills)
    interrupted = harmed.outcome()
    logger.info("interrupted: %s; model %s", ", ".join(told), interrupted.model)
    wrong = []
    if (interrupted.model, interrupted.history) != (left_alone.model, left_alone.history):
        wrong.append(
            f"the interrupted run's model or history differs: {interrupted.model}, left alone {left_alone.model}"
        )
    if last > _SLOWER * first:
        wrong.append(f"rounds became slower: {1e3 * first:.1f} ms, then {1e3 * last:.1f} ms")
    for rank, (a, b) in enumerate(zip(early, late, strict=True)):
        if b.memory_mb > a.memory_mb + _GROWTH_MB or b.files > a.files or b.threads > a.threads:
            wrong.append(f"rank {rank} grew: {a}; at the end {b}")
    return wrong


class _Run:
    """One run folder, and the jobs that bring it to its end."""

    def __init__(self, folder: Path, num_ranks: int, rounds: int) -> None:
        self._folder, self._rounds = folder, rounds
        launcher = Path(sys.executable).with_name("mpiexec")
        self._words = [str(launcher) if launcher.exists() else "mpiexec", "-n", str(num_ranks), sys.executable]
        self._words += ["-m", "fedmpi.fedavg", "--dataset", "synthetic", "--model", "2nn", "--num-clients", "20"]
        self._words += ["--cohort-size", "7", "--rounds", str(rounds), "--run-dir", str(folder), "--quiet"]
        self._words += ["--checkpoint-every", "10"]

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def done(self) -> int:
        """Rounds in the history."""
        try:
            return (self._folder / "history.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def ranks(self) -> list[int]:
        """Process ids, in the order of the ranks."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(self._folder).encode() in words and b"python" in Path(os.fsdecode(words[0])).name.encode():
                found.append(int(entry.name))
        return sorted(found)

    def watch(self) -> tuple[list[Usage], list[Usage]]:
        """Run to the end; what each rank holds after `_WINDOW` rounds and just before the end."""
        used = []
        with self.start() as job:
            for rounds in (_WINDOW, self._rounds - 50):
                while self.done() < rounds and job.poll() is None:
                    time.sleep(0.05)
                used.append(self._usage())
            job.wait()
        if job.returncode != EXIT_DONE:
            raise RuntimeError(f"the run left alone ended with {job.returncode}")
        return used[0], used[1]

    def _usage(self) -> list[Usage]:
        """The least of a few looks: the thread that writes a checkpoint comes and goes."""
        looks = []
        for _ in range(5):
            looks.append([dataclasses.astuple(usage(pid)) for pid in self.ranks()])
            time.sleep(0.02)
        return [Usage(memory_mb, int(files), int(threads)) for memory_mb, files, threads in np.min(looks, axis=0)]

    def harm(self, dice: random.Random, kills: int) -> list[str]:
        """Interrupt at random rounds, resume, and at last let it end; what was done, in words."""
        told = []
        for target in sorted(dice.randrange(self._rounds - 20) for _ in range(kills)):
            before = self.done()
            with self.start() as job:
                while self.done() in (before, *range(target + 1)) and job.poll() is None:
                    time.sleep(0.01)
                time.sleep(dice.uniform(0, 0.1))
                number = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
                ranks = self.ranks()
                if job.poll() is None and ranks:
                    rank = dice.randrange(len(ranks))
                    os.kill(ranks[rank], number)
                    told.append(f"{number.name} of rank {rank} in round {self.done()}")
                job.wait()
                if (job.returncode == EXIT_STOPPED) != (number != signal.SIGKILL) or job.returncode == EXIT_DONE:
                    raise RuntimeError(f"after {told[-1:]} the job ended with {job.returncode}")
        with self.start() as job:
            job.wait()
        if job.returncode != EXIT_DONE:
            raise RuntimeError(f"the interrupted run ended with {job.returncode}")
        return told

    def outcome(self) -> Outcome:
        lines = (self._folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        seconds = [row.pop("timings")["round_s"] for row in rows]
        model = vector_hash(torch.load(self._folder / "model.pt", weights_only=True))
        return Outcome(model, hashlib.sha256(json.dumps(rows).encode()).hexdigest(), seconds)


def usage(pid: int) -> Usage:
    """Return the memory, open files and threads of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Usage(int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"]))
