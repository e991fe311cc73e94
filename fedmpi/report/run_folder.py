"""The folder of one run: who may write to it, what is in it, and where the run goes on.

runs/NAME/  config.yaml  history.jsonl  checkpoint/  model.pt  timeline.json (with --timeline)

`model.pt` is there once the run is finished; `stopped`, with the reason, if its last job stopped early.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fedmpi.config import RunConfig
from fedmpi.core.checkpoint import Checkpoints
from fedmpi.core.errors import CheckpointError, ConfigError, FedmpiError, FilesystemError
from fedmpi.core.files import atomic_write, remove_temps
from fedmpi.core.handler import SyncParameterServerHandler
from fedmpi.core.lock import FileLock
from fedmpi.core.messages import RoundRecord
from fedmpi.core.vector import model_state
from fedmpi.options import to_yaml
from fedmpi.report.history import History, check_history
from fedmpi.report.same_run import description, refuse_other_run, warn_of_other_bits

logger = logging.getLogger(__name__)

CONFIG, HISTORY, MODEL, TIMELINE, LOCK = "config.yaml", "history.jsonl", "model.pt", "timeline.json", ".lock"
CHECKPOINTS, STOPPED = "checkpoint", "stopped"


class RunFolder:
    """This job's folder, locked against other jobs until `close`. On the server rank only.

    Attributes:
        path: the folder.
        stored: what the newest checkpoint holds of this run; None: the run starts at round 0.
    """

    def __init__(self, config: RunConfig, data: Mapping[str, object]) -> None:
        """Make or take the folder, and see where its run stands.

        Args:
            config: the options of the run.
            data: provenance that decides the model beside the options: what data, split how.

        Raises:
            FilesystemError: it cannot be written, or another job is using it.
            ConfigError: it holds a run with other settings or data, or `--resume must` finds nothing to go on from.
            CheckpointError: its checkpoints are damaged.
        """
        self.path = _fresh(config) if config.run_dir is None else _make(Path(config.run_dir))
        self._lock = FileLock(self.path / LOCK, timeout_s=0, what=f"--run-dir {self.path}")
        self._lock.__enter__()
        self._checkpoints = Checkpoints(self.path / CHECKPOINTS)
        self._what: dict[str, Any] = description(config, data)
        try:
            self.stored = self._find(config)
        except FedmpiError:
            self.close()
            raise

    def _find(self, config: RunConfig) -> dict[str, Any] | None:
        if config.resume == "never":
            return None
        stored = self._checkpoints.load()
        if stored is None and config.resume == "must":
            raise ConfigError(f"--resume must: {self.path} holds no checkpoint to go on from")
        if stored is None and self.finished:
            raise CheckpointError(
                f"{self.path} holds {MODEL} but no checkpoint to go on from: name another --run-dir, or --resume never"
                " to start over"
            )
        if stored is not None:
            with self.fits():
                refuse_other_run(self.path, stored["run"], self._what)
                check_history(self.path / HISTORY, stored["history_bytes"], stored["server"]["handler"]["round_idx"])
        return stored

    @contextlib.contextmanager
    def fits(self) -> Iterator[None]:
        """Around what takes the checkpoint apart: it is whole, but may be of another algorithm or another's making.

        Raises:
            CheckpointError: a part is missing, or of another kind.
        """
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.path}: its checkpoint is not one of this program ({type(error).__name__}: {error});"
                " --resume never starts over"
            ) from error

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / MODEL).exists()

    def begin(self, config: RunConfig, provenance: Mapping[str, object]) -> None:
        """Write config.yaml (without --run-dir, so that it starts another run); go on with the history, or begin one.

        What a run that is started over held is put aside.

        Raises:
            FilesystemError: the folder cannot be written.
        """
        history, num_bytes = self.path / HISTORY, 0
        if self.stored is None:
            self._put_aside()
        else:
            num_bytes, done = self.stored["history_bytes"], self.stored["server"]["handler"]["round_idx"]
            warn_of_other_bits(self.stored["made_with"], provenance)
            logger.info("going on after round %d of the run in %s", done, self.path)
            if self.finished:
                _rename(self.path / MODEL, self.path / f"model-round-{done}.pt")
        self._made_with = dict(provenance)
        atomic_write(self.path / CONFIG, to_yaml(dataclasses.replace(config, run_dir=None), provenance).encode())
        self._history = History(history, num_bytes)
        self._checkpoints.begin()
        (self.path / STOPPED).unlink(missing_ok=True)

    def _put_aside(self) -> None:
        """Into a folder of this second; a run that had kept nothing yet is no loss."""
        history = self.path / HISTORY
        kept = self.finished or self._checkpoints.names() or (history.exists() and history.stat().st_size)
        if not kept:
            return
        remove_temps(self._checkpoints.folder)
        aside = self.path / f"earlier-{time.strftime('%Y%m%d-%H%M%S')}"
        for name in (HISTORY, CHECKPOINTS, MODEL, TIMELINE, CONFIG):
            if (self.path / name).exists():
                _rename(self.path / name, aside / name)
        logger.warning("%s: starting over; what was there is now in %s", self.path, aside.name)

    def on_round(self, record: RoundRecord) -> None:
        """One line in history.jsonl."""
        self._history.on_round(record)

    @property
    def writes_for_s(self) -> float:
        """Seconds for which a checkpoint has been under way to the disk; 0: none is."""
        return self._checkpoints.writes_for_s

    @property
    def longest_s(self) -> float:
        """The longest that writing a checkpoint has taken."""
        return self._checkpoints.longest_s

    @property
    def how_to_go_on(self) -> str:
        """What to type."""
        return f"to go on, run the same command with --run-dir {self.path}"

    def write(self, round_idx: int, state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; it is complete only once the history up to it is on disk."""
        whole = {
            "run": self._what,
            "made_with": self._made_with,
            "history_bytes": self._history.num_bytes,
            "server": state,
        }
        self._checkpoints.write(round_idx, whole, self._history.sync)

    def finish(self) -> None:
        """Return once the checkpoint is on disk."""
        self._checkpoints.finish()

    def note_stop(self, reason: str) -> None:
        """In a file that slurm/fedavg.sbatch looks for."""
        with contextlib.suppress(OSError):  # the job ends in any case
            (self.path / STOPPED).write_text(reason + "\n", encoding="utf-8")

    def on_end(self, handler: SyncParameterServerHandler) -> None:
        """Write model.pt, a plain state dict on CPU."""
        buffer = io.BytesIO()
        torch.save(model_state(handler.model), buffer)
        atomic_write(self.path / MODEL, buffer.getvalue())

    def write_timeline(self, trace: str) -> None:
        """Write timeline.json."""
        atomic_write(self.path / TIMELINE, trace.encode())

    def close(self) -> None:
        """Let other jobs have the folder."""
        self._lock.__exit__(None, None, None)


def _fresh(config: RunConfig) -> Path:
    """A new folder under runs/, also when other jobs start in the same second."""
    model = re.sub(r"[^\w.-]+", "_", config.model)
    name = f"{config.dataset}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(1, 10_000):
        path = Path("runs") / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise FilesystemError(f"{path}: cannot be made ({error.strerror}); --run-dir names another") from error
        return path
    raise FilesystemError(f"runs/{name}: ten thousand folders of this second exist; --run-dir names another")


def _make(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FilesystemError(f"--run-dir {path}: cannot be made ({error.strerror})") from error
    return path


def _rename(path: Path, new: Path) -> None:
    try:
        new.parent.mkdir(exist_ok=True)
        path.rename(new)
    except OSError as error:
        raise FilesystemError(f"{path}: cannot be renamed ({error.strerror})") from error
