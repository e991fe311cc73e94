"""Ctrl-C before the rounds: what raises, and what a library makes of it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import pytest

from fedmpi import interrupt


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_it_raises_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), interrupt.Raising():
        press()


def swallow() -> None:
    with contextlib.suppress(BaseException):  # as libraries do at their import
        press()


def replace() -> None:
    try:
        press()
    except BaseException as error:  # as above
        raise ImportError("cannot import the C extension") from error


@pytest.mark.parametrize("library", [swallow, replace])
def test_what_a_library_swallows_or_replaces_is_an_interrupt_all_the_same(library) -> None:
    with pytest.raises(KeyboardInterrupt), interrupt.Raising():
        library()


def test_without_one_nothing_is_raised_and_errors_pass() -> None:
    with interrupt.Raising():
        pass
    with pytest.raises(ImportError), interrupt.Raising():
        raise ImportError


@pytest.mark.parametrize(
    ("argv", "words", "own"),
    [
        (["-m", "--rounds", "3"], ["python", "-W", "error", "-m", "fedmpi.fedavg", "--rounds", "3"], True),
        (["-m"], ["python", "-mfedmpi"], True),
        (["-m", "-m"], ["python", "-m", "fedmpi.data.prepare", "-m"], True),
        (["-m", "fedmpi"], ["python", "-m", "pytest", "fedmpi"], False),
        (["-m"], ["python", "-m", "fedmpix.tool"], False),
        (["script.py", "-m", "fedmpi"], ["python", "script.py", "-m", "fedmpi"], False),
        (["-c"], ["python", "-c", "import fedmpi"], False),
        ([], [], False),
    ],
)
def test_only_our_own_programs_take_ctrl_c_at_import(
    argv: list[str], words: list[str], own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", words)
    assert interrupt.is_own_program() is own
