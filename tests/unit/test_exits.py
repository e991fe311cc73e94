"""How a rank ends: which code, which words, and who says them."""

from __future__ import annotations

import os
import socket

import pytest

from fedmpi import errors
from fedmpi.errors import ConfigError, DivergedError, FedmpiError, LaunchError
from fedmpi.lifecycle.exits import abort_on_crash, say_error


class Aborted(BaseException):
    """Stands for the end that MPI_Abort brings."""


class Net:
    """As much of a `Comm` as an ending uses."""

    def __init__(self, rank: int = 2, activity: str = "client 7, round 3", over: bool = False) -> None:
        self.rank, self.activity, self.over = rank, activity, over
        self.is_server = rank == 0
        self.words: list[str] = []
        self.codes: list[int] = []
        self.left_with: int | None = None

    def last_words(self, message: str) -> None:
        self.words.append(message)

    def abort(self, exit_code: int) -> None:
        self.codes.append(exit_code)
        raise Aborted

    def leave(self, exit_code: int) -> int:
        self.left_with = exit_code
        return exit_code


def crash(net: Net, error: BaseException) -> None:
    with pytest.raises(Aborted), abort_on_crash(net):  # type: ignore[arg-type]
        raise error


WHERE = f"[rank 2, host {socket.gethostname()}, pid {os.getpid()}, client 7, round 3]"


def test_a_crash_is_told_with_its_traceback_and_place() -> None:
    net = Net()
    crash(net, ValueError("boom"))
    assert net.codes == [1]
    (words,) = net.words
    assert words.startswith(f"fedmpi: {WHERE} crashed\nTraceback (most recent call last):\n")
    assert words.endswith("ValueError: boom\n")
    assert words.count("Traceback") == 1


def test_without_an_activity_the_place_is_shorter() -> None:
    net = Net(activity="")
    crash(net, MemoryError())
    assert net.words[0].startswith(f"fedmpi: {WHERE.replace(', client 7, round 3', '')} crashed\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("--rounds is odd"), 2), (DivergedError("not finite"), 3), (LaunchError("alone"), 2)],
)
def test_an_error_of_one_rank_ends_all_without_a_traceback(error: FedmpiError, code: int) -> None:
    net = Net()
    crash(net, error)
    assert net.codes == [code]
    assert net.words == [f"fedmpi: {WHERE} {error}\n"]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_all_ranks_is_told_by_rank_0_and_each_leaves(rank: int, capfd: pytest.CaptureFixture[str]) -> None:
    net = Net(rank)
    error = ConfigError("--rounds must be odd,\n got 2")
    error.everywhere = True
    with pytest.raises(SystemExit) as caught, abort_on_crash(net):  # type: ignore[arg-type]
        raise error
    assert caught.value.code == net.left_with == 2
    assert net.codes == []
    assert net.words == []
    told = capfd.readouterr().err
    assert told == ("fedmpi: error: --rounds must be odd, got 2\n" if rank == 0 else "")


def test_ctrl_c_is_one_line() -> None:
    net = Net()
    crash(net, KeyboardInterrupt())
    assert net.codes == [130]
    assert net.words == [f"fedmpi: {WHERE} interrupted (Ctrl-C): what finished rounds wrote is kept\n"]


@pytest.mark.parametrize("code", [0, 5, None])
def test_sys_exit_in_mid_run_is_a_crash(code: int | None) -> None:
    """A launcher takes a rank that leaves with 0 for one that is done, and the others would wait for ever."""
    net = Net()
    crash(net, SystemExit(code))
    assert net.codes == [1]
    assert net.words == [f"fedmpi: {WHERE} left by sys.exit({code!r}) in mid-run\n"]


def test_sys_exit_after_the_end_is_the_users_own() -> None:
    net = Net(over=True)
    with pytest.raises(SystemExit) as caught, abort_on_crash(net):  # type: ignore[arg-type]
        raise SystemExit(5)
    assert caught.value.code == 5
    assert net.words == []


@pytest.mark.parametrize(("status", "code"), [(0, 1), (7, 7)])
def test_os_exit_in_mid_run_ends_the_job(status: int, code: int) -> None:
    net, real = Net(), os._exit
    with pytest.raises(Aborted), abort_on_crash(net):  # type: ignore[arg-type]
        os._exit(status)
    assert net.codes[0] == code
    assert net.words[0] == f"fedmpi: {WHERE} left by os._exit({status}) in mid-run\n"
    assert os._exit is real


def test_a_job_that_goes_well_says_nothing_and_puts_everything_back() -> None:
    net, real = Net(), os._exit
    with abort_on_crash(net):  # type: ignore[arg-type]
        assert os._exit is not real
    assert os._exit is real
    assert (net.words, net.codes, net.left_with) == ([], [], None)


def test_errors_are_one_line_whatever_the_terminal_can_show(capfd: pytest.CaptureFixture[str]) -> None:
    say_error("two\nlines,  Größe")
    assert capfd.readouterr().err == "fedmpi: error: two lines, Größe\n"
    say_error("half a \udc80 name")
    assert capfd.readouterr().err == "fedmpi: error: half a \\udc80 name\n"


def test_exit_codes() -> None:
    """What README promises to scripts."""
    assert (errors.EXIT_DONE, errors.EXIT_CRASH, errors.EXIT_MISTAKE, errors.EXIT_DIVERGED) == (0, 1, 2, 3)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FedmpiError)]
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    assert codes.pop("DivergedError") == 3
    assert codes.pop("PeerLostError") == 1
    assert set(codes.values()) == {2}
