"""What a job prints: set up once, in `launch`."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys

from fedmpi.config import RunConfig

SUMMARY = 25
"""Level of the closing summary: `--quiet` still shows it."""


def set_up_logging(rank: int, config: RunConfig | None) -> None:
    """Rank 0 logs to standard output, warnings to standard error; other ranks only warnings, with their rank before."""
    for stream in (sys.stdout, sys.stderr):
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
    news, trouble = _Handler(sys.stdout), _Handler(sys.stderr)
    news.addFilter(lambda record: record.levelno < logging.WARNING)
    trouble.setLevel(logging.WARNING)
    news.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    trouble.setFormatter(logging.Formatter(f"{prefix}fedmpi: %(levelname)s: %(message)s"))
    root.handlers = [news, trouble]


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # generic only for type checkers
    """Goes quiet, and lets the job go on, when whoever read the output has left (`... | head`)."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            return
        super().handleError(record)
