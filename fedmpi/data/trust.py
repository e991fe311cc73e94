"""Files that somebody else may have made: who can change them, and reading them within limits and without waiting.

A user's own are those that nobody else but root can change. What others can write (a shared folder, a folder of theirs)
is data to be checked each time: a record that says "these files were verified", or a split that is found by its name,
proves nothing there.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from pathlib import Path

from fedmpi.lifecycle.files import open_limited

is_regular, is_folder = os.path.isfile, os.path.isdir  # unlike Path's, False where nobody may look


def exposed(path: Path) -> str:
    """The reason why another user may change what is at `path`, in words; "": nobody can.

    The path and all folders above it, also where links lead, must belong to this user or root and be closed to other
    writers. A folder with the sticky bit (/tmp) may be open: its entries can be replaced by their owners only.
    """
    here = Path(os.path.abspath(path))  # noqa: PTH100  # Path.resolve would follow the links that are to be checked
    try:
        real = here.resolve()
    except (OSError, RuntimeError):
        return f"{here} cannot be followed"
    for part in dict.fromkeys((here, *here.parents, real, *real.parents)):
        try:
            found = part.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue  # nothing there yet
        except OSError as error:
            return f"{part} cannot be looked at: {error.strerror}"
        if found.st_uid not in (0, os.geteuid()):
            return f"{part} belongs to another user"
        if _is_open(found):
            return f"others may write to {part}"
    return ""


def _is_open(found: os.stat_result) -> bool:
    mode = found.st_mode
    if stat.S_ISLNK(mode) or (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
        return False
    return bool(mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _is_own_group(found.st_gid)))


def _is_own_group(gid: int) -> bool:
    """Return True for the group of this user alone that many systems make with each user (sshd asks the same)."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def read_whole(path: str | Path, limit: int | None = None) -> bytes:
    """Return the content of a file of at most `limit` bytes (None: half of this machine's memory); links are followed.

    Raises:
        OSError: as in `open_limited`; or it has holes, which cost nothing on disk and all their length in memory.
    """
    if limit is None:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with open_limited(path, limit) as file:
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


def writable(folder: Path) -> bool:
    """Return True if files can be made in `folder`, or the folder itself; only asks."""
    while not (is_folder(folder) or is_regular(folder)) and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)
