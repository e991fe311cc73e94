"""One job under Slurm: how it is launched, what it is given, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import SMALL, ask, in_one_piece, model_of


@pytest.mark.slurm
def test_srun_and_mpirun_train_the_same_model(tmp_path: Path, submit: Any) -> None:
    for launcher in ("srun", "mpirun"):
        code, log = submit(*SMALL, "--run-dir", str(tmp_path / launcher), launcher=launcher).ended()
        assert code == 0, log
        banner = re.search(r"4 on \S+ \(2\), \S+ \(2\)", log)
        assert banner is not None, log
        assert "left of the time limit of Slurm job" in log
        assert model_of(log) == in_one_piece()


@pytest.mark.slurm
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_wrong_option_fails_the_job_with_2(submit: Any, launcher: str) -> None:
    job = submit(*SMALL, "--rounds", "0", launcher=launcher)
    code, log = job.ended()
    assert code == 2, log
    assert log.count("fedmpi: error:") == 1, log
    assert job.told()["Restarts"] == "0"


@pytest.mark.slurm
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_killed_rank_fails_the_job_with_1(tmp_path: Path, submit: Any, launcher: str) -> None:
    """The interpreter of one rank is made to kill itself while the others start or train."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, threading\n"
        "if os.environ.get('PMI_RANK', os.environ.get('PMIX_RANK')) == '1':\n"
        "    threading.Timer(8, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
    )
    job = submit(*SMALL, "--rounds", "100000", launcher=launcher, injected=tmp_path)
    code, log = job.ended()
    assert code == 1, log
    assert job.told()["Restarts"] == "0"


@pytest.mark.slurm
def test_a_diverged_run_fails_the_job_with_3(submit: Any) -> None:
    job = submit(*SMALL, "--client-lr", "1e30")
    code, log = job.ended()
    assert code == 3, log
    assert "not finite after training in round 0" in log
    assert (job.told()["JobState"], job.told()["Restarts"]) == ("FAILED", "0")


@pytest.mark.slurm
def test_a_finished_run_says_so(tmp_path: Path, submit: Any) -> None:
    options = [*SMALL, "--run-dir", str(tmp_path / "run")]
    assert submit(*options).ended()[0] == 0
    held = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    code, log = submit(*options).ended()
    assert code == 0, log
    assert "nothing to do" in log
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == held


@pytest.mark.slurm
def test_a_cancelled_job_stays_cancelled(tmp_path: Path, submit: Any) -> None:
    job = submit(*SMALL, "--rounds", "100000", "--run-dir", str(tmp_path / "run"))
    job.wait_for_round(5, tmp_path / "run")
    ask("scancel", job.number)
    job.wait_for("CANCELLED")
    time.sleep(8)  # KillWait, and what a requeue would take
    assert job.told()["JobState"] == "CANCELLED"
    assert job.told()["Restarts"] == "0"
    assert "stopping after round" in job.log
    again = submit(*SMALL, "--rounds", "8", "--run-dir", str(tmp_path / "run"))
    code, log = again.ended()
    assert code == 0, log
    assert "nothing to do" in log or "going on after round" in log


@pytest.mark.slurm
@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_alone_on_its_node_is_missed(tmp_path: Path, submit: Any, which: int) -> None:
    options = ["--rounds", "100000", "--stall-timeout", "3", "--run-dir", str(tmp_path / "run")]
    job = submit(*SMALL, *options, slurm=["--ntasks-per-node=1"])
    job.wait_for_round(30, tmp_path / "run")
    node = ask("scontrol", "show", "hostnames", job.told()["NodeList"]).split()[which]
    told = [line.split() for line in ask("scontrol", "listpids", f"{job.number}.0", node).splitlines()[1:]]
    for pid, *_ in told:
        os.kill(int(pid), signal.SIGSTOP)
    code, log = job.ended()
    assert code == 1, log
    assert re.search(
        rf"\[rank {1 - which}, host \S+, .*\] rank {which} of another host has not answered for \d+ s", log
    ), log


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("launcher", "option", "expected"),
    [
        ("srun", "--gpus-per-node=4", {"fed1 server", "fed1 0 of 4", "fed2 0 of 4", "fed2 1 of 4"}),
        ("srun", "--gpus-per-task=1", {"fed1 server", "fed1 0 of 1", "fed2 0 of 1"}),
        ("mpirun", "--gpus-per-node=4", {"fed1 server", "fed1 0 of 4", "fed2 0 of 4", "fed2 1 of 4"}),
        ("mpirun", "--gpus-per-task=1", {"fed1 server", "fed1 0 of 2", "fed2 0 of 2", "fed2 1 of 2"}),
    ],
)
def test_trainers_take_the_gpus_that_slurm_gives(
    tmp_path: Path, submit: Any, launcher: str, option: str, expected: set[str]
) -> None:
    """torch is told that it has the GPUs in CUDA_VISIBLE_DEVICES; what a trainer picks is noted, and the CPU used."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, socket, sys, threading, time\n"
        "def patch():\n"
        "    import fedmpi.machine.device as device\n"
        "    real = device.open_device\n"
        "    gpus = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')\n"
        "    device.visible_gpus = lambda: len(gpus)\n"
        "    def note(name, threads, *rest):\n"
        "        which = f'{name[-1]} of {len(gpus)}' if 'cuda' in name else 'server'\n"
        f"        with open({str(tmp_path / 'picked')!r}, 'a') as file:\n"
        "            file.write(f'{socket.gethostname()} {which}\\n')\n"
        "        return real('cpu', threads)\n"
        "    device.open_device = note\n"
        "if 'SLURM_PROCID' in os.environ and 'fedmpi.fedavg' in ' '.join(sys.orig_argv):\n"
        "    patch()\n"
    )
    code, log = submit(*SMALL, launcher=launcher, slurm=[option], injected=tmp_path).ended()
    assert code == 0, log
    picked = (tmp_path / "picked").read_text()
    for i, host in enumerate(sorted({line.split()[0] for line in picked.splitlines()})):
        picked = picked.replace(host, f"fed{i + 1}")
    assert set(picked.splitlines()) == expected
