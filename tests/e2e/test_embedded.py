"""`fedmpi.run` inside another program: it raises, it returns, and it leaves the program as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import clean_environment, mpiexec

SMALL = "dataset='synthetic', model='2nn', num_clients=20, cohort_size=7, rounds=3"

PROGRAM = f"""
import itertools, logging, os, random, signal, sys, threading, time
import numpy as np, torch
import fedmpi
from fedmpi.errors import ConfigError, DivergedError, LaunchError

def settings():
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
    root = logging.getLogger("fedmpi")
    return ([signal.getsignal(n) for n in numbers], root.level, root.propagate, list(root.handlers), os._exit,
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())

def raised(**options):
    try:
        fedmpi.run(**options)
    except Exception as error:
        return error
    raise AssertionError(options)

pending, calls = [], None  # no attributes: those of a model are put back before each client

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(784, 10)
    def forward(self, x):
        raise ValueError("boom")

class Signals(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(784, 10)
    def forward(self, x):
        if pending and next(calls) == 50:  # of 70 steps in round 0
            os.kill(os.getpid(), pending.pop())
        return self.layer(x.flatten(1))

def broken(shape, classes):
    return Net()
def signalling(shape, classes):
    return Signals()

torch.set_num_threads(2)
torch.set_default_dtype(torch.float64)
before = settings()
small = dict({SMALL})
"""

RAISES = """
assert isinstance(raised(rounds="many"), ConfigError)
assert str(raised(rounds=0)).startswith("--rounds must be an integer in [1, inf), got 0")
assert "roundz" in str(raised(roundz=3))
assert isinstance(raised(algorithm="fedsomething"), ConfigError)
assert isinstance(raised(**small, client_lr=1e30, run_dir="a"), DivergedError)
error = raised(**small | dict(model="__main__:broken", run_dir="b"))
assert (type(error), str(error)) == (ValueError, "boom"), repr(error)
assert settings() == before
with torch.no_grad():
    one = fedmpi.run(**small | dict(rounds=np.int64(3)), run_dir=__import__("pathlib").Path("c"))
assert (one.exit_code, len(one.history), (one.folder / "model.pt").exists()) == (0, 3, True)
assert one.history[2]["accuracy"] > 0.2
assert fedmpi.run(**small, run_dir="c") == one, "nothing was left to do"
again = fedmpi.run("fedavg", config="c/config.yaml", run_dir="d")
assert again.model_hash == one.model_hash
stopped = fedmpi.run(**small | dict(rounds=10**6), max_seconds=2, run_dir="e")
assert stopped.exit_code == 75
assert settings() == before
print("hash", one.model_hash)
"""

THREAD = """
done = []
def work():
    done.append(fedmpi.run(**small | dict(rounds=100000), max_seconds=3, run_dir="a"))
thread = threading.Thread(target=work)
thread.start()
time.sleep(1)
assert isinstance(raised(**small), LaunchError), "one at a time"
thread.join()
assert done[0].exit_code == 75
assert settings()[:5] == before[:5]
work()
"""

INTERRUPT = """
for number in (signal.SIGINT, signal.SIGTERM):
    taken = []
    handler = signal.signal(number, lambda n, frame: taken.append(n))
    pending, calls = [number], itertools.count()
    done = fedmpi.run(**small | dict(model="__main__:signalling", rounds=100000), run_dir=f"run{number}")
    assert (taken, done.exit_code) == ([number], 75), (taken, done)
    assert 1 <= len(done.history) <= 2
    signal.signal(number, handler)
pending, calls = [signal.SIGINT], itertools.count()
try:
    fedmpi.run(**small | dict(model="__main__:signalling"), run_dir="again")
except KeyboardInterrupt:
    assert len(open("again/history.jsonl").readlines()) == 1
else:
    raise AssertionError("Ctrl-C")
assert settings() == before
"""

SEVERAL = """
error = raised(rounds=0)
assert isinstance(error, ConfigError), error
assert isinstance(raised(**small, client_lr=1e30, run_dir="a"), DivergedError)
one = fedmpi.run(**small, run_dir="b")
assert (one.exit_code, len(one.history)) == (0, 3)
print(f"hash {one.model_hash}\\n", end="")  # in one write: ranks share a pipe
"""


def ran(folder: Path, body: str, num_ranks: int = 0) -> str:
    (folder / "program.py").write_text(
        PROGRAM + 'if __name__ == "__main__":\n    ' + body.strip().replace("\n", "\n    ")
    )
    launcher = [mpiexec(), "-n", str(num_ranks)] if num_ranks else []
    command = [*launcher, sys.executable, "-W", "error", "program.py"]
    environ = clean_environment({"FEDMPI_DATA": str(folder / "data"), "PYTHONPATH": str(folder)})
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=110, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_raises_returns_and_leaves_the_program_as_it_was(tmp_path: Path) -> None:
    ran(tmp_path, RAISES)


@pytest.mark.slow
@pytest.mark.parametrize("body", [THREAD, INTERRUPT])
def test_in_a_thread_and_with_signals(tmp_path: Path, body: str) -> None:
    ran(tmp_path, body)


@pytest.mark.slow
def test_on_several_ranks_all_call_it_alike_and_get_the_bits_of_one(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    alone = ran(tmp_path / "one", SEVERAL)
    three = ran(tmp_path / "three", SEVERAL, num_ranks=3)
    hashes = [line for line in (alone + three).splitlines() if line.startswith("hash ")]
    assert len(hashes) == 4
    assert len(set(hashes)) == 1
