"""What rank 0 and the others print, where, and what happens when nobody reads it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator

import pytest

from fedmpi.config import RunConfig
from fedmpi.logs import SUMMARY, finish_logging, set_up_logging


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """The package's logger as it was, after the test."""
    root = logging.getLogger("fedmpi")
    saved = (root.level, root.propagate, root.handlers)
    yield
    root.level, root.propagate, root.handlers = saved
    root.setLevel(saved[0])


def say_all() -> None:
    logger = logging.getLogger("fedmpi.core.somewhere")
    for level, text in ((logging.DEBUG, "detail"), (logging.INFO, "news"), (SUMMARY, "summary")):
        logger.log(level, "%s", text)
    logger.warning("careful")
    logger.error("wrong")


@pytest.mark.parametrize(
    ("rank", "options", "out", "err"),
    [
        (0, {}, ["news", "summary"], ["fedmpi: WARNING: careful", "fedmpi: ERROR: wrong"]),
        (0, {"quiet": True}, ["summary"], ["fedmpi: WARNING: careful", "fedmpi: ERROR: wrong"]),
        (0, {"verbose": True}, ["detail", "news", "summary"], ["fedmpi: WARNING: careful", "fedmpi: ERROR: wrong"]),
        (3, {}, [], ["[r3] fedmpi: WARNING: careful", "[r3] fedmpi: ERROR: wrong"]),
        (3, {"quiet": True}, [], ["[r3] fedmpi: WARNING: careful", "[r3] fedmpi: ERROR: wrong"]),
        (
            3,
            {"verbose": True},
            ["[r3] detail", "[r3] news", "[r3] summary"],
            ["[r3] fedmpi: WARNING: careful", "[r3] fedmpi: ERROR: wrong"],
        ),
    ],
)
def test_who_says_what_where(
    rank: int, options: dict[str, bool], out: list[str], err: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging(rank, RunConfig(**options))
    set_up_logging(rank, RunConfig(**options))  # a second time prints nothing twice
    say_all()
    told = capsys.readouterr()
    assert told.out.splitlines() == out
    assert told.err.splitlines() == err


def test_without_options_rank_0_speaks_as_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong option leaves no configuration, and still has to be told."""
    set_up_logging(0, None)
    say_all()
    assert capsys.readouterr().out == "news\nsummary\n"


def test_other_packages_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0, RunConfig(verbose=True))
    logging.getLogger("somebody.else").info("not ours")
    assert capsys.readouterr().out == ""


def test_what_the_terminal_cannot_encode_is_escaped(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("logs") / "out"
    with path.open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        set_up_logging(0, RunConfig())
        logging.getLogger("fedmpi").info("%s", "Größe 5 µs")
    assert path.read_text(encoding="ascii") == "Gr\\xf6\\xdfe 5 \\xb5s\n"


def test_the_job_goes_on_when_nobody_reads_its_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mpirun ... | head -1`: the reader of standard output is gone after a line."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        set_up_logging(0, RunConfig())
        os.close(reading)
        for _ in range(3):
            say_all()
        stream.flush()
    assert capsys.readouterr().err.splitlines() == ["fedmpi: WARNING: careful", "fedmpi: ERROR: wrong"] * 3


@contextlib.contextmanager
def read_late() -> Iterator[Callable[[], list[str]]]:
    """Standard output is a pipe that nobody reads until what this yields is called, which returns the lines.

    No fixture: pytest sets sys.stdout again when a test begins.
    """
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def read() -> list[str]:
        text = b""
        for _ in range(200):
            finish_logging(0.0)
            try:
                text += os.read(reading, 2**20)
            except BlockingIOError:
                break
        return text.decode().splitlines()

    with os.fdopen(writing, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield read
    os.close(reading)


def test_a_log_that_nobody_reads_holds_nobody_and_is_whole_once_it_is_read() -> None:
    with read_late() as read:
        set_up_logging(0, RunConfig())
        for i in range(5000):
            logging.getLogger("fedmpi").info("%s %d", 95 * "x", i)
        assert [line.split()[1] for line in read()] == [str(i) for i in range(5000)]


def test_of_a_log_that_is_never_read_a_bounded_part_is_kept() -> None:
    with read_late() as read:
        set_up_logging(0, RunConfig())
        for i in range(300):
            logging.getLogger("fedmpi").info("%d %s", i, 10_000 * "x")
        *lines, last = read()
    assert 100 < len(lines) < 150
    assert last == f"({300 - len(lines)} lines of this log are missing: nobody read it)"


@pytest.mark.parametrize("what", ["full", "closed", "none"])
def test_a_log_that_cannot_be_written_is_told_once_and_the_job_goes_on(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="ascii") as stream:  # noqa: PTH123  # no path, a device
        monkeypatch.setattr(sys, "stdout", None if what == "none" else stream)
        set_up_logging(0, RunConfig())
        if what == "closed":
            stream.close()
        for _ in range(3):
            say_all()
    told = capsys.readouterr().err.splitlines()
    about = [line for line in told if "the log cannot be written" in line]
    assert len(about) == (what != "none")
    assert [line for line in told if line not in about] == ["fedmpi: WARNING: careful", "fedmpi: ERROR: wrong"] * 3


def test_where_neither_stream_can_be_written_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="ascii") as stream:  # noqa: PTH123  # as above
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        set_up_logging(0, RunConfig())
        say_all()
        finish_logging(0.0)
