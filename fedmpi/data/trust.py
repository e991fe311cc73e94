"""Which files count as the user's own: those that nobody else but root can change.

What others can write (a shared folder, a folder of theirs) is data to be checked each time: a record that says "these
files were verified" or a split that is found by its name proves nothing there.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path


def exposed(path: Path) -> str:
    """Why another user may change what is at `path`, in words; "": nobody can.

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
        if not stat.S_ISLNK(found.st_mode) and _is_open(found):
            return f"others may write to {part}"
    return ""


def _is_open(found: os.stat_result) -> bool:
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        return False
    by_group = found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid)
    return bool(found.st_mode & stat.S_IWOTH or by_group)


def _is_own_group(gid: int) -> bool:
    """Return True for the group of this user alone that many systems make with each user (sshd asks the same)."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
