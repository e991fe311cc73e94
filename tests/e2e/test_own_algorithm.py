"""`python -m fedmpi`: its list, a user's own class with its own options, and how mistakes in it end."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import SMALL

OWN = """
import dataclasses
import numpy as np
import torch
from fedmpi import Algorithm
from fedmpi.config import RunConfig
from fedmpi.options import option

@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    mu: float = option(0.1, "weight of the pull towards the server's model", "Federation", "[0, inf)")

class Own(Algorithm[Config]):
    Config = Config
    extra = {"m": ("T", "both"), "d": (5, "down"), "u": (2, "up")}
    def round(self, s):
        losses = s.ask(s.sample(10), self.measure)
        cohort = sorted(losses, key=lambda k: losses[k]["loss"])[:7]
        first, second = s.mean(cohort, self.gather, np.sqrt(1 + np.arange(7)), buckets=np.arange(7) % 2)
        s.model["m"].copy_(first["m"] - second["m"])
        s.model["d"].fill_(s.round_idx)
        mean = s.mean(cohort, self.client_update)
        s.step("w", mean.w)
        s.step("b", mean.b)
        s.state["m"] = 0.9 * s.state.get("m", 0) + mean["m"]
        s.step("m", s.state["m"])
    def measure(self, k):
        k.report(loss=k.evaluate().loss)
    def gather(self, k):
        k.back["m"].copy_(k.gradient(next(k.batches())))
    def client_update(self, k):
        k.sgd(prox=self.config.mu, drift=k.sent["m"])
        k.back["u"].copy_(k.sent["d"][:2] + torch.randn(2, generator=k.generator("u")))
        k.report(steps=k.num_samples)

class Setting(Own):
    def round(self, s):
        self.x = 1
        s.mean(s.sample(3), self.client_update)
    def client_update(self, k):
        k.sgd(lr=self.x)

class Holding(Own):
    def __init__(self, config):
        super().__init__(config)
        self.held = {}
    def round(self, s):
        self.held["lr"] = 0.1
        s.mean(s.sample(3), self.client_update)
    def client_update(self, k):
        k.sgd(lr=self.held["lr"])

class OfClass(Own):
    lr = 0.1
    def round(self, s):
        OfClass.lr = s.round_idx + 0.2
        s.step("w", s.mean(s.sample(3), self.client_update).w)
    def client_update(self, k):
        k.sgd(lr=self.lr)

class SettingInAVisit(Own):
    def client_update(self, k):
        self.x = k.id

class NoAlgorithm:
    Config = Config
    def round(self, s): ...

class NoConfig(Algorithm):
    Config = dict

def function(s): ...
"""

NORM = """
from torch import nn
net = lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Linear(8, classes))
"""


@pytest.fixture
def own(job, tmp_path):
    """`own(n, "mine:Own", *args)` runs an algorithm of the file mine.py."""
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "norm.py").write_text(NORM)

    def own(num_ranks, algorithm, *args, name="run", **options):
        folder = ("--run-dir", str(tmp_path / name))
        return job(num_ranks, algorithm, *SMALL, *folder, *args, program=("-m", "fedmpi"), name=name, **options)

    return own


def test_the_list(job):
    result = job(3, program=("-m", "fedmpi"))
    assert result.code == 0
    assert result.out.count("usage: mpirun -n 11 python -m fedmpi ALGORITHM [OPTION ...]") == 1
    assert "fedavg" in result.out
    assert "McMahan et al. 2017" in result.out
    assert not result.err


@pytest.mark.parametrize("word", ["fedsomething", "--dataset"])
def test_an_unknown_name_is_one_line(job, word):
    result = job(3, word, program=("-m", "fedmpi"))
    assert result.code == 2
    (line,) = result.errors
    assert f"no algorithm {word!r}; there are: fedavg" in line
    assert result.text.count("\n") == 1


@pytest.mark.parametrize("algorithm", ["mine:Own", "./mine.py:Own"])
def test_help_shows_its_own_options(own, algorithm):
    result = own(3, algorithm, "--help")
    assert result.code == 0, result.text
    assert result.out.count("usage:") == 1
    assert "--mu X" in result.out
    assert "weight of the pull towards the server's model (default: 0.1)" in result.out
    assert not result.err


def test_a_name_of_ours_is_the_module(job, tmp_path):
    args = [*SMALL, "--rounds", "1"]
    one = job(2, *args, name="one")
    two = job(3, "fedavg", *args, "--run-dir", str(tmp_path / "two"), program=("-m", "fedmpi"), name="two")
    assert (one.code, two.code) == (0, 0), two.text
    assert (one.bits(), one.history()) == (two.bits(), two.history())
    again = job(2, *args, name="two")
    assert "nothing to do" in again.out, "the same run"


def test_the_same_bits_on_any_ranks_and_by_its_file(own):
    """With `--model norm:net` integer buffers travel too."""
    ranks = [(1, "mine:Own"), (2, "./mine.py:Own"), (3, "mine:Own"), (5, "mine:Own")]
    results = [own(n, algorithm, "--model", "norm:net", "--mu", "0.5", name=f"on{n}") for n, algorithm in ranks]
    assert [result.code for result in results] == [0] * 4, "".join(result.text for result in results)
    assert len({result.bits() for result in results}) == 1
    assert all(result.history() == results[0].history() for result in results)
    assert {"loss", "steps"} <= set(results[0].rows()[0]["reported"])
    other = own(2, "mine:Own", "--model", "norm:net", name="other")
    assert other.bits() != results[0].bits(), "--mu takes effect"


def test_it_goes_on_after_a_stop_with_its_state(own):
    whole = own(2, "mine:Own", "--rounds", "4", name="whole")
    assert own(3, "mine:Own", "--rounds", "2").code == 0
    again = own(1, "mine:Own", "--rounds", "4")
    assert again.code == 0, again.text
    assert (again.bits(), again.history()) == (whole.bits(), whole.history())


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Setting", "Setting.x cannot be set: an algorithm is read-only"),
        ("Holding", "Holding has changed its 'held': an algorithm is read-only"),
        ("OfClass", "OfClass has changed its 'lr': an algorithm is read-only"),
        ("SettingInAVisit", "SettingInAVisit.x cannot be set: an algorithm is read-only"),
    ],
)
def test_what_other_ranks_would_not_know_is_refused_alike(own, name, said, num_ranks):
    result = own(num_ranks, f"mine:{name}")
    assert result.code == 2, result.text
    (line,) = [line for line in result.err.splitlines() if "read-only" in line]
    assert said in line
    assert "s.state" in line
    assert "Traceback" not in result.text
    assert result.history() == []


@pytest.mark.parametrize("more", [(), ("--help",)], ids=["run", "help"])
@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ("nowhere:Own", "algorithm nowhere:Own: there is no module 'nowhere' here or in PYTHONPATH"),
        ("./nowhere.py:Own", "there is no file "),
        ("mine:Other", "algorithm mine:Other: module 'mine' has no 'Other'"),
        ("mine:NoAlgorithm", "algorithm mine:NoAlgorithm must be a class derived from fedmpi.Algorithm, got a type"),
        ("mine:function", "algorithm mine:function must be a class derived from fedmpi.Algorithm, got a function"),
        ("mine:NoConfig", "algorithm mine:NoConfig: Config must be a class derived from RunConfig"),
        ("leaving:Own", "module 'leaving' calls sys.exit when it is imported"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(own, tmp_path, algorithm, said, more):
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    result = own(3, algorithm, *more)
    assert result.code == 2, result.text
    (line,) = result.errors
    assert said in line
    assert result.text.count("\n") == 1


@pytest.mark.parametrize("more", [(), ("--help",)], ids=["run", "help"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("raise ValueError('boom')", "ValueError: boom"),
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("class Own(:", "SyntaxError: invalid syntax"),
    ],
)
def test_a_crash_at_import_is_one_traceback_and_code_1(own, tmp_path, content, said, more):
    (tmp_path / "broken.py").write_text(content + "\n")
    result = own(3, "broken:Own", *more)
    assert result.code == 1, result.text
    assert result.text.count(said) == 1, result.text
    assert result.text.count("Traceback (most recent call last)") == 1, result.text
