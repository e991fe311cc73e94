"""The folder of one run: who may write to it, what is in it, and where the run goes on.

runs/NAME/  config.yaml  history.jsonl  checkpoint/  model.pt  timeline.json (with --timeline)

`model.pt` is there once the run is finished; `stopped`, with the reason, if its last job stopped early.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fedmpi.config import SPLIT_OPTIONS, RunConfig
from fedmpi.core.record import RoundRecord
from fedmpi.core.server_loop import ServerHalf
from fedmpi.core.vector import model_state
from fedmpi.errors import CheckpointError, ConfigError, FedmpiError, FilesystemError, shown
from fedmpi.lifecycle.checkpoints import Checkpoints
from fedmpi.lifecycle.files import atomic_write, free_path, os_errors, refuse_odd, remove_temps
from fedmpi.lifecycle.lock import FileLock
from fedmpi.options import to_yaml
from fedmpi.report.history import History, check_history
from fedmpi.report.same_run import changed_sources, changes, check_numbers, description, refuse_other_run
from fedmpi.report.trace import join_traces

logger = logging.getLogger(__name__)

CONFIG, HISTORY, MODEL, TIMELINE, LOCK = "config.yaml", "history.jsonl", "model.pt", "timeline.json", ".lock"
CHECKPOINTS, STOPPED = "checkpoint", "stopped"


class RunFolder:
    """This job's folder, locked against other jobs until `close`. On the server rank only.

    Before each write the lock is asked for: a job that lost the folder to another one ends, and writes nothing more.

    Attributes:
        path: the folder.
        checkpoints: those in it.
        stored: what the newest checkpoint holds of this run; None: the run starts at round 0.
    """

    def __init__(
        self,
        config: RunConfig,
        data: Mapping[str, object],
        identity: Mapping[str, Mapping[str, object]] | None = None,
        version: str = "",
    ) -> None:
        """Make or take the folder, and see where its run stands.

        Args:
            config: the options of the run.
            data: provenance that decides the model beside the options: what data, split how.
            identity: more that makes this run this one, by kind: the algorithm's name, the parts of the model.
            version: fedmpi's.

        Raises:
            FilesystemError: it cannot be written, another job is using it, or a link lies in it.
            ConfigError: it holds a run with other settings or data, or `--resume must` finds nothing to go on from.
            CheckpointError: its checkpoints are damaged.
        """
        self.path = _new_folder(config) if config.run_dir is None else _named_folder(Path(config.run_dir))
        self._lock = FileLock(self.path / LOCK, timeout_s=0, what=f"--run-dir {self.path}")
        self._lock.__enter__()
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS, self._lock.require)
        self._what: dict[str, Any] = description(config, data, identity or {})
        self._version = version
        try:
            for name in (CONFIG, HISTORY, MODEL, TIMELINE, STOPPED):
                refuse_odd(self.path / name)
            refuse_odd(self.path / CHECKPOINTS, folder=True)
            self.stored = self._find(config)
        except FedmpiError:
            self.close()
            raise

    def _find(self, config: RunConfig) -> dict[str, Any] | None:
        if config.resume == "never":
            return None
        stored = self.checkpoints.load()
        if stored is None and config.resume == "must":
            raise ConfigError(f"--resume must: {self.path} holds no checkpoint to go on from")
        if stored is None and self.finished:
            raise CheckpointError(
                f"{self.path} holds {MODEL} but no checkpoint to go on from: name another --run-dir, or --resume never"
                " to start over"
            )
        if stored is not None:
            with self.fits():
                same_version = not self._version or stored["made_with"].get("fedmpi") == self._version
                refuse_other_run(self.path, stored["run"], self._what, same_version)
                check_numbers(stored, self.checkpoints.loaded_round)
                done, num_bytes = stored["server"]["half"]["round_idx"], stored["history_bytes"]
                check_history(self.path / HISTORY, num_bytes, done, stored.get("history_sha256"))
        return stored

    @contextlib.contextmanager
    def fits(self) -> Iterator[None]:
        """Refuse a checkpoint that does not hold what the code inside takes from it.

        Raises:
            CheckpointError: a part is missing, or of another kind.
        """
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"{self.path}: its checkpoint is not one of this program ({type(error).__name__}: {shown(str(error))});"
                " --resume never starts over"
            ) from error

    @property
    def elapsed_s(self) -> float:
        """Seconds that the run had taken when its checkpoint was written, in all jobs."""
        return float(self.stored["server"].get("elapsed_s", 0.0)) if self.stored else 0.0

    @property
    def finished(self) -> bool:
        """True if the run came to its end."""
        return (self.path / MODEL).exists()

    def begin(self, config: RunConfig, provenance: Mapping[str, object]) -> None:
        """Write config.yaml, and go on with the history, or begin one.

        config.yaml starts another run: it is without --run-dir, and without what a --partition-file leaves unused.
        What a run that is started over held is put aside.

        Raises:
            FilesystemError: the folder cannot be written.
        """
        num_bytes, self._changes = 0, []
        if self.stored is None:
            self._put_aside()
        else:
            num_bytes, done = self.stored["history_bytes"], self.stored["server"]["half"]["round_idx"]
            with self.fits():
                self._changes = [shown(text, 500) for text in list(self.stored.get("changes", []))[-100:]]
                self._warn(done, self.stored["made_with"], provenance)
            logger.info("going on after round %d of the run in %s", done, self.path)
            if self.finished:
                self._move(self.path / MODEL, self.path / f"model-round-{done}.pt")
        self._made_with = dict(provenance)
        record = {**provenance, **({"changes": self._changes} if self._changes else {})}
        unused = SPLIT_OPTIONS if config.partition_file else ()
        self._write(CONFIG, to_yaml(dataclasses.replace(config, run_dir=None), record, unused).encode())
        self._history = History(self.path / HISTORY, num_bytes, self._lock.require)
        self.checkpoints.begin()
        with contextlib.suppress(FileNotFoundError):
            (self.path / STOPPED).unlink()

    def _warn(self, done: int, before: Mapping[str, Any], now: Mapping[str, object]) -> None:
        """One line if the rest of a run is computed by other means than its beginning; one if sources were edited."""
        other, edited = changes(before, now), changed_sources(before, now)
        if other:
            logger.warning("this run began with %s: its last bits may differ from those of a run of one piece", other)
        if edited:
            logger.warning("this run began with other source files: %s", edited)
        self._changes += [f"after round {done}: {text}" for text in (other, edited) if text]

    def _put_aside(self) -> None:
        """Into a folder of this second, of its own; a run that had kept nothing yet is no loss."""
        history = self.path / HISTORY
        kept = self.finished or self.checkpoints.names() or (history.exists() and history.stat().st_size)
        if not kept:
            return
        remove_temps(self.checkpoints.folder)
        aside = free_path(self.path / f"earlier-{time.strftime('%Y%m%d-%H%M%S')}")
        models = sorted(path.name for path in self.path.glob("model-round-*.pt"))
        for name in (HISTORY, CHECKPOINTS, MODEL, TIMELINE, CONFIG, *models):
            if os.path.lexists(self.path / name):
                self._move(self.path / name, aside / name)
        logger.warning("%s: starting over; what was there is now in %s", self.path, aside.name)

    def _move(self, path: Path, new: Path) -> None:
        """Rename, to a name that nothing has."""
        self._lock.require()
        with os_errors(FilesystemError, f"{path}: cannot be renamed", "{} ({})"):
            new.parent.mkdir(exist_ok=True)
            path.rename(free_path(new))

    def _write(self, name: str, content: bytes) -> None:
        atomic_write(self.path / name, content, self._lock.require)

    def on_round(self, record: RoundRecord) -> None:
        """Append a line to history.jsonl."""
        self._history.on_round(record)

    @property
    def how_to_go_on(self) -> str:
        """The advice for a job that goes on from here."""
        return f"to go on, run the same command with --run-dir {self.path}"

    def write(self, round_idx: int, state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; it is complete only once the history up to it is on disk."""
        whole = {
            "run": self._what,
            "made_with": self._made_with,
            "changes": self._changes,
            "history_bytes": self._history.num_bytes,
            "history_sha256": self._history.sha256,
            "server": state,
        }
        self.checkpoints.write(round_idx, whole, self._history.sync)

    def note_stop(self, reason: str) -> None:
        """Write the file that slurm/fedavg.sbatch looks for."""
        with contextlib.suppress(FilesystemError):  # the job ends in any case
            self._write(STOPPED, f"{reason}\n".encode())

    def on_end(self, handler: ServerHalf) -> None:
        """Write model.pt, a plain state dict on CPU."""
        buffer = io.BytesIO()
        torch.save(model_state(handler.model), buffer)
        self._write(MODEL, buffer.getvalue())

    def write_timeline(self, trace: str) -> None:
        """Write timeline.json: what the run's jobs before this one left in it, then `trace`."""
        if self.stored is not None:
            try:
                trace = join_traces(self.path / TIMELINE, trace, self.elapsed_s)
            except ValueError:
                logger.warning("%s is no timeline of this run: put aside", self.path / TIMELINE)
                self._move(self.path / TIMELINE, self.path / f"{TIMELINE}.other")
        self._write(TIMELINE, trace.encode())

    def close(self) -> None:
        """Let other jobs have the folder."""
        self._lock.__exit__(None, None, None)


def _new_folder(config: RunConfig) -> Path:
    """Make a new folder under runs/, also when other jobs start in the same second."""
    model = re.sub(r"[^\w.-]+", "_", config.model)
    name = f"{config.dataset}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(1, 10_000):
        path = Path("runs") / (name if attempt == 1 else f"{name}-{attempt}")
        with os_errors(FilesystemError, f"{path}: cannot be made", "{} ({}); --run-dir names another"):
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
        return path
    raise FilesystemError(f"runs/{name}: ten thousand folders of this second exist; --run-dir names another")


def _named_folder(path: Path) -> Path:
    with os_errors(FilesystemError, f"--run-dir {path}: cannot be made", "{} ({})"):
        path.mkdir(parents=True, exist_ok=True)
    return path
