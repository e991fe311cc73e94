"""Algorithms over the exchange, on however many ranks there are: the same bits, and no byte twice."""

from __future__ import annotations

import logging
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from fedmpi.algorithm import Algorithm
from fedmpi.config import RunConfig
from fedmpi.core.memory_format import memory_format_of
from fedmpi.core.session import Session
from fedmpi.data.client_data import test_evaluator as evaluator_of
from fedmpi.data.datasets import load_dataset
from fedmpi.fedavg import FedAvg
from fedmpi.job import build_halves, one_step_groups, share_partition, start
from fedmpi.mpi.setup import on_every_rank, on_root

DEVICE = torch.device("cpu")
NUM_CLIENTS = 9


class Counting(nn.Module):
    """BatchNorm, a counter that begins above what float32 can hold, and a bool buffer."""

    def __init__(self, shape, classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.BatchNorm1d(6), nn.Linear(6, classes))
        self.register_buffer("steps", torch.tensor([2**24 + 1, 2**40 + 1]))
        self.register_buffer("trained", torch.tensor([False, False]))

    def forward(self, x):
        if self.training:
            self.steps.add_(1)
            self.trained[0] = True
        return self.layers(x)


class Recorder:
    def __init__(self):
        self.records = []

    def on_round(self, record):
        self.records.append(record)

    def on_end(self, half):
        pass


@pytest.fixture
def train(net, tmp_path):
    """Runs an algorithm on a communicator; returns exit code, records, and the server's half (on its server)."""
    root = on_root(net, lambda: str(tmp_path))

    def train(comm, cls, *, block_bytes=2**24, eval_every=0, model=f"{__name__}:Counting", **options):
        options = {"num_clients": NUM_CLIENTS, "cohort_size": 5, "rounds": 3, "batch_size": 32, **options}
        config = RunConfig(dataset="synthetic", model=model, data_dir=root, **options)
        dataset = load_dataset("synthetic", root)
        partition, _ = share_partition(comm, config, dataset)
        halves = build_halves(comm, cls, config, dataset, partition, DEVICE)
        recorder, server, visitor = Recorder(), halves.server, halves.visitor
        grouped = min(on_every_rank(comm, visitor.groups is not None if visitor else True))
        session = Session(
            comm,
            server,
            visitor,
            evaluator=evaluator_of(dataset, DEVICE, memory_format_of(halves.model), None),
            eval_every=eval_every,
            observers=[recorder],
            grouping=one_step_groups(config) if grouped else None,
            block_bytes=block_bytes,
        )
        start(session, halves, config)
        code = session.run()
        comm.over = False  # the tests go on
        return code, recorder.records, server

    return train


def outcome(server, records):
    """All that must be the same on any number of ranks."""
    history = [repr({**vars(record), "timings": None}) for record in records]
    state = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in server.state.items()}
    return server.flat.numpy().tobytes(), server.integer_state().tolist(), repr(state), history


class Everything(Algorithm[RunConfig]):
    """Several exchanges in a round, in all forms; segments that go down, up and both ways."""

    extra: ClassVar = {"c": ("T", "down"), "m": ("T", "both"), "h": (3, "up"), "d": (5, "down")}

    def round(self, s):
        everybody = s.sample(s.num_clients)[::-1]
        asked = s.ask(everybody, self.measure)
        assert sorted(asked) == sorted(everybody.tolist())
        worst = sorted(asked, key=lambda client_id: -asked[client_id]["loss"])[:5]
        parts = s.mean(worst, self.gather, buckets=np.arange(5) % 3)
        assert len(parts) == 3
        assert all(part["h"].tolist() == [1, s.round_idx, -2] for part in parts)
        s.model["c"].copy_(parts[0]["m"] + parts[1]["m"] - parts[2]["m"])
        s.model["d"].fill_(s.round_idx)
        s.model["h"].fill_(7)  # nothing that a client sees: it only goes up
        mean = s.mean(worst, self.client_update, {"w": np.arange(1, 6), "m": np.sqrt(np.arange(5))})
        s.step("w", mean.w)
        s.step("b", mean.b)
        s.step("m", mean["m"], 0.5)
        total = s.total(s.sample(3), self.client_update, np.array([0.5, 1 / 3, 2.0]))
        s.state["total"] = total.w[:50].clone()
        s.state["reported"] = [*s.state.get("reported", []), mean.reported["noise"], total.reported["noise"]]
        median = s.columns(s.sample(4), self.client_update, lambda rows, sent: rows.median(0).values - 0 * sent)
        other = s.model.clone()
        other.w.add_(median.w)
        two = s.mean(worst, self.client_update, send=[s.model, other], send_idx=np.array([0, 1, 1, 0, 1]))
        s.step("w", two.w, 0.1)
        rows = s.rows(worst[:2], self.client_update)
        s.state["rows"] = [rows[client_id].w[:9].tolist() for client_id in worst[:2]]
        s.state["noise"] = s.generator("noise").normal()

    def measure(self, k):
        k.report(loss=k.evaluate().loss, size=k.num_samples)

    def gather(self, k):
        assert k.sent["h"].tolist() == [0, 0, 0]
        assert k.back["h"].tolist() == [0, 0, 0]
        batch = next(iter(k.batches(1)))
        k.back["m"].copy_(k.gradient(batch))
        k.back["h"].copy_(torch.tensor([1.0, k.round_idx, -2.0]))

    def client_update(self, k):
        noise = torch.randn(3, generator=k.generator("noise"))
        k.sgd(drift=k.sent["c"], prox=0.1)
        k.back["m"].sub_(k.back.w, alpha=0.01)
        k.back["h"].copy_(k.sent["d"][:3] + noise)
        k.report(noise=noise[0], moved=(k.back.w - k.sent.w).norm())


class Buckets(Algorithm[RunConfig]):
    """Clients of one step, which may be trained together: never those of two buckets, or of two models sent."""

    def round(self, s):
        cohort = s.sample(NUM_CLIENTS)
        other = s.model.clone()
        other.w.mul_(0.5)
        parts = s.mean(cohort, self.visit, buckets=cohort % 3, send=(s.model, other), send_idx=(cohort % 2))
        for part in parts:
            s.step("w", part.w, 0.3)

    def visit(self, k):
        k.sgd()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Everything, {}),
        (Everything, {"eval_every": 1, "block_bytes": 1000}),
        (Buckets, {"model": "logistic", "batch_size": 0}),
        (Buckets, {"model": "logistic", "batch_size": 0, "client_lr": 1e4}),
        (FedAvg, {"eval_every": 2}),
    ],
)
def test_the_same_bits_on_any_number_of_ranks(net, agree, train, cls, options):
    """Groups of 1, 2, 3, ... ranks run the job; each of them comes to the same."""
    found = []
    for count in (size for size in (1, 2, 3, 5) if size <= net.size):
        comm = net.split(net.rank // count)
        code, records, server = train(comm, cls, **options)
        assert code == 0
        told = on_every_rank(net, outcome(server, records) if server is not None else None)
        found += [one for one in told if one is not None]
        comm.close()
    agree(len(found) >= net.size and all(one == found[0] for one in found), [one[1:] for one in found[:2]])


def test_counters_above_what_float32_holds_and_bools_travel_whole(net, agree, train):
    """Two steps a client at most (9 clients of 222 samples, batches of 128)."""
    code, _, server = train(net, FedAvg, batch_size=128)
    if server is not None:
        steps, trained = server.model.steps.tolist(), server.model.trained.tolist()
        agree(code == 0 and steps == [2**24 + 1 + 6, 2**40 + 1 + 6] and trained == [True, False], (steps, trained))
    else:
        agree(code == 0)


class Halving(FedAvg):
    """Changes the model in place between the evaluation and the training order."""

    def round(self, s):
        if s.round_idx:
            s.model.w.mul_(0.5)
        super().round(s)


class OneEntry(FedAvg):
    """Changes one entry of one segment, to another zero."""

    extra: ClassVar = {"c": (100_000, "down"), "d": (10, "down")}

    def round(self, s):
        if s.round_idx:
            s.model["d"][3] = -0.0
        super().round(s)


@pytest.mark.parametrize(
    ("cls", "first", "later"),
    [
        (FedAvg, 2, [1, 1]),
        (Halving, 2, [2, 2]),
        (OneEntry, 2, [1, 1]),
    ],
)
def test_a_model_that_was_evaluated_is_not_sent_again_unless_it_changed(net, alone, agree, train, cls, first, later):
    """Wire bytes: 4 per entry sent, 8 per entry summed; a training order and an evaluation per round."""
    code, records, server = train(net, cls, eval_every=1, model="2nn")
    assert code == 0
    one_code, _, one = train(alone, cls, eval_every=1, model="2nn")
    assert one_code == 0
    if server is None or net.size == 1:
        agree(True)
        return
    size = len(server.flat[server.layout.vector])
    rest = [record.timings["wire_bytes"] - 8 * size for record in records]
    if cls is OneEntry:
        rest[0] -= 4 * 100_000
    told = [(rest[i] / (4 * size), wanted) for i, wanted in enumerate([first, *later])]
    same = server.flat.numpy().tobytes() == one.flat.numpy().tobytes()
    agree(same and all(0 <= found - wanted < 0.01 for found, wanted in told), told)


@pytest.fixture
def alone():
    """A communicator of this rank alone, for the reference."""
    import mpi4py.MPI

    from fedmpi.mpi.comm import Comm

    return Comm(mpi4py.MPI.COMM_SELF)


class Bursting(Algorithm[RunConfig]):
    """In round 1 two clients send back what is not finite."""

    def visit(self, k):
        k.sgd()
        if k.round_idx == 1 and k.id in (2, 3):
            k.back.w[5] = float("nan" if k.id == 2 else "inf")


class ByMean(Bursting):
    def round(self, s):
        s.step("w", s.mean(range(NUM_CLIENTS), self.visit).w)


class ByColumns(Bursting):
    def round(self, s):
        s.step("w", s.columns(range(NUM_CLIENTS), self.visit, lambda rows, sent: rows.mean(0)).w)


class ByRows(Bursting):
    def round(self, s):
        s.model.w.copy_(torch.stack([back.w for back in s.rows(range(NUM_CLIENTS), self.visit).values()]).mean(0))


@pytest.mark.parametrize("cls", [ByMean, ByColumns, ByRows])
def test_clients_that_diverge_end_all_ranks_with_3(net, agree, train, caplog, monkeypatch, cls):
    monkeypatch.setattr(logging.getLogger("fedmpi"), "propagate", True)
    code, records, _ = train(net, cls, block_bytes=1000)
    agree(code == 3 and len(records) == net.is_server, (code, records))
    said = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    wanted = "the models of clients 2, 3 are not finite after training in round 1: lower --client-lr; the last good"
    agree(not net.is_server or (len(said) == 1 and wanted in said[0]), said)
    agree(net.max_of(net.rank) == net.size - 1, "no message is left over")


class Empty(Algorithm[RunConfig]):
    """Exchanges in which nobody is visited."""

    extra: ClassVar = {"h": (3, "up")}

    def round(self, s):
        before = s.model.flat.clone()
        for found in (s.mean([], self.visit), s.total([], self.visit), *s.mean([], self.visit, buckets=[])):
            for name in found:
                s.step(name, found[name])
        s.step("w", s.columns([], self.visit, lambda rows, sent: rows.mean(0)).w)
        assert s.rows([], self.visit) == {}
        assert s.ask([], self.visit) == {}
        assert torch.equal(before.view(torch.int32), s.model.flat.view(torch.int32))

    def visit(self, k):
        raise AssertionError("nobody is visited")


@pytest.mark.parametrize("model", [f"{__name__}:Counting", "logistic"])
def test_empty_cohorts_change_no_bit(net, agree, train, model):
    code, records, server = train(net, Empty, model=model, rounds=2, block_bytes=100)
    agree(code == 0)
    if server is not None:
        assert [(record.cohort, record.num_samples, record.train_loss) for record in records] == [([], 0, None)] * 2
