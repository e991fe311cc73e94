"""`history.jsonl`: one JSON object per round, appended when the round is done."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from fedmpi.core.record import RoundRecord
from fedmpi.errors import CheckpointError, FilesystemError
from fedmpi.lifecycle.files import atomic_write, open_regular, os_errors

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**20
_MOST_LINE_BYTES = 2**24


class History:
    """Appends each round's record as one line. All but its `timings` is the same on any number of ranks.

    The file stays open, and is one that this job made: a job that lost the folder appends to a file that no name leads
    to any more, and a file that was removed or replaced in mid-run is written again.

    Attributes:
        num_bytes: length of the file.
    """

    def __init__(self, path: Path, num_bytes: int = 0, may_write: Callable[[], None] = lambda: None) -> None:
        """Into `path`, with its first `num_bytes` or created now, so that a full disk shows before training.

        Args:
            path: the file.
            num_bytes: what to keep of it.
            may_write: called right before each change; it may raise.

        Raises:
            FilesystemError: it cannot be written.
        """
        self._path = path
        self._may_write = may_write
        self._lock = threading.Lock()  # `sync` is called from the thread that writes checkpoints
        self._digest = hashlib.sha256()
        self.num_bytes = num_bytes
        self._file = -1
        with self._os_errors():
            source = open_regular(path) if num_bytes else None
        self._replace(source)

    def __del__(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the file's content."""
        return self._digest.hexdigest()

    def on_round(self, record: RoundRecord) -> None:
        """Append a line, which is in the file before the next round starts.

        Raises:
            FilesystemError: the line cannot be written, or the file is no longer what was written.
        """
        fields = dataclasses.asdict(record)
        if not record.reported:
            del fields["reported"]
        line = (json.dumps(fields, allow_nan=False) + "\n").encode()
        with self._lock, self._os_errors():
            self._put_right()
            self._may_write()
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            self._digest.update(line)
            self.num_bytes += len(line)

    def sync(self) -> None:
        """Return once what was written is on disk.

        Raises:
            FilesystemError: it cannot be brought there.
        """
        with self._lock, self._os_errors():
            self._put_right()
            os.fsync(self._file)

    def _put_right(self) -> None:
        """See that the path leads to the file as it was written; else write it again, if it is still known."""
        ours = os.fstat(self._file)
        if ours.st_size < self.num_bytes:
            raise FilesystemError(
                f"{self._path} was cut by another program in mid-run: it has {ours.st_size} bytes of {self.num_bytes}"
            )
        try:
            found = self._path.lstat()
            moved = (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino)
        except FileNotFoundError:
            moved = True
        if moved or ours.st_size > self.num_bytes:
            what = "removed or replaced" if moved else "written to"
            logger.warning("%s was %s by another program in mid-run: written again", self._path, what)
            self._replace(os.dup(self._file))

    def _replace(self, source: int | None) -> None:
        """Make the path lead to a new file with the first `num_bytes` of `source`, which is closed."""
        digest = hashlib.sha256()

        def copy(file: BinaryIO) -> None:
            for piece in _pieces(source, self.num_bytes):
                digest.update(piece)
                file.write(piece)

        def check() -> None:
            if self._file >= 0 and digest.digest() != self._digest.digest():
                raise FilesystemError(f"{self._path} was changed by another program in mid-run")
            self._may_write()

        try:
            with self._os_errors():
                atomic_write(self._path, copy, check)
                if self._file >= 0:
                    os.close(self._file)
                self._digest = digest
                self._file = open_regular(self._path, os.O_RDWR | os.O_APPEND)
        finally:
            if source is not None:
                os.close(source)

    def _os_errors(self) -> AbstractContextManager[None]:
        return os_errors(FilesystemError, f"{self._path} cannot be written")


def read_history(path: Path) -> list[RoundRecord]:
    """Return the records of a `history.jsonl`."""
    return [RoundRecord(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def flat_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return one row per round, for `pandas.DataFrame`: timings and reported numbers are columns."""
    rows = [dataclasses.asdict(record) for record in read_history(Path(path))]
    for row in rows:
        row |= row.pop("timings")
        row |= {f"reported_{name}" if name in row else name: value for name, value in row.pop("reported").items()}
    return rows


def check_history(path: Path, num_bytes: int, rounds: int, sha256: str | None = None) -> None:
    """See that the first `num_bytes` of a history are `rounds` lines, the last of which is the last round's.

    Args:
        path: the file.
        num_bytes: as the checkpoint has it.
        rounds: as the checkpoint has it.
        sha256: of these bytes (hex); None: a checkpoint that does not say.

    Raises:
        CheckpointError: they are not: somebody changed or cut the file.
    """
    try:
        file = open_regular(path)
        try:
            found = _found_wrong(file, num_bytes, rounds, sha256)
        finally:
            os.close(file)
    except OSError as error:
        found = str(error.strerror)
    except (ValueError, KeyError, TypeError, RecursionError):
        found = "a last line that is none of fedmpi's"
    if found:
        raise CheckpointError(
            f"{path} does not go with the checkpoint, which is of round {rounds}: found {found};"
            " --resume never starts over"
        )


def _found_wrong(file: int, num_bytes: int, rounds: int, sha256: str | None) -> str:
    size, lines, digest, tail = os.fstat(file).st_size, 0, hashlib.sha256(), b""
    for piece in _pieces(file, min(size, num_bytes)):
        lines += piece.count(b"\n")
        digest.update(piece)
        if b"\0" in piece:
            return "zeros in the place of a line"  # a sparse file of any length ends here
        tail = (tail + piece)[-_MOST_LINE_BYTES:]
        tail = tail[tail.rfind(b"\n", 0, len(tail) - 1) + 1 :]
    if tail and not tail.endswith(b"\n"):
        lines += 1  # a cut one
    if size < num_bytes or lines != rounds:
        return f"{lines} lines, {min(size, num_bytes)} bytes of {num_bytes}"
    if tail and json.loads(tail)["round_idx"] != rounds - 1:
        return "a last line of another round"
    if sha256 is not None and digest.hexdigest() != sha256:
        return "the right number of lines, of which some were edited"
    return ""


def _pieces(file: int | None, num_bytes: int) -> Iterator[bytes]:
    """The first `num_bytes` of an open file.

    Raises:
        OSError: it is shorter.
    """
    done = 0
    while file is not None and done < num_bytes:
        piece = os.pread(file, min(_CHUNK_BYTES, num_bytes - done), done)
        if not piece:
            raise OSError(errno.EIO, f"it ends after {done} bytes of {num_bytes}")
        done += len(piece)
        yield piece
