"""Removal of what this user's killed jobs left on this node, before MPI starts.

A killed job leaves 1 to 5 MB in /dev/shm (MPICH) or a session folder and its segments (Open MPI). A container's 64 MB
are full after some dozens of them, and then no job starts; and where a name comes again, `MPI_Init` of the new job
finds the old job's memory.

A file goes if it is this user's, older than this process, and no visible process maps it or holds it open. Processes
of another PID namespace might, unseen: where /dev/shm is the host's and the processes are not, nothing is removed.
Containers that share /dev/shm with each other but not their processes do not show; there only the age protects a job
that is just starting (a running one has mapped its segments and no longer needs their names).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from fedmpi.mpi.processes import PROC, files_used_by, may_share_memory, namespace, process_age_s

SHM = Path("/dev/shm")

_SEGMENT = re.compile(r"(mpich_shm_|mpich_shar_tmp|ucx_shm_posix_|sm_segment\.|osc_sm\.|vader_segment\.)[^/]+")
_SESSION = re.compile(r"(?:ompi|prte|dvm|pid)\.(\d+)")  # of the process that made it
_LOCAL_RANKS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
_HOST_PID, _HOST_IPC = "pid:[4026531836]", "ipc:[4026531839]"  # fixed numbers of Linux
_LOCK_S = 1.0


class _Found(NamedTuple):
    """A file or folder, and what tells it from another one of that name."""

    path: Path
    device: int
    inode: int
    changed_ns: int
    folder: bool


def remove_leftovers(
    environ: Mapping[str, str] = os.environ,
    shm: Path = SHM,
    temporary: Path | None = None,
    proc: Path = PROC,
    age_s: float | None = None,
) -> list[Path]:
    """Remove dead jobs' segments and session folders; one rank per node does so, quietly.

    Args:
        environ: the launcher's variables, which say whether this is the node's first rank.
        shm: the folder of shared memory.
        temporary: the folder for temporary files; None: this process's.
        proc: the process table.
        age_s: of this process; None: ask Linux.

    Returns:
        Paths that are gone now.
    """
    if any(environ.get(name, "0") != "0" for name in _LOCAL_RANKS) or _processes_are_hidden(proc):
        return []
    age_s = process_age_s() if age_s is None else age_s
    before_ns = int(1e9 * (time.time() - age_s))
    segments = [found for found in _own(shm, before_ns) if _SEGMENT.fullmatch(found.path.name)]
    sessions = list(_sessions(temporary or Path(tempfile.gettempdir()), before_ns, proc))
    if not segments and not sessions:
        return []
    unused = _unused([*segments, *sessions], proc)
    removed = list(_unlink([found for found in unused if not found.folder], shm))
    for found in unused:
        if found.folder:
            with contextlib.suppress(OSError):
                shutil.rmtree(found.path)  # follows no link, not even one that is put there meanwhile
                removed.append(found.path)
    return removed


def _processes_are_hidden(proc: Path) -> bool:
    """Return True if others may use this /dev/shm whom the process table does not show."""
    pid, ipc = namespace("pid", proc), namespace("ipc", proc)
    return not pid or not ipc or (pid != _HOST_PID and ipc == _HOST_IPC)


def _own(folder: Path, before_ns: int, folders: bool = False) -> Iterator[_Found]:
    """Find this user's files, or folders, that were last changed before a time; no link is followed."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                about = entry.stat(follow_symlinks=False)
                single = stat.S_ISREG(about.st_mode) and about.st_nlink == 1
                fits = stat.S_ISDIR(about.st_mode) if folders else single
                if fits and about.st_ctime_ns < before_ns and about.st_uid == os.geteuid():
                    yield _Found(Path(entry.path), about.st_dev, about.st_ino, about.st_ctime_ns, folders)


def _sessions(temporary: Path, before_ns: int, proc: Path) -> Iterator[_Found]:
    """Open MPI's session folders whose maker was a process of this host and is dead.

    `ompi.PID` and `prte.PID` hold files named after the host; `ompi.HOST.UID/pid.PID` and `prte.HOST.UID/dvm.PID` are
    named after it.
    """
    host = socket.gethostname()
    for found in _own(temporary, before_ns, folders=True):
        name = found.path.name
        if name in (f"{kind}.{host}.{os.geteuid()}" for kind in ("ompi", "prte")):
            inner = list(_own(found.path, before_ns, folders=True))
        elif any(path.name.startswith(f"pmix.{host}.") for path in _entries(found.path)):
            inner = [found]
        else:
            continue
        for session in inner:
            maker = _SESSION.fullmatch(session.path.name)
            if maker and not (proc / maker[1]).exists():
                yield session


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _unused(candidates: list[_Found], proc: Path) -> list[_Found]:
    """Those that no visible process maps, holds open or stands in; none if a process of this user's cannot be read."""
    for process in _entries(proc):
        if not process.name.isdigit():
            continue
        try:
            used = files_used_by(process)
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        except OSError:
            if may_share_memory(process):
                return []
            continue
        candidates = [found for found in candidates if not _is_used(found, used)]
    return candidates


def _is_used(found: _Found, used: set[str]) -> bool:
    path = str(found.path)
    if f"{os.major(found.device):02x}:{os.minor(found.device):02x} {found.inode}" in used or path in used:
        return True
    return any(other.startswith(f"{path}/") for other in used) if found.folder else False


def _unlink(segments: list[_Found], shm: Path) -> Iterator[Path]:
    """Remove segments, but not another one that has its name by now: jobs that start at the same time take turns."""
    folder = os.open(shm, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    return
                time.sleep(0.01)
            except OSError:  # no locks of the kernel here: two jobs could not take turns, so nothing is removed
                return
        for found in segments:
            with contextlib.suppress(OSError):  # somebody was faster
                about = os.stat(found.path.name, dir_fd=folder, follow_symlinks=False)
                if (about.st_dev, about.st_ino, about.st_ctime_ns) == (found.device, found.inode, found.changed_ns):
                    os.unlink(found.path.name, dir_fd=folder)
                    yield found.path
    finally:
        os.close(folder)
