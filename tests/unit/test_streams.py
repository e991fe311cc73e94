"""Standard output and error that are closed, full, or read by nobody."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmpi.mpi import streams


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (reading, writing):
        os.close(descriptor)


@contextlib.contextmanager
def unread_stderr() -> Iterator[int]:
    """Standard error is a pipe that is full; its reading end. No fixture: pytest sets it again when a test begins."""
    reading, writing = os.pipe()
    kept = os.dup(2)
    os.dup2(writing, 2)
    os.close(writing)
    streams.put(2, b"x" * 2**20)
    try:
        yield reading
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(reading)


def test_a_pipe_that_nobody_reads_takes_what_it_has_room_for(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    assert streams.has_room(writing)
    taken = streams.put(writing, b"x" * 2**20)
    assert 0 < taken < 2**20
    assert not streams.has_room(writing)
    assert streams.put(writing, b"more", 0.05) == 0
    os.read(reading, 2**20)
    assert streams.put(writing, b"more") == 4


def test_a_terminal_that_is_stopped_has_no_room() -> None:
    controlling, terminal = pty.openpty()
    assert streams.has_room(terminal)
    termios = pytest.importorskip("termios")
    termios.tcflow(terminal, termios.TCOOFF)  # Ctrl-S
    assert not streams.has_room(terminal)
    termios.tcflow(terminal, termios.TCOON)
    assert streams.has_room(terminal)
    os.close(terminal)
    os.close(controlling)


def test_a_full_disk_and_a_reader_that_left_are_told() -> None:
    with Path("/dev/full").open("wb") as full, pytest.raises(OSError, match="No space left"):
        streams.put(full.fileno(), b"x")
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        streams.put(writing, b"x")
    os.close(writing)


def test_last_words_that_nobody_reads_do_not_hold_the_one_who_speaks() -> None:
    with unread_stderr():
        begun = time.monotonic()
        streams.tell(b"why the job ends", 0.2)
        assert time.monotonic() - begun < 2
        time.sleep(0.5)  # until its thread has given up as well: standard error is about to be the real one


def test_a_thread_is_stuck_while_it_prints_what_nobody_reads() -> None:
    with unread_stderr() as reading:
        thread = threading.Thread(target=lambda: os.write(2, 5000 * b"x"), daemon=True)
        thread.start()
        end = time.monotonic() + 5
        while not streams.is_stuck(thread.native_id or 0) and time.monotonic() < end:
            time.sleep(0.01)
        assert streams.is_stuck(thread.native_id or 0)
        assert not streams.is_stuck(threading.get_native_id()), "another thread of this process is not"
        os.read(reading, 2**20)
        thread.join(5)
        assert not streams.is_stuck(threading.get_native_id())


AT_THE_END = """
import os, sys, time
from fedmpi.mpi import streams
reading, writing = os.pipe()
if sys.argv[1] == "unread":
    streams.put(writing, b"x" * 2**20)
elif sys.argv[1] == "left":
    os.close(reading)
os.dup2(os.open("/dev/full", os.O_WRONLY) if sys.argv[1] == "full" else writing, 1)
sys.stdout.write("no end of line")
begun = time.monotonic()
streams.settle(0.2)
assert time.monotonic() - begun < 5
raise SystemExit(3)
"""


@pytest.mark.parametrize("how", ["unread", "left", "full"])
def test_what_cannot_be_written_at_the_end_decides_no_exit_code(how: str) -> None:
    """Python itself would write again at its end, and exit with 120, or never."""
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END, how], capture_output=True, text=True, timeout=60, check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    script = (
        "from fedmpi.mpi import streams\n"
        "from fedmpi.lifecycle.exits import say_error\n"
        "streams.reserve()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "say_error('not for the file')\n"
        "raise SystemExit(file.fileno() < 3)\n"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, script]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == ""
