"""The newest two checkpoints of a run in a folder, each of them whole or not there."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmpi.errors import CheckpointError, FilesystemError
from fedmpi.lifecycle.checkpoint import OtherVersionError, State, read_state, snapshot, write_state
from fedmpi.lifecycle.files import atomic_write, free_path, os_errors, refuse_odd, remove_temps, sync_folder

logger = logging.getLogger(__name__)

GENERATIONS = 2

_NAME = re.compile(r"round-(\d{1,12})\.ckpt")


class Checkpoints:
    """The checkpoints in a folder, written by a thread, one at a time, while rank 0 goes on.

    Attributes:
        longest_s: the longest that writing one has taken.
        loaded_round: the round in the name of the one that `load` returned.
    """

    def __init__(self, folder: Path, may_write: Callable[[], None] = lambda: None) -> None:
        """Over `folder`, which need not exist yet. `may_write` is called right before each change; it may raise."""
        self.folder = folder
        self._may_write = may_write
        self.loaded_round = -1
        self.longest_s = 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._began_s = 0.0
        self._damaged: list[Path] = []

    def names(self) -> list[Path]:
        """Return the files, the newest first: by the round in their name, for clocks jump."""
        found = [path for path in self.folder.glob("round-*.ckpt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_round_of, reverse=True)

    def load(self) -> dict[str, Any] | None:
        """Return the newest state that is whole; None if there was never one. A damaged newer one is said in a line.

        Raises:
            CheckpointError: there are some, and none is whole; or a newer one is of another version.
            FilesystemError: a link or a file lies in the place of the folder.
        """
        refuse_odd(self.folder, folder=True)
        damaged: list[tuple[Path, CheckpointError]] = []
        for path in self.names():
            try:
                state = read_state(path)
            except OtherVersionError as error:
                raise CheckpointError(
                    f"{path} {error}: go on with that one, or --resume never to start over"
                ) from error
            except CheckpointError as error:
                damaged.append((path, error))
                continue
            for bad, reason in damaged:
                logger.warning("checkpoint %s %s: going on from %s", bad, reason, path.name)
            self._damaged, self.loaded_round = [bad for bad, _ in damaged], _round_of(path)
            return state
        if damaged:
            reasons = "; ".join(f"{path.name} {reason}" for path, reason in damaged)
            raise CheckpointError(f"no checkpoint in {self.folder} is whole: {reasons}; --resume never starts over")
        return None

    def begin(self) -> None:
        """Make the folder; remove what a killed writer left, and put aside what `load` found damaged.

        Raises:
            FilesystemError: it cannot be written.
        """
        self._ask()
        with os_errors(FilesystemError, f"{self.folder}: cannot be written", "{} ({})"):
            self.folder.mkdir(exist_ok=True)
            for path in self._damaged:
                path.rename(free_path(path.with_name(path.name + ".damaged")))
        remove_temps(self.folder)

    @property
    def writes_for_s(self) -> float:
        """Seconds for which one has been under way to the disk; 0: none is."""
        thread = self._thread
        return time.monotonic() - self._began_s if thread is not None and thread.is_alive() else 0.0

    def write(self, round_idx: int, state: State, before: Callable[[], None]) -> None:
        """Begin to write `state`, as of now; call `before` first, in the same thread.

        Raises:
            FilesystemError: the one before could not be written.
        """
        self.finish()
        copied = snapshot(state)
        self._began_s = time.monotonic()
        self._thread = threading.Thread(target=self._write, args=(round_idx, copied, before), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Return once what was begun is on disk.

        Raises:
            FilesystemError: it could not be written; the checkpoints before it are untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, round_idx: int, copied: bytes, before: Callable[[], None]) -> None:
        try:
            before()
            path = self.folder / f"round-{round_idx:06}.ckpt"
            atomic_write(path, lambda file: write_state(file, copied), self._ask)
            with os_errors(FilesystemError, f"{self.folder}: cannot be tidied up", "{} ({})"):
                for old in self.names()[GENERATIONS:]:
                    old.unlink(missing_ok=True)
                sync_folder(self.folder)
        except BaseException as error:  # noqa: BLE001  # whatever it is: `finish` raises it in the main thread
            self._error = error
        self.longest_s = max(self.longest_s, time.monotonic() - self._began_s)

    def _ask(self) -> None:
        refuse_odd(self.folder, folder=True)
        self._may_write()


def _round_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1
