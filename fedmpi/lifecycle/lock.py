"""A lock between processes and machines that needs nothing but a folder.

The lock is a file created with O_EXCL, which every file system does right, NFS included, where flock may fail, hang or
succeed twice. It names its holder, and the holder touches it every `HEARTBEAT_S`. A lock is stale when its holder is a
dead process of this machine, or, for other machines and unreadable content, when it was not touched for `STALE_S` by
the file system's own clock. A lock dated in the future (a clock was set back) is stale once it was seen not to change
for three heartbeats. Only who holds the guard (`<lock>.takeover`, a lock too) may replace a stale lock, so two
processes that find the same stale lock cannot both win.

A holder that slept for longer than `STALE_S` may have lost its lock: it asks `require` before each write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

from fedmpi.errors import FilesystemError, shown
from fedmpi.lifecycle import progress
from fedmpi.lifecycle.files import os_errors, read_regular, temp_path
from fedmpi.mpi.processes import process_stat

HEARTBEAT_S = 10.0
STALE_S = 60.0

_MISSED_BEATS = 3
_MOST_BYTES = 4096
_FIELD = 255

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    host: str
    pid: int
    machine: str
    """What makes `pid` comparable: host, boot and pid namespace."""
    started: str
    """When the process started, in the kernel's ticks, so that a reused pid is not taken for it; empty: unknown."""
    since: str
    token: str

    def __str__(self) -> str:
        return f"{shown(self.host)} pid {self.pid} since {shown(self.since)}"


class FileLock:
    """`with FileLock(path): ...` runs on one process at a time, among all machines that see `path`.

    Args:
        path: the lock file; its folder must exist and be writable.
        timeout_s: how long to wait for a live holder; 0 refuses at once.
        what: what the lock protects, for messages (default: the folder of `path`).

    Raises:
        FilesystemError: on entry: a live process holds the lock ("runs/a is in use by HOST pid PID since TIME"), or
            the folder is missing or read-only.
    """

    def __init__(self, path: Path, timeout_s: float = 1800.0, what: str = "") -> None:
        self.path = path
        self.timeout_s = timeout_s
        self.what = what or str(path.parent)
        self._token = ""
        self._sightings: _Sightings = {}
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> FileLock:
        give_up = time.monotonic() + self.timeout_s
        pause_s, told = 0.02, False
        while True:
            me = _me()
            with os_errors(FilesystemError, f"lock {self.path} cannot be created"):
                holder = _try_acquire(self.path, me, self._sightings)
            if holder is None:
                break
            # whoever created it just now is still writing its name; one dated in the future is watched
            grace_s = (
                _MISSED_BEATS * HEARTBEAT_S + 1.0 if self._sightings else 0.0 if isinstance(holder, Holder) else 1.0
            )
            if time.monotonic() >= give_up + grace_s:
                waited = f" (waited {self.timeout_s:.0f} s for {self.path})" if self.timeout_s else ""
                raise FilesystemError(f"{self.what} is in use by {holder}{waited}")
            if not told and self._sightings:
                logger.info("waiting for %s: in use by %s, unless its lock, which is dated in the future, stands still"
                            " for %.0f s", self.what, holder, _MISSED_BEATS * HEARTBEAT_S)  # fmt: skip
                told = True
            if not told and self.timeout_s > 0 and pause_s > 0.3:
                logger.info("waiting for %s: in use by %s", self.what, holder)
                told = True
            progress.beat()  # to wait is no stall
            time.sleep(pause_s)
            pause_s = min(0.5, pause_s * 1.5)
        self._token = me.token
        self._stop.clear()
        self._heart = threading.Thread(target=self._beat, name=f"heartbeat {self.path.name}", daemon=True)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._heart is not None:
            self._heart.join()
        _release(self.path, self._token)

    def require(self) -> None:
        """See that this process still holds the lock; called right before a write to what it protects.

        Raises:
            FilesystemError: another process took it over, or somebody removed it.
        """
        with os_errors(FilesystemError, f"lock {self.path} cannot be read"):
            try:
                holder = _read(self.path)
            except FileNotFoundError:
                raise FilesystemError(
                    f"{self.what} is no longer this job's: {self.path} was removed, another job may have used the"
                    " folder"
                ) from None
        if holder is None or holder.token != self._token:
            raise FilesystemError(
                f"{self.what} is in use by {holder or 'an unknown process'}: it took the folder over from this job,"
                f" which showed no sign of life for more than {STALE_S:.0f} s"
            )

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # a file system that is away for a moment; the next beat tells
                if not _is_mine(self.path, self._token):
                    return  # `require` says so
                os.utime(self.path, follow_symlinks=False)


_Sightings = dict[Path, tuple[tuple[int, bytes], float]]
"""Locks dated in the future: path -> (time stamp and content, when they were first seen together)."""


def _try_acquire(path: Path, me: Holder, sightings: _Sightings) -> Holder | str | None:
    """None if `me` now holds `path`, else who does (text where the file does not say)."""
    content = json.dumps(dataclasses.asdict(me)).encode()
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        pass
    else:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        return None
    holder, stale = _judge(path, sightings)
    if not stale:
        return holder
    guard = path.with_name(path.name + ".takeover")
    if _try_acquire(guard, me, sightings) is not None:
        return holder
    try:
        holder, stale = _judge(path, sightings)  # again: only now nobody else can replace it
        if not stale:
            return holder
        temp = temp_path(path)
        try:
            with temp.open("xb") as file:
                file.write(content)
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)
    finally:
        _release(guard, me.token)
    logger.warning("took over the stale lock %s of %s", path, holder)
    return None


def _judge(path: Path, sightings: _Sightings) -> tuple[Holder | str, bool]:
    """Who holds `path`, and whether the lock is stale."""
    now = time.monotonic()
    before, since = sightings.pop(path, (None, now))
    try:
        content, stat = read_regular(path, _MOST_BYTES), path.lstat()
    except FileNotFoundError:
        return "a process that is just leaving", False
    holder = _parse(content)
    if holder is not None and holder.machine == _machine():
        return holder, not _alive(holder)
    age_s = _clock(path) - stat.st_mtime
    told = holder or f"an unknown process since {_date(stat.st_mtime)}"
    if age_s >= -STALE_S:
        return told, age_s > STALE_S
    seen = stat.st_mtime_ns, content
    sightings[path] = seen, since if seen == before else now
    return told, now - sightings[path][1] > _MISSED_BEATS * HEARTBEAT_S


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "an impossible date"


def _clock(path: Path) -> float:
    """Now, by the clock of the file system of `path`: other machines' clocks may be minutes off."""
    temp = temp_path(path)
    descriptor = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        temp.unlink(missing_ok=True)


def _release(path: Path, token: str) -> None:
    with contextlib.suppress(OSError):  # a folder that was removed or went read-only: then the lock goes stale
        if _is_mine(path, token):
            path.unlink()


def _is_mine(path: Path, token: str) -> bool:
    try:
        holder = _read(path)
    except FileNotFoundError:
        return False
    return holder is not None and holder.token == token


def _read(path: Path) -> Holder | None:
    return _parse(read_regular(path, _MOST_BYTES))


def _parse(content: bytes) -> Holder | None:
    try:
        fields = json.loads(content)
        holder = Holder(**fields)
    except (TypeError, ValueError, RecursionError):
        return None
    texts = (holder.host, holder.machine, holder.started, holder.since, holder.token)
    if not all(type(text) is str and len(text) <= _FIELD for text in texts):
        return None
    return holder if type(holder.pid) is int and 0 < holder.pid < 2**31 else None


def _me() -> Holder:
    since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    pid = os.getpid()
    return Holder(socket.gethostname(), pid, _machine(), _process(pid)[1], since, secrets.token_hex(8))


def _machine() -> str:
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux: the host name alone
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _alive(holder: Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    state, started = _process(holder.pid)
    return state not in ("Z", "X") and (not holder.started or not started or started == holder.started)


def _process(pid: int) -> tuple[str, str]:
    """State letter and start time of a process as Linux tells them; empty where it does not."""
    stat = process_stat(pid)
    return stat.state, str(stat.started or "")
