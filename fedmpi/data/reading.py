"""Opening files that somebody else may have made: regular ones only, never more than a limit, and without waiting."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from fedmpi.lifecycle import files

MAX_DATA_BYTES = 2**28
"""Limit for one file, or one unpacked archive, of a data set; CIFAR-10's largest has 154 MB."""


def open_regular(path: str | Path, max_bytes: int) -> BinaryIO:
    """Open a file to read; links are followed.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, is no regular file (a pipe would wait for ever), or too long. `strerror` says so.
    """
    try:
        descriptor = files.open_regular(Path(path), follow=True)
    except ValueError as error:  # a null byte in the name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
    size = os.fstat(descriptor).st_size
    if size > max_bytes:
        os.close(descriptor)
        raise OSError(errno.EFBIG, f"it has {size} bytes, at most {max_bytes} are read")
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | Path, max_bytes: int | None = None) -> bytes:
    """The content of a file.

    Args:
        path: the file; links are followed.
        max_bytes: longer files are refused; None: half of this machine's memory.

    Raises:
        FileNotFoundError: there is none.
        OSError: as in `open_regular`; or it has holes, which cost nothing on disk and all their length in memory.
    """
    if max_bytes is None:
        max_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with open_regular(path, max_bytes) as file:
        size = os.fstat(file.fileno()).st_size
        if size and os.lseek(file.fileno(), 0, os.SEEK_HOLE) < size:
            raise OSError(errno.EINVAL, "it has holes: parts of it were never written")
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        try:
            return file.read(size)
        except MemoryError as error:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from error


def exists(path: Path) -> bool:
    """Return True if something is at `path`.

    Raises:
        OSError: it cannot be said, e.g. in a folder of somebody else.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a null byte in the name
        return False
    return True


def is_regular(path: Path) -> bool:
    """Return True if a regular file is at `path`, and may be looked at."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Return True if a folder is at `path`, and may be looked at."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0
