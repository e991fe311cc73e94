"""`history.jsonl`: one JSON object a round, appended when the round is done."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from fedmpi.core.errors import CheckpointError, FilesystemError
from fedmpi.core.messages import RoundRecord


class History:
    """Appends each round's record as one line. All but its `timings` is the same on any number of ranks.

    Attributes:
        num_bytes: length of the file.
    """

    def __init__(self, path: Path, num_bytes: int = 0) -> None:
        """Into `path`, cut to its first `num_bytes` or created now, so that a full disk shows before training.

        Raises:
            FilesystemError: it cannot be written.
        """
        self._path = path
        self.num_bytes = num_bytes
        try:
            with path.open("ab") as file:
                file.truncate(num_bytes)
        except OSError as error:
            raise self._failed(error) from error

    def on_round(self, record: RoundRecord) -> None:
        """One line more, in the file before the next round starts.

        Raises:
            FilesystemError: the line cannot be written.
        """
        line = (json.dumps(dataclasses.asdict(record), allow_nan=False) + "\n").encode()
        try:
            with self._path.open("ab") as file:
                file.write(line)
        except OSError as error:
            raise self._failed(error) from error
        self.num_bytes += len(line)

    def sync(self) -> None:
        """Return once what was written is on disk.

        Raises:
            FilesystemError: it cannot be brought there.
        """
        try:
            with self._path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> FilesystemError:
        return FilesystemError(f"{self._path}: cannot be written ({error.strerror})")


def read_history(path: Path) -> list[RoundRecord]:
    """The records of a `history.jsonl`."""
    return [RoundRecord(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def check_history(path: Path, num_bytes: int, rounds: int) -> None:
    """See that the first `num_bytes` of a history are `rounds` lines, the last of which is the last round's.

    Raises:
        CheckpointError: they are not: somebody changed or cut the file.
    """
    try:
        with path.open("rb") as file:
            lines = file.read(num_bytes).splitlines(keepends=True)
        if (len(lines), sum(map(len, lines))) != (rounds, num_bytes):
            found = f"{len(lines)} lines, {sum(map(len, lines))} bytes of {num_bytes}"
        elif lines and json.loads(lines[-1])["round_idx"] != rounds - 1:
            found = "a last line of another round"
        else:
            return
    except OSError as error:
        found = str(error.strerror)
    except (ValueError, KeyError, TypeError, RecursionError):
        found = "a last line that is none of fedmpi's"
    raise CheckpointError(
        f"{path} does not go with the checkpoint, which is of round {rounds}: found {found}; --resume never starts over"
    )
