"""`history.jsonl`: one JSON object a round, appended when the round is done."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from fedmpi.core.errors import FilesystemError
from fedmpi.core.messages import RoundRecord


class History:
    """Appends each round's record as one line. All but its `timings` is the same on any number of ranks."""

    def __init__(self, path: Path) -> None:
        """Into `path`, created or emptied now so that a full disk shows before training."""
        self._path = path
        self._write("w", "")

    def on_round(self, record: RoundRecord) -> None:
        """One line more, in the file before the next round starts.

        Raises:
            FilesystemError: the line cannot be written.
        """
        self._write("a", json.dumps(dataclasses.asdict(record), allow_nan=False) + "\n")

    def _write(self, mode: str, text: str) -> None:
        try:
            with self._path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise FilesystemError(f"{self._path}: cannot be written ({error.strerror})") from error


def read_history(path: Path) -> list[RoundRecord]:
    """The records of a `history.jsonl`."""
    return [RoundRecord(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
