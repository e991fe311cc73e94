"""Atomic writes and the lock: what is left after a crash, and who wins when many want the same."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedmpi
from fedmpi.errors import FilesystemError
from fedmpi.lifecycle.files import atomic_write, remove_temps
from fedmpi.lifecycle.lock import STALE_S, FileLock
from fedmpi.lifecycle.lock_holder import machine_id

ROOT = str(Path(fedmpi.__file__).parents[1])

COUNT = """
import sys
from pathlib import Path
from fedmpi.lifecycle.lock import FileLock
folder, times = Path(sys.argv[1]), int(sys.argv[2])
for _ in range(times):
    with FileLock(folder / "lock", timeout_s=60):
        count = folder / "count"
        count.write_text(str(int(count.read_text()) + 1))
"""

HOLD = """
import sys, time
from pathlib import Path
from fedmpi.lifecycle.lock import FileLock
with FileLock(Path(sys.argv[1]), timeout_s=0):
    print("held", flush=True)
    time.sleep(60)
"""

NO_FCNTL = """
import errno, fcntl
def broken(*args):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = fcntl.lockf = broken
"""


def start(script: str, *args: object, path: str = ROOT, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)], env={**os.environ, "PYTHONPATH": path}, text=True, **options
    )


def claim(path: Path, age_s: float = 0.0, **changes: object) -> None:
    """A lock file as another process would have left it."""
    fields = {
        "host": "elsewhere", "pid": 4242, "machine": "elsewhere boot ns", "started": "1",
        "since": "2020-01-01T00:00:00+0000", "token": "theirs",
    }  # fmt: skip
    path.write_text(json.dumps({**fields, **changes}))
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic_write(path, b"old")
    atomic_write(path, lambda file: file.write(b"new") and None)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_atomic_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic_write(path, b"old")

    def full(file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FilesystemError, match=r"a\.bin cannot be written: No space left on device"):
        atomic_write(path, full)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_atomic_write_without_a_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FilesystemError, match="cannot be written: No such file") as caught:
        atomic_write(tmp_path / "no" / "a.bin", b"")
    assert "\n" not in str(caught.value)


def test_remove_temps_takes_only_temps(tmp_path: Path) -> None:
    for name in (".a.bin.12ab.tmp", ".b.bin.12ab.tmp", "a.bin", ".a.bin"):
        (tmp_path / name).touch()
    remove_temps(tmp_path, "a.bin")
    assert names(tmp_path) == [".a.bin", ".b.bin.12ab.tmp", "a.bin"]


@pytest.mark.parametrize("stale", [False, True])
def test_many_processes_in_the_same_second(tmp_path: Path, stale: bool) -> None:
    """Without fcntl, and from a stale lock: none is let in while another is inside."""
    (tmp_path / "inject").mkdir()
    (tmp_path / "inject" / "sitecustomize.py").write_text(NO_FCNTL)
    work = tmp_path / "work"
    work.mkdir()
    (work / "count").write_text("0")
    if stale:
        claim(work / "lock", age_s=1000)
        claim(work / "lock.takeover", age_s=1000)
    path = f"{tmp_path / 'inject'}{os.pathsep}{ROOT}"
    children = [start(COUNT, work, 5, path=path) for _ in range(4)]
    assert [child.wait(100) for child in children] == [0] * 4
    assert (work / "count").read_text() == "20"
    assert names(work) == ["count"]


def test_a_killed_holder_is_replaced_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lock"
    with start(HOLD, path, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with (
            pytest.raises(FilesystemError, match=rf"is in use by \S+ pid {child.pid} since \d{{4}}-"),
            FileLock(path, 0),
        ):
            pass
        os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.2)  # not waited for: a zombie is dead too
        with FileLock(path, timeout_s=0):
            pass
    assert [record.message.split(" of ")[0] for record in caplog.records] == [f"took over the stale lock {path}"]
    assert names(tmp_path) == []


def test_a_live_holder_is_waited_for_up_to_the_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "lock"
    with FileLock(path), pytest.raises(FilesystemError, match=rf"pid {os.getpid()} since .*waited 2 s"):
        FileLock(path, timeout_s=2).__enter__()
    waits = [record.message for record in caplog.records]
    assert len(waits) == 1
    assert waits[0].startswith(f"waiting for {tmp_path}: in use by")


@pytest.mark.parametrize("content", ["", "[1]", '{"pid": "x"}'])
def test_unreadable_content_is_judged_by_age(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lock"
    path.write_text(content)
    with pytest.raises(FilesystemError, match="in use by an unknown process since"):
        FileLock(path, timeout_s=0).__enter__()
    os.utime(path, (0, 0))
    with FileLock(path, timeout_s=0):
        pass


def test_other_machines_are_judged_by_age(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    claim(path, age_s=STALE_S / 2, pid=dead_pid())
    with pytest.raises(FilesystemError, match="in use by elsewhere pid"):
        FileLock(path, timeout_s=0).__enter__()
    claim(path, age_s=2 * 24 * 3600)
    with FileLock(path, timeout_s=0):
        pass


def test_this_machine_is_judged_by_its_processes(tmp_path: Path) -> None:
    path, here = tmp_path / "lock", machine_id()
    claim(path, machine=here, pid=dead_pid())
    with FileLock(path, timeout_s=0):
        pass
    claim(path, machine=here, pid=os.getpid(), started="7")  # the number is in use again, by another process
    with FileLock(path, timeout_s=0):
        pass
    claim(path, age_s=1000, machine=here, pid=os.getpid(), started="")  # alive, if slow
    with pytest.raises(FilesystemError):
        FileLock(path, timeout_s=0).__enter__()


def test_the_clock_is_that_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    claim(path)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's clock is decades ahead
    with pytest.raises(FilesystemError):
        FileLock(path, timeout_s=0).__enter__()


def test_the_heart_beats_and_leaves_others_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with FileLock(path, heartbeat_s=0.02):
        os.utime(path, (0, 0))
        give_up = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < give_up:
            time.sleep(0.02)
        assert path.stat().st_mtime > 0
        claim(path)  # somebody took it over
    assert json.loads(path.read_text())["token"] == "theirs"


def test_a_folder_that_is_missing_or_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FilesystemError, match="cannot be created: No such file"):
        FileLock(tmp_path / "no" / "lock").__enter__()

    def read_only(*args: object, **options: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(FilesystemError, match="cannot be created: Read-only file system"):
        FileLock(tmp_path / "lock").__enter__()
