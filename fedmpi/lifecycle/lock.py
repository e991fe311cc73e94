"""A lock between processes and machines that needs nothing but a folder.

The lock is a file created with O_EXCL, which every file system does right, NFS included, where flock may fail, hang or
succeed twice. It names its holder, and the holder touches it every `HEARTBEAT_S`. A lock is stale when its holder is a
dead process of this machine, or, for other machines and unreadable content, when it was not touched for `STALE_S` by
the file system's own clock. A lock dated in the future (a clock was set back) is stale once it was seen not to change
for three heartbeats. Only who holds the guard (`<lock>.takeover`, a lock too) may replace a stale lock, so two
processes that find the same stale lock cannot both win.

A holder that slept for longer than `STALE_S` may have lost its lock: it calls `require` before each write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from fedmpi.errors import FilesystemError
from fedmpi.lifecycle import progress
from fedmpi.lifecycle.files import os_errors, read_regular, temp_path
from fedmpi.lifecycle.lock_holder import Holder, is_alive, machine_id, parse_holder, this_process

HEARTBEAT_S = 10.0
STALE_S = 60.0

_MISSED_BEATS = 3
_MOST_BYTES = 4096

logger = logging.getLogger(__name__)


class FileLock:
    """`with FileLock(path): ...` runs on one process at a time, among all machines that see `path`.

    Args:
        path: the lock file; its folder must exist and be writable.
        timeout_s: how long to wait for a live holder; 0 refuses at once.
        what: what the lock protects, for messages (default: the folder of `path`).
        heartbeat_s: how often the holder touches the file.

    Raises:
        FilesystemError: on entry: a live process holds the lock ("runs/a is in use by HOST pid PID since TIME"), or
            the folder is missing or read-only.
    """

    def __init__(self, path: Path, timeout_s: float = 1800.0, what: str = "", heartbeat_s: float = HEARTBEAT_S) -> None:
        self.path, self.timeout_s, self.what = path, timeout_s, what or str(path.parent)
        self._beat_s, self._watch_s = heartbeat_s, _MISSED_BEATS * heartbeat_s
        self._token = ""
        self._sightings: dict[Path, tuple[tuple[int, bytes], float]] = {}
        """Locks dated in the future: path -> (time stamp and content, when they were first seen together)."""
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> FileLock:
        give_up = time.monotonic() + self.timeout_s
        pause_s, is_logged = 0.02, False
        while True:
            me = this_process()
            with os_errors(FilesystemError, f"lock {self.path} cannot be created"):
                holder = self._try_acquire(self.path, me)
            if holder is None:
                break
            # whoever created it just now is still writing its name; one dated in the future is watched
            grace_s = self._watch_s + 1.0 if self._sightings else 0.0 if isinstance(holder, Holder) else 1.0
            if time.monotonic() >= give_up + grace_s:
                waited = f" (waited {self.timeout_s:.0f} s for {self.path})" if self.timeout_s else ""
                raise FilesystemError(f"{self.what} is in use by {holder}{waited}")
            if not is_logged and (self._sightings or (self.timeout_s > 0 and pause_s > 0.3)):
                unless = (
                    f", unless its lock, which is dated in the future, stands still for {self._watch_s:.0f} s"
                    if self._sightings
                    else ""
                )
                logger.info("waiting for %s: in use by %s%s", self.what, holder, unless)
                is_logged = True
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
                holder = parse_holder(read_regular(self.path, _MOST_BYTES))
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
        while not self._stop.wait(self._beat_s):
            with contextlib.suppress(OSError):  # a file system that is away for a moment; the next beat tells
                if not _is_held(self.path, self._token):
                    return  # `require` says so
                os.utime(self.path, follow_symlinks=False)

    def _try_acquire(self, path: Path, me: Holder) -> Holder | str | None:
        """Return None if `me` now holds `path`, else the holder (text where the file does not say)."""
        content = json.dumps(dataclasses.asdict(me)).encode()
        with contextlib.suppress(FileExistsError):
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "wb") as file:
                file.write(content)
            return None
        holder, stale = self._judge(path)
        guard = path.with_name(path.name + ".takeover")
        if not stale or self._try_acquire(guard, me) is not None:
            return holder
        try:
            holder, stale = self._judge(path)  # again: only now nobody else can replace it
            if not stale:
                return holder
            temp = temp_path(path)
            try:
                temp.write_bytes(content)
                temp.replace(path)
            finally:
                temp.unlink(missing_ok=True)
        finally:
            _release(guard, me.token)
        logger.warning("took over the stale lock %s of %s", path, holder)
        return None

    def _judge(self, path: Path) -> tuple[Holder | str, bool]:
        """Return the holder of `path`, and True if the lock is stale."""
        now = time.monotonic()
        before, since = self._sightings.pop(path, (None, now))
        try:
            content, stat = read_regular(path, _MOST_BYTES), path.lstat()
        except FileNotFoundError:
            return "a process that is just leaving", False
        holder = parse_holder(content)
        if holder is not None and holder.machine == machine_id():
            return holder, not is_alive(holder)
        age_s = _now_of(path) - stat.st_mtime
        name = holder or f"an unknown process since {_date(stat.st_mtime)}"
        if age_s >= -STALE_S:
            return name, age_s > STALE_S
        seen = stat.st_mtime_ns, content
        self._sightings[path] = seen, since if seen == before else now
        return name, now - self._sightings[path][1] > self._watch_s


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "an impossible date"


def _now_of(path: Path) -> float:
    """Return the time by the clock of the file system of `path`: other machines' clocks may be minutes off."""
    temp = temp_path(path)
    try:
        with temp.open("xb") as file:
            return os.fstat(file.fileno()).st_mtime
    finally:
        temp.unlink(missing_ok=True)


def _release(path: Path, token: str) -> None:
    with contextlib.suppress(OSError):  # a folder that was removed or went read-only: then the lock goes stale
        if _is_held(path, token):
            path.unlink()


def _is_held(path: Path, token: str) -> bool:
    try:
        holder = parse_holder(read_regular(path, _MOST_BYTES))
    except FileNotFoundError:
        return False
    return holder is not None and holder.token == token
