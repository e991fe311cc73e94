"""Reading files that somebody else may have made: regular ones only, never more than a limit, and without waiting."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


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


def read_regular(path: str | Path, max_bytes: int | None = None) -> bytes:
    """The content of a file.

    Args:
        path: the file; links are followed.
        max_bytes: longer files are refused; None: half of this machine's memory.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, is no regular file (a pipe would wait for ever), too long, or has holes, which
            cost nothing on disk and all their length in memory. `strerror` says so.
    """
    if max_bytes is None:
        max_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as error:  # a null byte in the name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "It is no regular file")
        if found.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"It has {found.st_size} bytes, at most {max_bytes} are read")
        if found.st_size and os.lseek(descriptor, 0, os.SEEK_HOLE) < found.st_size:
            raise OSError(errno.EINVAL, "It has holes: parts of it were never written")
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            content = file.read(found.st_size)
        except MemoryError as error:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from error
    return content
