"""Each algorithm ends with the same bits on any number of ranks, and after a kill and a resume on others."""

from __future__ import annotations

import os
import signal

import pytest

from fedmpi.algorithms import ALGORITHMS
from tests.e2e.conftest import SMALL

OPTIONS = {
    "fedprox": "--mu 0.5 --local-epochs 2",
    "fedadam": "--server-lr 0.02 --beta1 0.8",
    "trimmed_mean": "--trimmed-share 0.2",
    "power_of_choice": "--candidates 12 --partition dirichlet --alpha 0.3",
    "per_fedavg": "--inner-lr 0.05 --hessian-delta 0.01 --batch-size 50",
    "mime_lite": "--server-momentum 0.8 --partition shards",
}
STATISTICS = """
from torch import nn

def net(input_shape, num_classes):
    return nn.Sequential(nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
                         nn.Dropout(0.2), nn.Linear(144, num_classes))
"""


@pytest.fixture
def run(job, tmp_path):
    """`run(name, num_ranks, *options)` runs an algorithm in a folder of its own, or in `folder`."""

    def run(name, num_ranks, *options, folder=None, module=False):
        folder = tmp_path / (folder or f"{name}-{num_ranks}")
        program = ("-m", f"fedmpi.algorithms.{name}") if module else ("-m", "fedmpi", name)
        result = job(num_ranks, *SMALL, *options, "--run-dir", str(folder), program=program, name=folder.name)
        assert result.code == 0, result.text
        return result

    return run


def test_each_algorithm_is_in_the_tables_below():
    assert set(OPTIONS) == set(ALGORITHMS) - {"fedavg"}


@pytest.mark.parametrize("name", OPTIONS)
def test_same_bits_on_one_rank_and_on_three(run, name):
    """Started by its name and by its module."""
    alone, three = run(name, 1, *OPTIONS[name].split()), run(name, 3, *OPTIONS[name].split(), module=True)
    assert alone.bits() == three.bits()
    assert alone.history() == three.history()
    assert all(row["train_loss"] is not None for row in alone.rows())


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_same_bits_on_two_and_five_ranks(run, name):
    results = [run(name, num_ranks, *OPTIONS[name].split()) for num_ranks in (1, 2, 5)]
    assert len({result.bits() for result in results}) == 1
    assert results[0].history() == results[1].history() == results[2].history()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_same_bits_with_statistics_and_dropout(run, name, tmp_path):
    (tmp_path / "statistics_net.py").write_text(STATISTICS)
    results = [run(name, n, *OPTIONS[name].split(), "--model", "statistics_net:net") for n in (1, 3)]
    assert results[0].bits() == results[1].bits()
    assert results[0].history() == results[1].history()


@pytest.mark.parametrize("name", [n if n == "fedadam" else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS])
def test_same_bits_after_a_kill_on_other_ranks(start, run, name, tmp_path):
    options = [*OPTIONS[name].split(), "--checkpoint-every", "1"]
    folder = tmp_path / "killed"
    words = [*SMALL, *options, "--rounds", "100000", "--run-dir", str(folder)]
    running = start(3, *words, program=("-m", "fedmpi", name), name="killed")
    running.wait_for_round(3)
    os.kill(running.ranks()[1], signal.SIGKILL)
    assert running.end(60).code != 0
    rounds = str(len((folder / "history.jsonl").read_text().splitlines()) + 2)
    resumed = run(name, 2, *options, "--rounds", rounds, folder="killed")
    whole = run(name, 1, *options, "--rounds", rounds)
    assert resumed.bits() == whole.bits()
    assert resumed.history() == whole.history()


def test_an_algorithms_own_mistakes_cost_one_line(job):
    wrong = job(3, *SMALL, "--candidates", "3", program=("-m", "fedmpi", "power_of_choice"))
    assert wrong.code == 2
    assert [line.partition("error: ")[2] for line in wrong.errors] == [
        "--candidates must be in [7, 20] (clients per round to --num-clients), got 3"
    ]
