"""The folder of one run: who may write to it, and what is in it.

runs/NAME/  config.yaml  history.jsonl  model.pt  timeline.json (with --timeline)
"""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

from fedmpi.config import RunConfig
from fedmpi.core.errors import ConfigError, FilesystemError
from fedmpi.core.files import atomic_write
from fedmpi.core.handler import SyncParameterServerHandler
from fedmpi.core.lock import FileLock
from fedmpi.core.messages import RoundRecord
from fedmpi.options import PROVENANCE, parse, result_options, to_yaml
from fedmpi.report.history import History

logger = logging.getLogger(__name__)

CONFIG, HISTORY, MODEL, TIMELINE, LOCK = "config.yaml", "history.jsonl", "model.pt", "timeline.json", ".lock"


class RunFolder:
    """This job's folder, locked against other jobs until `close`. On the server rank only."""

    def __init__(self, config: RunConfig, data: Mapping[str, object]) -> None:
        """Make or take the folder.

        Args:
            config: the options of the run.
            data: provenance that decides the model beside the options: what data, split how.

        Raises:
            FilesystemError: it cannot be written, or another job is using it.
            ConfigError: it holds a finished run with other settings or data.
        """
        self.path = _fresh(config) if config.run_dir is None else _make(Path(config.run_dir))
        self._lock = FileLock(self.path / LOCK, timeout_s=0, what=f"--run-dir {self.path}")
        self._lock.__enter__()
        self.finished = (self.path / MODEL).exists()
        if self.finished:
            try:
                _refuse_other_settings(self.path, config, data)
            except ConfigError:
                self.close()
                raise

    def begin(self, config: RunConfig, provenance: Mapping[str, object]) -> None:
        """Write config.yaml (without --run-dir, so that it starts another run) and an empty history.

        The history of a run that did not finish is put aside.
        """
        history = self.path / HISTORY
        if history.exists() and history.stat().st_size:
            old = history.with_name(f"history-{time.strftime('%Y%m%d-%H%M%S')}.jsonl")
            history.rename(old)
            logger.warning("%s holds a run that did not finish: starting over, its history is now %s", self.path, old)
        atomic_write(self.path / CONFIG, to_yaml(dataclasses.replace(config, run_dir=None), provenance).encode())
        self._history = History(history)

    def on_round(self, record: RoundRecord) -> None:
        """One line in history.jsonl."""
        self._history.on_round(record)

    def on_end(self, handler: SyncParameterServerHandler) -> None:
        """Write model.pt, a plain state dict on CPU."""
        buffer = io.BytesIO()
        torch.save({name: tensor.detach().cpu().clone() for name, tensor in handler.model.state_dict().items()}, buffer)
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


def _refuse_other_settings(path: Path, config: RunConfig, data: Mapping[str, object]) -> None:
    stored = result_options(parse(type(config), ["--config", str(path / CONFIG)], "", ""))
    given = result_options(config)
    for name, value in given.items():
        if stored[name] != value:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"--run-dir {path} holds a finished run with {flag} {stored[name]}, this one has {value}: name another"
            )
    provenance = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8")).get(PROVENANCE, {})
    for name, value in data.items():
        if provenance.get(name) != value:
            raise ConfigError(
                f"--run-dir {path} holds a finished run with {name} {provenance.get(name)}, this one has {value}: name"
                " another"
            )
