"""Processes of this machine, as Linux's process table shows them, and this process's rank among those of its node.

Where there is no table, or an entry may not be read, every reader here returns something empty.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SERVER_RANK = 0
PROC = Path("/proc")


class NodeRank(NamedTuple):
    """A rank, and the ranks of its node in ascending order, itself among them."""

    node: Sequence[int]
    rank: int


_own = NodeRank((0,), 0)


def note_node_rank(node: Sequence[int], rank: int) -> None:
    """Remember this process's rank in the job, for code that has no communicator at hand."""
    global _own
    _own = NodeRank(node, rank)


def own_node_rank() -> NodeRank:
    """Return this process's rank; rank 0 alone on its node before MPI is started."""
    return _own


class Stat(NamedTuple):
    """A process: one letter for its state, its parent's id, and its start in clock ticks since boot; 0: unknown."""

    state: str = ""
    parent: int = 0
    started: int = 0


def process_stat(pid: int | str, proc: Path = PROC) -> Stat:
    """Return the state of a process; `pid` may be "self"."""
    fields = (read_entry(pid, "stat", proc) or b"").rpartition(b")")[2].split()  # a name may hold spaces and brackets
    with contextlib.suppress(IndexError, ValueError):
        return Stat(fields[0].decode(), int(fields[1]), int(fields[19]) if len(fields) > 19 else 0)
    return Stat()


def lineage(proc: Path = PROC) -> list[int]:
    """Return this process, its parent, and so on."""
    line = [os.getpid()] if (proc / str(os.getpid())).exists() else []
    while line and len(line) < 1000:  # a bound in case the table changes under us
        parent = process_stat(line[-1], proc).parent
        if parent <= 1:
            break
        line.append(parent)
    return line


def read_entry(pid: int | str, name: str, proc: Path = PROC) -> bytes | None:
    """Return a file of the table; None if it cannot be read. "cmdline" and "environ" are strings that end with 0."""
    try:
        return (proc / str(pid) / name).read_bytes()
    except OSError:
        return None


def namespace(kind: str, proc: Path = PROC) -> str:
    """Return the namespace of this process, such as "pid:[4026531836]"."""
    try:
        return os.readlink(proc / "self" / "ns" / kind)  # noqa: PTH115  # no path
    except OSError:
        return ""


def process_age_s() -> float:
    """Return the seconds since this process was started; 0 where that is unknown."""
    ticks = process_stat("self").started
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")) if ticks else 0.0


def files_used_by(process: Path) -> set[str]:
    """Return paths, and "device inode", of what the process maps, holds open or stands in.

    Raises:
        OSError: the process has ended, is another user's, or may not be read.
    """
    if os.geteuid() != process.stat().st_uid:
        raise PermissionError(process)
    used = set()
    for line in (process / "maps").read_bytes().splitlines():
        if b"/" in line:
            _, _, _, device, inode, path = line.split(None, 5)
            used |= {f"{device.decode()} {inode.decode()}", os.fsdecode(path)}
    for link in (*(process / "fd").iterdir(), process / "cwd"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            used.add(os.readlink(link))  # noqa: PTH115  # a Path per open file takes ten times as long
    return used


def may_share_memory(process: Path) -> bool:
    """Return True unless a process that may not be read is another user's, has no shared memory, or is init."""
    if process.name == "1":
        return False
    uid = os.geteuid()
    try:
        lines = (process / "status").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return process.stat().st_uid == uid
    fields = {name: values.split() for name, _, values in (line.partition(":") for line in lines)}
    return str(uid) in fields.get("Uid", []) and fields.get("RssShmem", ["0"])[0] != "0"
