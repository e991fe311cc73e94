"""Models and algorithms that are not like ours: the same bits on any number of ranks, or one line."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODELS = """
import math, random
import numpy as np, torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.layer = nn.Linear(math.prod(shape), classes)
    def forward(self, x):
        return self.layer(x.flatten(1))

class Counting(Net):
    calls = 0
    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + 0.01 * self.calls)

class OfClass(Net):
    seen = []
    def forward(self, x):
        self.seen.append(len(x))
        return super().forward(x) * (1 + 0.001 * len(self.seen))

class Drawing(Net):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.rng, self.other = np.random.default_rng(0), torch.Generator().manual_seed(0)
    def forward(self, x):
        noise = torch.rand(x.shape, generator=self.other) * self.rng.uniform()
        return super().forward(x + noise + 0.1 * random.random())

class Hidden(Net):
    state = None
    def forward(self, x):
        out = super().forward(x)
        self.state = out if self.state is None else out * (1 + self.state.detach().mean())
        return self.state

class Masked(Net):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.norm = nn.BatchNorm1d(classes)
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
    def forward(self, x):
        return self.norm(super().forward(x))

class Keeping(Net):
    def forward(self, x):
        self.activation = super().forward(x)
        return self.activation
"""

ALGORITHMS = """
from fedmpi.fedavg import FedAvg

class Kept(FedAvg):
    kept = {}
    def client_update(self, k):
        k.sgd(self.kept.get(k.id))
        self.kept[k.id] = k.back.w.clone()

class Clients(FedAvg):
    def client_update(self, k):
        k.sgd()
        if k.round_idx == 2 and k.id % 2:
            k.back.w[5] = float("nan")

class Server(FedAvg):
    def round(self, s):
        super().round(s)
        if s.round_idx == 1:
            s.model.w[7] = float("inf")
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "odd.py").write_text(MODELS)
    (tmp_path / "mine.py").write_text(ALGORITHMS)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("model", ["Counting", "OfClass", "Drawing", "Hidden", "Masked", "Keeping"])
def test_the_same_bits_on_any_ranks(job, model):
    results = [job(n, *SMALL, "--model", f"odd:{model}", "--server-lr", "1.5", name=f"on{n}") for n in (1, 2, 3)]
    assert [result.code for result in results] == [0, 0, 0], results[0].text
    assert len({result.bits() for result in results}) == 1
    assert results[0].history() == results[1].history() == results[2].history()
    named = {"Counting": "'calls'", "OfClass": "'seen'", "Drawing": "'rng'"}.get(model)
    assert ("put back before each client" in results[2].out) == (named is not None), results[2].out
    assert named is None or f"model: training changes {named}" in results[2].out


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_an_algorithm_that_keeps_something_by_client(job, num_ranks):
    result = job(num_ranks, *SMALL, "--run-dir", "run", program=("-m", "fedmpi", "mine:Kept"))
    assert result.code == 2
    assert result.text.count("Kept has changed its 'kept': an algorithm is read-only") == 1
    assert "Traceback" not in result.text


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("num_ranks", "args"), [(6, "--num-clients 5 --cohort-size 5 --leak-check off"), (3, "--leak-check off")]
)
def test_it_may_where_the_user_says_so(job, num_ranks, args):
    options = "--dataset synthetic --model 2nn --rounds 2".split()
    result = job(num_ranks, *options, *args.split(), "--run-dir", "run", program=("-m", "fedmpi", "mine:Kept"))
    assert result.code == 0, result.text


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(("what", "rounds", "who"), [("Clients", 2, "of clients"), ("Server", 1, "global model is")])
def test_a_diverged_run_keeps_its_last_good_state(job, tmp_path, what, rounds, who):
    result = job(3, *SMALL[:-2], "--rounds", "5", "--run-dir", "run", program=("-m", "fedmpi", f"mine:{what}"))
    assert result.code == 3, result.text
    assert who in result.err
    assert f"the last good round is {rounds - 1}" in result.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert len(rows) == rounds
    newest = max((tmp_path / "run" / "checkpoint").iterdir())
    assert newest.name == f"round-{rounds:06}.ckpt"
    if what == "Clients":
        cohort = job(2, *SMALL, name="usual").rows()[2]["cohort"]
        odd = [client_id for client_id in cohort if client_id % 2]
        assert f"the models of clients {', '.join(map(str, odd))} are not finite" in result.err
