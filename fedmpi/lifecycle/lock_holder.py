"""The holder of a lock file: a process, named so that other processes and machines can tell if it is still there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import time
from pathlib import Path

from fedmpi.errors import shown
from fedmpi.mpi.processes import process_stat

_MOST_CHARACTERS = 255


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        machine: host, boot and pid namespace, within which `pid` can be compared.
        started: start of the process in the kernel's ticks, so that a reused pid is not taken for it; empty: unknown.
    """

    host: str
    pid: int
    machine: str
    started: str
    since: str
    token: str

    def __str__(self) -> str:
        return f"{shown(self.host)} pid {self.pid} since {shown(self.since)}"


def parse_holder(content: bytes) -> Holder | None:
    """Return the holder that a lock file names; None: the file is none of ours."""
    try:
        holder = Holder(**json.loads(content))
    except (TypeError, ValueError, RecursionError):
        return None
    texts = (holder.host, holder.machine, holder.started, holder.since, holder.token)
    if not all(type(text) is str and len(text) <= _MOST_CHARACTERS for text in texts):
        return None
    return holder if type(holder.pid) is int and 0 < holder.pid < 2**31 else None


def this_process() -> Holder:
    """Return this process as the holder of a lock, with a fresh token."""
    since, started = time.strftime("%Y-%m-%dT%H:%M:%S%z"), str(process_stat(os.getpid()).started or "")
    return Holder(socket.gethostname(), os.getpid(), machine_id(), started, since, secrets.token_hex(8))


def machine_id() -> str:
    """Return host, boot and pid namespace: processes of the same machine can be compared by their ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux: the host name alone
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def is_alive(holder: Holder) -> bool:
    """Return True if the holder, a process of this machine, is still there."""
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    stat = process_stat(holder.pid)
    return stat.state not in ("Z", "X") and (
        not holder.started or not stat.started or str(stat.started) == holder.started
    )
