"""The log of a job: set up once, in `launch`."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections import deque
from collections.abc import Iterator
from typing import TextIO

from fedmpi.config import RunConfig
from fedmpi.mpi.streams import drop, has_room, put

SUMMARY = 25
"""Level of the closing summary: `--quiet` still shows it."""

_KEPT_BYTES = 2**20
"""The most that is kept of a log that nobody reads, until somebody does."""


def set_up_logging(rank: int, config: RunConfig | None, own: bool = True) -> None:
    """Rank 0 logs to standard output, warnings to standard error; other ranks only warnings, with their rank before.

    Args:
        rank: this process.
        config: `verbose` and `quiet`; None: not known yet.
        own: whether this program is ours; another one's streams are written to and left as they are.
    """
    for stream in (sys.stdout, sys.stderr) if own else ():
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    level = logging.INFO if rank == 0 else logging.WARNING
    if config is not None and config.verbose:
        level = logging.DEBUG
    elif config is not None and config.quiet:
        level = SUMMARY if rank == 0 else logging.WARNING
    root = logging.getLogger("fedmpi")
    root.setLevel(level)
    root.propagate = False
    prefix = "" if rank == 0 else f"[r{rank}] "
    news, trouble = Stream(sys.stdout, own), Stream(sys.stderr, own)
    news.addFilter(lambda record: record.levelno < logging.WARNING)
    trouble.setLevel(logging.WARNING)
    news.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    trouble.setFormatter(logging.Formatter(f"{prefix}fedmpi: %(levelname)s: %(message)s"))
    news.other, trouble.other = trouble, news
    root.handlers = [news, trouble]


@contextlib.contextmanager
def kept_logging() -> Iterator[None]:
    """Within, `set_up_logging` may be called; then the package logs as it did before."""
    root = logging.getLogger("fedmpi")
    level, propagate, handlers = root.level, root.propagate, root.handlers
    try:
        yield
    finally:
        root.setLevel(level)
        root.propagate, root.handlers = propagate, handlers


def finish_logging(patience_s: float) -> None:
    """Write what is left of a log that was not read in time, while somebody takes more of it within `patience_s`."""
    for handler in logging.getLogger("fedmpi").handlers:
        if isinstance(handler, Stream):
            with contextlib.suppress(OSError, ValueError):  # full, or closed
                handler.write_kept(patience_s)


class Stream(logging.Handler):
    """Writes to a stream and neither waits for its reader nor minds that there is none: the job goes on.

    Lines that a pipe or terminal does not take now are kept and go out before the next one, up to `_KEPT_BYTES`.

    Attributes:
        other: where to say once that this stream cannot be written.
    """

    def __init__(self, stream: TextIO | None, own: bool = True) -> None:
        """Over `stream`; None: it was closed before Python started. `own`: what a reader that left misses is ours."""
        super().__init__()
        self._own = own
        self.other: Stream | None = None
        self._stream = stream
        self._kept: deque[bytes] = deque()
        self._num_kept = self._num_lost = 0
        self._told = False
        try:
            self._descriptor = stream.fileno() if isinstance(stream, io.TextIOWrapper) else None
        except OSError:  # in memory
            self._descriptor = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        if self._stream is None:
            return
        try:
            text = self.format(record) + "\n"
        except Exception:  # noqa: BLE001  # as every handler: a log call with wrong arguments is no end
            self.handleError(record)
            return
        try:
            if self._descriptor is None:
                self._stream.write(text)
                self._stream.flush()
            else:
                self._keep(text.encode(self._stream.encoding or "utf-8", "backslashreplace"))
                self.write_kept(0.0)
        except (OSError, ValueError) as error:  # full, or closed
            self._fail(error)

    def write_kept(self, patience_s: float) -> None:
        """Write what is kept, as long as it is taken.

        Raises:
            OSError: the disk is full, or the reader has left.
            ValueError: the stream was closed.
        """
        if self._stream is None or self._descriptor is None:
            return
        if self._kept and has_room(self._descriptor, patience_s):
            self._stream.flush()  # what others have printed comes first
        while self._kept and has_room(self._descriptor, patience_s):
            line = self._kept.popleft()
            self._num_kept -= len(line)
            rest = line[put(self._descriptor, line, patience_s) :]
            if rest:
                self._kept.appendleft(rest)
                self._num_kept += len(rest)
                return
        if self._num_lost and not self._kept:
            lost, self._num_lost = self._num_lost, 0
            self._keep(f"({lost} lines of this log are missing: nobody read it)\n".encode())

    def _keep(self, line: bytes) -> None:
        if self._num_kept + len(line) > _KEPT_BYTES:
            self._num_lost += 1
            return
        self._kept.append(line)
        self._num_kept += len(line)

    def _fail(self, error: Exception) -> None:
        """Drop the line, and if the reader has left all that follows; say it once where that can be read."""
        self._kept.clear()
        self._num_kept = 0
        if isinstance(error, BrokenPipeError):
            if self._descriptor is not None and self._own:
                drop(self._descriptor)
        elif not self._told and self.other is not None:
            self._told = self.other._told = True
            reason = error.strerror if isinstance(error, OSError) else str(error)
            record = logging.LogRecord(
                __name__, logging.WARNING, __file__, 0, "the log cannot be written (%s): the job goes on without it",
                (reason,), None,
            )  # fmt: skip
            self.other.emit(record)
