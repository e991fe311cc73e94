"""A run in several jobs under Slurm: out of time, put back, resubmitted; and a sweep of runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import SCRIPT, SMALL, SlurmJob, ask, chain_from, in_one_piece, model_of


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
    assert "going on after round" in log
    assert model_of(log) == in_one_piece("--rounds", "2000")


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
