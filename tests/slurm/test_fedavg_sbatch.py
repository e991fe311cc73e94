"""slurm/fedavg.sbatch: its refusals anywhere; its jobs, marked slurm, on whatever Slurm `sinfo` answers for.

The jobs need two nodes and a temporary folder that all nodes see (pytest --basetemp=...).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "fedavg.sbatch"
LAUNCHERS = ("SLURM_", "PMI", "OMPI_COMM")  # what they leave in an environment
SMALL = ["--dataset", "synthetic", "--model", "2nn", "--num-clients", "20", "--rounds", "3"]


def by_hand(tmp_path: Path, **environ: str) -> tuple[int, str]:
    """The script run by bash, with nothing on the PATH but what the test puts into `tmp_path`."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    done = subprocess.run(
        [bash, str(SCRIPT)], env={"PATH": str(tmp_path)} | environ, cwd=tmp_path, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def program(folder: Path, name: str, body: str = "exit 1") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_missing_launcher_is_one_line(tmp_path: Path, launcher: str) -> None:
    code, text = by_hand(tmp_path, LAUNCHER=launcher, SLURM_JOB_ID="1")
    assert (code, text.count("\n")) == (2, 1)
    assert f"no {launcher} on the PATH" in text


def test_an_unknown_launcher_is_one_line(tmp_path: Path) -> None:
    assert by_hand(tmp_path, LAUNCHER="prun") == (2, "fedavg.sbatch: LAUNCHER must be srun or mpirun, got 'prun'\n")


def test_outside_a_job_is_one_line(tmp_path: Path) -> None:
    program(tmp_path, "srun")
    code, text = by_hand(tmp_path)
    assert (code, text.count("\n")) == (2, 1)
    assert "this is no Slurm job: sbatch slurm/fedavg.sbatch" in text


def test_a_missing_python_or_package_is_one_line(tmp_path: Path) -> None:
    program(tmp_path, "srun")
    code, text = by_hand(tmp_path, SLURM_JOB_ID="1")
    assert (code, text.count("\n")) == (2, 1)
    assert "no python on the PATH" in text
    program(tmp_path, "python")
    code, text = by_hand(tmp_path, SLURM_JOB_ID="1")
    assert (code, text.count("\n")) == (2, 1)
    assert f"{tmp_path / 'python'} has no fedmpi" in text


@pytest.mark.parametrize(("reported", "expected"), [(0, 0), (2, 2), (3, 3), (75, 75), (14, 1), (137, 1), (143, 1)])
def test_the_exit_code_is_fedmpis(tmp_path: Path, reported: int, expected: int) -> None:
    program(tmp_path, "python", "exit 0")
    program(tmp_path, "mpirun", f'printf "%s\\n" "$*"; exit {reported}')
    code, text = by_hand(tmp_path, LAUNCHER="mpirun", SLURM_JOB_ID="1", SLURM_NTASKS="12", ON_STOP="nothing")
    last = (
        "fedavg.sbatch: no round was finished in this job: not going on; give it more --time (or fewer clients a round)"
    )
    assert code == expected
    assert text.splitlines() == [
        "-n 12 python -m fedmpi.fedavg --run-dir runs/fedavg-1",
        *[last] * (expected == 75),
    ]


@dataclasses.dataclass
class SlurmJob:
    """A job of two ranks on each of two nodes."""

    number: str
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def told(self) -> dict[str, str]:
        """What Slurm knows of it."""
        text = ask("scontrol", "-o", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_for(self, *states: str, limit_s: float = 300) -> dict[str, str]:
        """Until it is in one of these states."""
        end = time.monotonic() + limit_s
        while (told := self.told())["JobState"] not in states:  # `sbatch --wait` asks ever more rarely
            assert time.monotonic() < end, f"not {states} but {told['JobState']}: {self.log}"
            time.sleep(0.5)
        return told

    def wait_for_round(self, number: int, run_dir: Path) -> None:
        """Until the history holds so many rounds."""
        history = run_dir / "history.jsonl"
        while not history.exists() or len(history.read_text().splitlines()) < number:
            assert self.told()["JobState"] in ("PENDING", "RUNNING"), self.log
            time.sleep(0.2)

    def ended(self, limit_s: float = 300) -> tuple[int, str]:
        """Its exit code and its log, once it is over; fails if a signal ended the batch script."""
        told = self.wait_for("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", limit_s=limit_s)
        code, signal_number = told["ExitCode"].split(":")
        assert signal_number == "0", told
        return int(code), self.log


def chain_from(job: SlurmJob, name: str, task: str = "") -> list[tuple[int, str]]:
    """Exit codes and logs of `job` and of those that went on where it stopped.

    `name`: of the jobs; `task`: "_1" in an array.
    """
    chain = [job.ended(limit_s=900)]  # a requeued job is held for two minutes
    while found := re.search(r"going on in job (\d+), leg \d", chain[-1][1]):
        number = found[1] + task
        chain.append(SlurmJob(number, job.log_file.with_name(f"{name}-{number}.log")).ended())
    return chain


def ask(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[..., SlurmJob]]:
    """`submit(*options, launcher=..., slurm=[...], ...)` submits fedavg.sbatch; what is left over is cancelled."""
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True, timeout=20).returncode != 0:
        pytest.skip("no Slurm answers here")
    jobs: list[SlurmJob] = []

    def submit(
        *options: str,
        launcher: str = "srun",
        slurm: Sequence[str] = (),
        injected: Path | None = None,
        script: Path = SCRIPT,
        **variables: str,
    ) -> SlurmJob:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        if "SLURM_CONF" in os.environ:
            environ["SLURM_CONF"] = os.environ["SLURM_CONF"]
        environ |= {
            "LAUNCHER": launcher,
            "VENV": str(tmp_path),  # none: the PATH has the Python of this test
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{injected}:{ROOT}" if injected else str(ROOT),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            **variables,
        }
        log = tmp_path / f"job-{len(jobs)}.log"
        command = ["sbatch", "--parsable", "--ntasks-per-node=2", f"--output={log}", *slurm, str(script), *options]
        done = subprocess.run(command, env=environ, cwd=tmp_path, check=True, capture_output=True, text=True)
        jobs.append(SlurmJob(done.stdout.strip(), log))
        return jobs[-1]

    yield submit
    for job in jobs:
        subprocess.run(["scancel", job.number], capture_output=True)


MODEL = """
import os, time
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)
    def forward(self, x):
        time.sleep(float(os.environ.get("TRAINING_S" if self.training else "EVALUATION_S", 0)))
        return self.layer(x.flatten(1))
net = lambda shape, classes: Net()
"""


@pytest.fixture
def sleepy(tmp_path: Path) -> Path:
    """A folder with sleepy.py, whose model takes TRAINING_S for a step and EVALUATION_S for a chunk of the test set."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sleepy.py").write_text(MODEL)
    return tmp_path / "model"


@functools.cache
def in_one_piece(*options: str, injected: Path | None = None) -> str:
    """Hash of the model of a run that nothing interrupts."""
    with tempfile.TemporaryDirectory() as folder:
        out = subprocess.run(
            [sys.executable, "-m", "fedmpi.fedavg", *SMALL, *options, "--run-dir", folder, "--quiet"],
            env={name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
            | {"PYTHONPATH": f"{injected}:{ROOT}" if injected else str(ROOT)},
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    return model_of(out)


def model_of(log: str) -> str:
    return re.findall(r"done: .* model ([0-9a-f]{16})", log)[-1]


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
    assert "is not finite" in log
    assert (job.told()["JobState"], job.told()["Restarts"]) == ("FAILED", "0")


@pytest.mark.slurm
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_job_out_of_time_comes_back_until_all_rounds_are_done(
    tmp_path: Path, submit: Any, sleepy: Path, launcher: str
) -> None:
    """A minute a leg, and no signal before its end: it is fedmpi that asks Slurm for the time that is left."""
    options = ["--rounds", "110", "--cohort-size", "7", "--model", "sleepy:net"]
    job = submit(
        *SMALL, *options, "--run-dir", str(tmp_path / "run"), launcher=launcher, injected=sleepy, EVALUATION_S="0.3",
        slurm=["--time=1", "--signal=B:USR1@0"],
    )  # fmt: skip
    code, log = job.ended(limit_s=900)
    assert code == 0, log
    assert int(job.told()["Restarts"]) >= 1
    assert re.search(r"left of the time limit of Slurm job \d+: stopping after round \d+", log), log
    assert "requeued, leg 2" in log
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 110
    assert model_of(log) == in_one_piece(*options, injected=sleepy)


@pytest.mark.slurm
@pytest.mark.parametrize("signal_option", ["USR1@10", "B:USR1@10"])
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_slurms_warning_reaches_the_ranks(submit: Any, launcher: str, signal_option: str) -> None:
    job = submit(
        *SMALL, "--rounds", "100000", launcher=launcher, slurm=["--time=1", f"--signal={signal_option}"],
        ON_STOP="nothing",
    )  # fmt: skip
    code, log = job.ended()
    assert code == 75, log
    assert re.search(r"SIGUSR1( on rank \d)?: stopping after round [1-9]", log), log


@pytest.mark.slurm
def test_requeued_in_mid_run_it_goes_on(tmp_path: Path, submit: Any) -> None:
    job = submit(*SMALL, "--rounds", "400", "--checkpoint-every", "10", "--run-dir", str(tmp_path / "run"))
    job.wait_for_round(30, tmp_path / "run")
    ask("scontrol", "requeue", job.number)
    code, log = job.ended()
    assert code == 0, log
    assert job.told()["Restarts"] == "1"
    assert "going on after round" in log
    assert model_of(log) == in_one_piece("--rounds", "400")


@pytest.mark.slurm
@pytest.mark.timeout(1200)
def test_where_requeueing_is_forbidden_a_chain_of_jobs_does(tmp_path: Path, submit: Any) -> None:
    options = [*SMALL, "--rounds", "100000", "--max-seconds", "40", "--run-dir", str(tmp_path / "run")]
    job = submit(*options, ON_STOP="resubmit", MAX_LEGS="3")
    limit = job.told()["TimeLimit"]
    codes, logs = zip(*chain_from(job, "fedavg"), strict=True)
    assert codes == (75, 75, 75), logs[-1]
    assert "this was job 3 of at most 3 (MAX_LEGS)" in logs[-1]
    assert "going on after round" in logs[-1]
    last = logs[-2].rpartition("going on in job ")[2].partition(",")[0]
    assert SlurmJob(last, job.log_file).told()["TimeLimit"] == limit


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
def test_a_finished_run_says_so(tmp_path: Path, submit: Any) -> None:
    options = [*SMALL, "--run-dir", str(tmp_path / "run")]
    assert submit(*options).ended()[0] == 0
    held = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    code, log = submit(*options).ended()
    assert code == 0, log
    assert "nothing to do" in log
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == held


@pytest.mark.slurm
def test_a_time_too_short_for_a_round_is_not_tried_for_ever(submit: Any, sleepy: Path) -> None:
    options = ["--model", "sleepy:net", "--local-epochs", "30", "--max-seconds", "60"]
    job = submit(*SMALL, *options, injected=sleepy, TRAINING_S="1")
    code, log = job.ended()
    assert code == 75, log
    assert "not one round fits: a round takes longer, more than" in log
    assert "no round was finished in this job: not going on" in log
    assert job.told()["Restarts"] == "0"


@pytest.mark.slurm
@pytest.mark.timeout(1200)
def test_a_lost_node_puts_the_job_back(tmp_path: Path, submit: Any) -> None:
    job = submit(*SMALL, "--rounds", "300", "--checkpoint-every", "10", "--run-dir", str(tmp_path / "run"))
    job.wait_for_round(30, tmp_path / "run")
    node = ask("scontrol", "show", "hostnames", job.told()["NodeList"]).split()[-1]
    ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    time.sleep(3)
    while "DOWN" in ask("scontrol", "show", "node", node):  # until its last processes are gone, Slurm says no
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True)
        time.sleep(1)
    code, log = job.ended()
    assert code == 0, log
    assert "going on after round" in log
    assert model_of(log) == in_one_piece("--rounds", "300")


@pytest.mark.slurm
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_node_daemon_puts_the_job_back(tmp_path: Path, submit: Any, which: int) -> None:
    """The ranks of its node live on, and nobody can tell them to end; the first node has the server and the script."""
    if "FEDMPI_TEST_SLURMD_PIDS" not in os.environ:
        pytest.skip("this Slurm is not ours: .ci/slurm starts one whose daemons come back")
    job = submit(*SMALL, "--rounds", "2000", "--checkpoint-every", "10", "--run-dir", str(tmp_path / "run"))
    job.wait_for_round(30, tmp_path / "run")
    node = ask("scontrol", "show", "hostnames", job.told()["NodeList"]).split()[which]
    os.kill(int(Path(os.environ["FEDMPI_TEST_SLURMD_PIDS"], f"{node}.pid").read_text()), signal.SIGKILL)
    code, log = job.ended(limit_s=500)
    assert code == 0, log
    assert model_of(log) == in_one_piece("--rounds", "2000")


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
def test_a_sweep_runs_each_line_once(tmp_path: Path, submit: Any) -> None:
    (tmp_path / "grid.txt").write_text("--seed 0  # first\n\n# nothing\n--seed 1 --client-lr 0.05\n")
    variables = {"FEDAVG": str(SCRIPT), "SWEEP_DIR": str(tmp_path / "sweep")}
    script, array = SCRIPT.with_name("sweep.sbatch"), ["--array=1-2%1", f"--output={tmp_path}/sweep-%a.log"]
    for expected in ("done: 3 rounds", "is finished: nothing to do"):
        job = submit("grid.txt", *SMALL, script=script, slurm=array, **variables)
        for task in (1, 2):
            number = f"{job.number}_{task}"
            code, log = SlurmJob(number, tmp_path / f"sweep-{task}.log").ended()
            assert code == 0, log
            assert expected in log
    assert len(list((tmp_path / "sweep").iterdir())) == 2
    assert len(set((tmp_path / "sweep").glob("*/model.pt"))) == 2
    code, log = submit("grid.txt", script=script, slurm=["--array=3"], **variables).ended()
    assert (code, log) == (2, "sweep.sbatch: grid.txt has no line 3\n")


@pytest.mark.slurm
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("on_stop", ["requeue", "resubmit"])
def test_a_task_of_a_sweep_that_runs_out_of_time_goes_on(
    tmp_path: Path, submit: Any, sleepy: Path, on_stop: str
) -> None:
    (tmp_path / "grid.txt").write_text("--seed 1\n--seed 2\n")
    options = ["--model", "sleepy:net", "--rounds", "15", "--max-seconds", "30", "--checkpoint-every", "1"]
    job = submit(
        "grid.txt", *SMALL, *options, script=SCRIPT.with_name("sweep.sbatch"), injected=sleepy, EVALUATION_S="0.5",
        slurm=["--array=2", f"--output={tmp_path}/sweep-%a.log", "--time=5"],
        FEDAVG=str(SCRIPT), SWEEP_DIR=str(tmp_path / "sweep"), ON_STOP=on_stop,
    )  # fmt: skip
    first = SlurmJob(f"{job.number}_2", tmp_path / "sweep-2.log")
    code, log = chain_from(first, "sweep", "_2")[-1]
    assert code == 0, log
    assert "stopping after round" in first.log
    assert model_of(log) == in_one_piece(*options[:4], "--seed", "2", injected=sleepy)


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--gpus-per-node=4"], {("fed1", "server"), ("fed1", "0 of 4"), ("fed2", "0 of 4"), ("fed2", "1 of 4")}),
        (["--gpus-per-task=1"], {("fed1", "server"), ("fed1", "0 of 1"), ("fed2", "0 of 1")}),
    ],
)
def test_trainers_take_the_gpus_that_slurm_gives(
    tmp_path: Path, submit: Any, options: list[str], expected: set[tuple[str, str]]
) -> None:
    """torch is told that it has the GPUs in CUDA_VISIBLE_DEVICES; what a trainer picks is noted, and the CPU used."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, socket, sys, threading, time\n"
        "def patch():\n"
        "    import fedmpi.core.device as device\n"
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
    code, log = submit(*SMALL, slurm=options, injected=tmp_path).ended()
    assert code == 0, log
    picked = {tuple(line.split(" ", 1)) for line in (tmp_path / "picked").read_text().splitlines()}
    hosts = sorted({host for host, _ in picked})
    names = {f"fed{i + 1}": host for i, host in enumerate(hosts)}
    assert picked == {(names[host], what) for host, what in expected}
