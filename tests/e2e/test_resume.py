"""Killed anywhere, gone on with on any number of ranks: the same model, the same history, nothing doubled or lost."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time

import pytest
import safetensors
import torch

from fedmpi.lifecycle.checkpoints import Checkpoints
from tests.e2e.conftest import SMALL

LONGER = [*SMALL, "--rounds", "6", "--checkpoint-every", "2"]
NEVER = [*SMALL, "--rounds", "100000"]

SERVER, TRAINER, ALL = "0", "1", "any"
POINTS = [
    # rank, where, which passage
    (SERVER, "/fedmpi.lifecycle.checkpoint:write_state", 3),
    (TRAINER, ">fedmpi.halves.visitor:ClientVisitor.visit", 4),
    # the rest with .ci/long
    (SERVER, ">fedmpi.report.run_folder:RunFolder.on_round", 5),
    (ALL, "<fedmpi.core.exchange:collect", 5),
    (SERVER, "<fedmpi.report.run_folder:RunFolder.on_end", 1),
    (ALL, "<fedmpi.core.exchange:bcast_order", 6),
    (ALL, "<fedmpi.core.exchange:SentVectors.bcast", 7),
    (ALL, ">fedmpi.mpi.comm:Comm.receive", 20),
    (ALL, ">fedmpi.core.exchange:SentVectors.bcast", 8),
    (TRAINER, "<fedmpi.halves.visitor:ClientVisitor.visit", 5),
    (TRAINER, ">fedmpi.engines.fused:FusedEngine.epoch", 3),
    (ALL, "<fedmpi.mpi.tree:gather_records", 8),
    (ALL, "<fedmpi.mpi.tree:sum_bins", 3),
    (ALL, ">fedmpi.core.exchange:collect", 7),
    (SERVER, "<fedmpi.halves.server:Server.step", 7),
    (SERVER, ">fedmpi.halves.server:Server.step", 7),
    (TRAINER, "<fedmpi.core.evaluate:Evaluator.evaluate", 3),
    (TRAINER, ">fedmpi.core.evaluate:Evaluator.evaluate", 3),
    (SERVER, "<fedmpi.report.history:History.on_round", 4),
    (SERVER, "/pathlib:Path.open", 12),
    (SERVER, "<fedmpi.lifecycle.checkpoints:Checkpoints.write", 3),
    (SERVER, "<os:fsync", 4),
    (SERVER, ">os:fsync", 5),
    (SERVER, "<pathlib:Path.replace", 3),
    (SERVER, ">pathlib:Path.replace", 3),
    (SERVER, ">pathlib:Path.replace", 1),
    (SERVER, "<pathlib:Path.unlink", 6),
    (SERVER, ">fedmpi.lifecycle.checkpoints:sync_folder", 2),
    (SERVER, ">fedmpi.lifecycle.checkpoints:Checkpoints._write", 3),
    (SERVER, ">fedmpi.report.run_folder:RunFolder.begin", 1),
    (SERVER, "/fedmpi.lifecycle.checkpoint:write_state", 1),
    (SERVER, ">fedmpi.report.run_folder:RunFolder.on_end", 1),
]


_whole: dict[tuple[str, ...], tuple[str, list[dict[str, object]]]] = {}


@pytest.fixture
def whole(job):
    """Model and history of a run in one piece, made once for all tests."""

    def whole(*options):
        if options not in _whole:
            result = job(2, *options, name="whole")
            assert result.code == 0, result.text
            _whole[options] = result.bits(), result.history()
        return _whole[options]

    return whole


@pytest.mark.parametrize(
    ("rank", "point", "nth"),
    [pytest.param(*each, marks=[pytest.mark.slow] if i >= 2 else [], id=each[1]) for i, each in enumerate(POINTS)],
)
def test_killed_at_a_point_and_gone_on_with(job, whole, tmp_path, rank, point, nth):
    dice = random.Random(f"{rank} {point} {nth}")
    num_ranks, then = dice.choice([2, 3, 4]), dice.choice([1, 2, 3, 5])
    rank = str(dice.randrange(num_ranks)) if rank == ALL else rank
    words = ("-m", "tests.e2e.killer", rank, point, str(nth))
    killed = job(num_ranks, *LONGER, "--run-dir", str(tmp_path / "run"), program=words)
    assert killed.code not in (0, 2, 3, 75), killed.text
    again = job(then, *LONGER)
    assert again.code == 0, again.text
    assert (again.bits(), again.history()) == whole(*LONGER)
    assert not list(again.run_dir.rglob("*.tmp"))


@pytest.mark.slow
def test_killed_again_and_again(start, job, whole):
    """At random times, on random ranks, from the first second on."""
    dice, options = random.Random(7), [*SMALL, "--rounds", "60", "--checkpoint-every", "1"]
    for _ in range(8):
        running = start(dice.choice([2, 3, 5]), *options)
        time.sleep(dice.uniform(1, 6))
        ranks = running.ranks()
        if ranks:
            os.kill(dice.choice(ranks), signal.SIGKILL)
        if running.end(60).code == 0:
            break
    last = job(3, *options)
    assert last.code == 0, last.text
    assert (last.bits(), last.history()) == whole(*options)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("SIGUSR1", "rank 2"),
        pytest.param("SIGUSR1", "launcher", marks=pytest.mark.slow),
        pytest.param("SIGTERM", "rank 0", marks=pytest.mark.slow),
        pytest.param("SIGINT", "rank 1", marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_between_rounds_with_75_and_loses_nothing(start, job, whole, name, target):
    running = start(3, *NEVER)
    running.wait_for_round(2)
    os.kill(running.process.pid if target == "launcher" else running.ranks()[int(target[-1])], signal.Signals[name])
    stopped = running.end(30)
    assert stopped.code == 75, stopped.text
    done = len(stopped.history())
    told = [line for line in stopped.err.splitlines() if name in line]
    assert len(told) == 1, stopped.text
    how = f"to go on, run the same command with --run-dir {stopped.run_dir}"
    assert told[0].endswith(f"stopping after round {done}; {how}")
    assert Checkpoints(stopped.run_dir / "checkpoint").load()["server"]["half"]["round_idx"] == done
    assert not running.ranks()
    options = [*SMALL, "--rounds", str(done + 1)]
    again = job(2, *options)
    assert again.code == 0, again.text
    assert (again.bits(), again.history()) == whole(*options)


def test_no_round_is_begun_that_would_not_end_before_max_seconds(job):
    begun = time.monotonic()
    stopped = job(2, *NEVER, "--max-seconds", "15")
    assert stopped.code == 75, stopped.text
    assert "are left of --max-seconds 15: stopping after round " in stopped.err
    assert 8 < time.monotonic() - begun < 25
    assert len(stopped.history()) > 2


def test_a_finished_run_goes_on_with_more_rounds_and_not_with_fewer(job, whole):
    first = job(1, *SMALL)
    before = first.rows()
    more = job(2, *SMALL, "--rounds", "5")
    assert more.code == 0, more.text
    elapsed = [row["timings"]["elapsed_s"] for row in more.rows()]
    assert elapsed == sorted(elapsed), "the time of the run goes on"
    assert more.rows()[:3] == before
    assert re.search(r"done: 2 rounds in [\d.]+ s \(5 in [\d.]+ s in all\), accuracy", more.out)
    assert (more.bits(), more.history()) == whole(*SMALL, "--rounds", "5")
    assert (first.run_dir / "model-round-3.pt").exists()
    fewer = job(1, *SMALL, "--rounds", "4")
    assert fewer.code == 0
    assert "has 5 rounds, --rounds asks for 4: nothing to do" in fewer.out
    assert more.bits() == fewer.bits()


def test_other_settings_are_refused_on_every_rank(job):
    job(1, *SMALL)
    refused = job(3, *SMALL, "--client-lr", "0.5")
    assert refused.code == 2, refused.text
    assert len(refused.errors) == 1
    assert "--client-lr 0.1, this one has 0.5: name another, or --resume never to start over" in refused.errors[0]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(job, whole):
    stopped = job(1, *LONGER, "--rounds", "4")
    newest = max((stopped.run_dir / "checkpoint").iterdir())
    content = newest.read_bytes()
    newest.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    again = job(2, *LONGER)
    assert again.code == 0, again.text
    assert again.err.count("does not match its checksum") == 1
    assert "going on from round-000002.ckpt" in again.err
    assert (again.bits(), again.history()) == whole(*LONGER)
    for path in (again.run_dir / "checkpoint").glob("*.ckpt"):
        path.write_bytes(b"")
    refused = job(3, *LONGER, "--rounds", "8")
    assert refused.code == 2
    assert len(refused.errors) == 1
    assert "no checkpoint in" in refused.errors[0]
    afresh = job(1, *LONGER, "--resume", "never")
    assert afresh.code == 0, afresh.text
    assert (afresh.bits(), afresh.history()) == whole(*LONGER)


def test_integer_buffers_are_restored_on_every_rank(job, tmp_path):
    """BatchNorm counts its batches; trainers begin a resumed run with a count of 0."""
    (tmp_path / "norm.py").write_text(
        "from torch import nn\n"
        "net = lambda shape, classes: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, classes))\n"
    )
    options = [*SMALL, "--model", "norm:net", "--rounds"]
    job(2, *options, "2")
    again = job(3, *options, "4")
    assert again.code == 0, again.text
    one_piece = job(1, *options, "4", name="whole")
    assert (again.bits(), again.history()) == (one_piece.bits(), one_piece.history())


SERVER_WITH_MOMENTUM = """
from fedmpi.fedavg import FedAvg

class Momentum(FedAvg):
    def round(self, s):
        mean = s.mean(s.sample(self.config.clients_per_round), self.client_update)
        velocity = s.state.get("velocity")
        s.state["velocity"] = mean.w.clone() if velocity is None else 0.9 * velocity + mean.w
        s.step("w", s.state["velocity"])
"""


def test_the_state_of_a_server_optimizer_is_restored(job, whole, tmp_path):
    (tmp_path / "momentum.py").write_text(SERVER_WITH_MOMENTUM)

    def train(num_ranks, name, rounds):
        options = [*SMALL, "--rounds", rounds, "--run-dir", str(tmp_path / name)]
        done = job(num_ranks, *options, program=("-m", "fedmpi", "momentum:Momentum"), name=name)
        assert done.code == 0, done.text
        return done

    one_piece = train(1, "one", "5")
    train(2, "two", "2")
    assert train(1, "two", "5").bits() == one_piece.bits()
    assert whole(*SMALL, "--rounds", "5")[0] != one_piece.bits(), "momentum makes a difference"


@pytest.mark.slow
def test_the_timeline_goes_on_over_the_lives_of_a_run(job):
    before = spans(job(2, *SMALL, "--timeline"))
    second = job(3, *SMALL, "--timeline", "--rounds", "4")
    assert second.code == 0, second.text
    after = spans(second)
    assert after[: len(before)] == before
    assert min(event["ts"] for event in after[len(before) :]) > max(event["ts"] for event in before)
    assert {event["tid"] for event in after[len(before) :]} == {0, 1, 2}


def spans(result):
    events = json.loads((result.run_dir / "timeline.json").read_text())["traceEvents"]
    return [event for event in events if event["ph"] == "X"]


OTHER_ALGORITHM = """
import dataclasses
from fedmpi.config import RunConfig
from fedmpi.fedavg import FedAvg
from fedmpi.options import option

@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    mu: float = option(0.1, "weight of the proximal term", "Federation", "[0, inf)")

class Prox(FedAvg):
    Config = Config
    def client_update(self, k):
        k.sgd(prox=self.config.mu)
"""


@pytest.mark.slow
def test_the_folder_of_another_algorithm_is_refused(job, tmp_path):
    (tmp_path / "prox.py").write_text(OTHER_ALGORITHM)
    folder = ["--run-dir", str(tmp_path / "run")]
    assert job(1, *SMALL, "--mu", "0.5", *folder, program=("-m", "fedmpi", "prox:Prox")).code == 0
    refused = job(2, *SMALL, *folder)
    assert refused.code == 2, refused.text
    assert len(refused.errors) == 1
    assert "algorithm prox:Prox, this one has fedmpi.fedavg:FedAvg" in refused.errors[0]


@pytest.mark.slow
def test_a_job_that_lost_its_folder_ends_with_2_and_writes_no_more(start, tmp_path):
    running = start(2, *NEVER)
    running.wait_for_round(2)
    claim = {"host": "other", "pid": 77, "machine": "x", "started": "1", "since": "now", "token": "theirs"}
    (tmp_path / "claim").write_text(json.dumps(claim))
    (tmp_path / "claim").replace(running.run_dir / ".lock")
    ended = running.end(60)
    assert ended.code == 2, ended.text
    assert "is in use by other pid 77 since now" in ended.err
    held = {path: path.stat().st_mtime_ns for path in running.run_dir.rglob("*")}
    time.sleep(1)
    assert {path: path.stat().st_mtime_ns for path in running.run_dir.rglob("*")} == held
    assert json.loads((running.run_dir / ".lock").read_text()) == claim


def test_model_and_checkpoints_hold_no_code(job):
    stopped = job(1, *SMALL)
    (newest,) = [path for path in (stopped.run_dir / "checkpoint").iterdir() if "000003" in path.name]
    with safetensors.safe_open(newest, "pt") as file:
        half = json.loads(file.metadata()["state"])["server"]["half"]
        vector = file.get_tensor(half["vector"]["tensor"])
    assert half["round_idx"] == 3
    assert (vector.dtype, vector.shape) == (torch.float32, (199_210,))
