"""The round loop of the page's own parts, on however many ranks there are."""

from __future__ import annotations

import logging

import mpi4py.MPI
import numpy as np
import pytest
import torch
from torch import nn

from fedmpi import Aggregators, ClientPassiveManager, ClientSGDTrainer, ServerManager, SyncParameterServerHandler
from fedmpi.core import session
from fedmpi.core.evaluate import Evaluator
from fedmpi.errors import ConfigError, DisagreementError
from fedmpi.fedlab import visits
from fedmpi.mpi.setup import on_root

NUM_CLIENTS = 7


class Toy(nn.Module):
    """One linear layer, dropout and a BatchNorm: weights, statistics, an integer buffer and random numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))

    def forward(self, x):
        return self.layers(x)


def client_set(client_id):
    rng = np.random.default_rng(client_id)
    size = 4 + 2 * client_id
    x = torch.from_numpy(rng.normal(size=(size, 3)).astype(np.float32))
    return torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())


def loader_of(client_id):
    return torch.utils.data.DataLoader(client_set(client_id), batch_size=4, shuffle=True)


def toy_trainer(loaders=loader_of, momentum=0.9):
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    return ClientSGDTrainer(model, loaders, 2, optimizer, nn.CrossEntropyLoss())


class Recorder:
    def __init__(self):
        self.records, self.ended = [], 0

    def on_round(self, record):
        self.records.append(record)

    def on_end(self, half):
        self.ended += 1
        assert half.round_idx == len(self.records)


def toy_evaluator():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1234, 3)).astype(np.float32))
    return Evaluator(len(x), lambda start, stop: (x[start:stop], (x[start:stop, 0] > 0).long()))


def train(
    net, handler_class=SyncParameterServerHandler, make_trainer=toy_trainer, facts=None, make_model=Toy, **options
):
    """One job; the final vector and the records, on every rank."""
    recorder = Recorder()
    local = (
        ClientPassiveManager(net, make_trainer(), toy_evaluator(), facts)
        if not net.is_server or net.size == 1
        else None
    )
    if net.is_server:
        of_manager = {name: options.pop(name) for name in ("eval_every", "block_bytes") if name in options}
        options = {"num_clients": NUM_CLIENTS, "cohort_size": 5, "rounds": 3, "seed": 11, **options}
        handler = handler_class(make_model(), **options)
        manager = ServerManager(net, handler, local, observers=[recorder], facts=facts, **of_manager)
        code = manager.run()
        result = handler.model_parameters.numpy().tobytes(), recorder.records, recorder.ended, handler.integer_state()
    else:
        code, result = local.run(), None
    return code, *on_root(net, lambda: result)


def without_timings(records):
    return [{**vars(record), "timings": None} for record in records]


@pytest.fixture
def alone():
    """The same job on this rank alone, as the reference."""
    from fedmpi.mpi.comm import Comm

    return Comm(mpi4py.MPI.COMM_SELF)


def test_the_result_is_that_of_one_rank_alone(net, alone, agree):
    code, bits, records, ended, state = train(net, eval_every=2)
    code_alone, bits_alone, records_alone, _, state_alone = train(alone, eval_every=2)
    agree(code == code_alone == 0 and ended == 1)
    agree(bits == bits_alone)
    agree(without_timings(records) == without_timings(records_alone), records)
    agree([record.accuracy is not None for record in records] == [False, True, True], "evaluated after 2 and the last")
    agree(np.array_equal(state, state_alone) and state[0] > 0, state)


class WholeMean(SyncParameterServerHandler):
    """FedAvg once more, over whole vectors, by the inherited method."""

    def update_model(self, model_parameters_list):
        super().update_model(model_parameters_list)


class Median(SyncParameterServerHandler):
    def update_model(self, model_parameters_list):
        assert len(model_parameters_list) == len(self.cohort)
        self.model_parameters.copy_(Aggregators.median_aggregate(model_parameters_list))


class BlockMedian(SyncParameterServerHandler):
    def aggregate(self, rows, reference):
        assert reference.shape == rows.shape[1:]
        return Aggregators.median_aggregate(rows)


@pytest.mark.parametrize("block_bytes", [200, 2**24])
def test_an_overridden_update_model_sees_whole_vectors_in_cohort_order(net, agree, block_bytes):
    """Rows travel when the handler needs them, and give the bits of the sum that travels otherwise."""
    _, by_hand, *_ = train(net, WholeMean, block_bytes=block_bytes)
    _, summed, *_ = train(net)
    agree(by_hand == summed)


def test_a_median_over_vectors_and_over_blocks_is_the_same_on_any_ranks(net, alone, agree):
    _, whole, *_ = train(net, Median)
    _, blocks, *_ = train(net, BlockMedian, block_bytes=200)
    _, single, *_ = train(alone, Median)
    _, mean, *_ = train(net)
    agree(whole == blocks == single != mean)


def test_rank_is_client_plus_one(net, agree):
    """Each trainer rank brings one loader of its own; everybody trains every round."""
    num_clients = net.num_trainers
    seen = []

    class Watched(ClientSGDTrainer):
        def train(self, model_parameters, epochs=None):
            seen.append(self.client_id)
            super().train(model_parameters, epochs)

    def make():
        model = Toy()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return Watched(model, loader_of(max(0, net.rank - 1)), 1, optimizer, nn.CrossEntropyLoss())

    code, bits, records, *_ = train(net, make_trainer=make, num_clients=num_clients, cohort_size=num_clients)
    want = [] if net.is_server and net.size > 1 else [max(0, net.rank - 1)] * 3
    agree(code == 0 and seen == want, seen)
    agree(records[0].num_samples == sum(len(client_set(k)) for k in range(num_clients)))
    _, any_rank, *_ = train(net, num_clients=num_clients, cohort_size=num_clients, make_trainer=lambda: one_epoch())
    agree(bits == any_rank, "a loader of one's own and a function of the client give the same")


def one_epoch():
    model = Toy()
    return ClientSGDTrainer(model, loader_of, 1, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss())


def test_single_loaders_refuse_another_number_of_clients(net):
    def make():
        model = Toy()
        return ClientSGDTrainer(model, loader_of(0), 1, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss())

    with pytest.raises(ConfigError, match=rf"want 9 trainer ranks \(mpirun -n 10\), got {net.num_trainers}"):
        train(net, make_trainer=make, num_clients=9)


def test_other_models_on_other_ranks_are_refused_before_round_0(net):
    def make():
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        return ClientSGDTrainer(model, loader_of, 1, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss())

    with pytest.raises(DisagreementError, match=r"parameter count is 42 on rank 0 but 32 on rank"):
        train(net, make_trainer=make)


def test_other_options_on_other_ranks_are_refused(net):
    with pytest.raises(DisagreementError, match=r"options is 0 on rank 0 but 1 on rank"):
        train(net, facts={"options": min(net.rank, 1)})


def test_the_cpu_of_the_server_is_compared_with_the_trainers(net, agree, caplog, monkeypatch):
    """It makes the initial weights."""
    monkeypatch.setattr(logging.getLogger("fedmpi"), "propagate", True)
    monkeypatch.setattr(session, "capability", lambda device: "old" if net.is_server else "new")
    train(net)
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    expected = "CPU or GPU model is old on rank 0 but new on rank"
    agree(net.size == 1 or not net.is_server or any(line.startswith(expected) for line in said), said)


class Exploding(ClientSGDTrainer):
    def train(self, model_parameters, epochs=None):
        super().train(model_parameters, epochs)
        if self.round_idx == 1 and self.client_id in (2, 3):
            self.model_parameters[3] = float("nan")


def test_a_non_finite_update_ends_all_ranks_with_3_and_names_client_and_round(net, agree, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fedmpi"), "propagate", True)

    def make():
        model = Toy()
        return Exploding(model, loader_of, 1, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss())

    code, _, records, ended, _ = train(net, make_trainer=make, cohort_size=NUM_CLIENTS)
    agree(code == 3 and len(records) == 1 and ended == 0, (code, records, ended))
    said = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    wanted = "the models of clients 2, 3 are not finite after training in round 1: lower --client-lr; the last good"
    agree(not net.is_server or wanted in said[0], said)


class Masked(nn.Module):
    """A causal mask of -inf and a BatchNorm: buffers that stay, and buffers that move."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.register_buffer("mask", torch.tensor([0.0, -float("inf")]))

    def forward(self, x):
        return self.layers(x) + torch.where(self.mask < 0, 0.0, self.mask)


class Momentum(SyncParameterServerHandler):
    def step(self, mean_update):
        self.moved = mean_update * 3 + getattr(self, "moved", 0)
        super().step(self.moved)


class NoBuffers(SyncParameterServerHandler):
    """Sets all columns it is shown to 7."""

    def aggregate(self, rows, reference):
        assert len(rows) == len(self.cohort)
        return torch.full_like(reference, 7.0)


class Zeroed(SyncParameterServerHandler):
    def update_model(self, model_parameters_list):
        self.model_parameters.zero_()
        for vector in model_parameters_list:
            vector.zero_()


def masked_trainer():
    model = Masked()
    return ClientSGDTrainer(model, loader_of, 1, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss())


def test_buffers_end_as_the_plain_mean_whatever_the_server_does(net, agree):
    """One round: every server's running statistics are those of FedAvg, and the mask is what it was."""
    options = {"make_model": Masked, "make_trainer": masked_trainer, "rounds": 1, "eval_every": 1}
    _, plain, *_ = train(net, **options)
    want = np.frombuffer(plain, np.float32)[34:]
    agree(want[0] == 0 and np.isneginf(want[1]) and (want[2:] != 0).all(), want)
    for handler, more in [
        (SyncParameterServerHandler, {"server_lr": 30.0}),
        (Momentum, {}),
        (NoBuffers, {}),
        (Zeroed, {}),
    ]:
        code, bits, records, *_ = train(net, handler, block_bytes=100, **options, **more)
        got = np.frombuffer(bits, np.float32)
        agree(code == 0 and records[0].loss is not None, (handler.__name__, code, records))
        agree(got[34:].tobytes() == want.tobytes(), f"{handler.__name__}: {got[34:]}, wanted {want}")
        agree(bits != plain, handler.__name__)


class Scalar(SyncParameterServerHandler):
    def aggregate(self, rows, reference):
        return rows.mean()


def test_an_aggregate_of_another_shape_is_refused(alone, agree):
    with pytest.raises(ConfigError, match=r"aggregate must return a tensor of shape \(\d+,\), got shape \(\)"):
        train(alone, Scalar)


class Favouring(SyncParameterServerHandler):
    """Counts client 0 a thousand times."""

    def sample_clients(self):
        cohort = super().sample_clients()
        self.weights = np.where(cohort == 0, 1000.0, 0.5)
        return cohort


class FavouringRows(Favouring, WholeMean):
    pass


def test_a_handlers_own_weights_travel(net, alone, agree):
    """Summed on the way, row by row, and on one rank alone: the same bits, and not those of the sample counts."""
    options = {"cohort_size": NUM_CLIENTS, "rounds": 2}
    _, summed, records, *_ = train(net, Favouring, **options)
    _, gathered, *_ = train(net, FavouringRows, **options)
    _, single, *_ = train(alone, Favouring, **options)
    _, counted, *_ = train(net, **options)
    agree(summed == gathered == single != counted)
    agree(records[0].num_samples == sum(len(client_set(k)) for k in range(NUM_CLIENTS)), records)


class EverySecondEmpty:
    def sample_clients(self):
        cohort = super().sample_clients()
        return cohort[:0] if self.round_idx % 2 else cohort


class EmptyMomentum(EverySecondEmpty, Momentum):
    pass


class EmptyRows(EverySecondEmpty, WholeMean):
    pass


@pytest.mark.parametrize("handler", [EmptyMomentum, EmptyRows])
def test_an_empty_cohort_is_a_round_in_which_nothing_happens(net, agree, handler):
    code, bits, records, *_ = train(net, handler, rounds=2, eval_every=1)
    _, before, *_ = train(net, handler, rounds=1)
    agree(code == 0 and bits == before, "the server's momentum does not move the model either")
    agree([(len(r.cohort), r.num_samples, r.train_loss is None) for r in records][1] == (0, 0, True), records)
    agree(records[0].accuracy == records[1].accuracy and len(records) == 2, records)


class Kept(ClientSGDTrainer):
    def train(self, model_parameters, epochs=None):
        kept = self.__dict__.setdefault("kept", {})
        super().train(kept.get(self.client_id, model_parameters), epochs)
        kept[self.client_id] = self.model_parameters.clone()


def test_a_trainer_that_keeps_something_is_tried_unless_each_client_has_a_rank(net, agree, monkeypatch):
    def make():
        model = Toy()
        return Kept(model, loader_of, 1, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss())

    tried = []
    monkeypatch.setattr(visits.LeakCheck, "after_visit", lambda self, order, vector: tried.append(order.round_idx))
    train(net, make_trainer=make, rounds=1, cohort_size=NUM_CLIENTS)
    agree(bool(tried) == (net.size == 1 or not net.is_server), tried)
    tried.clear()
    train(net, make_trainer=make, rounds=1, num_clients=net.num_trainers, cohort_size=net.num_trainers)
    agree(not tried, tried)


def test_the_round_loop_pickles_nothing(net, agree, monkeypatch):
    """Between the set-up and EXIT no lower-case call of mpi4py is made."""
    from fedmpi.fedlab.managers import NetworkManager

    calls: list[str] = []
    real = net._comm

    class Counting:
        def __getattr__(self, name):
            attribute = getattr(real, name)
            if callable(attribute) and name[0].islower():
                calls.append(name)
            return attribute

    def counted_run(manager):
        manager.setup()
        monkeypatch.setattr(net, "_comm", Counting())
        monkeypatch.setattr(manager, "setup", lambda: None)
        code = original(manager)
        monkeypatch.setattr(net, "_comm", real)
        return code

    original = NetworkManager.run
    monkeypatch.setattr(NetworkManager, "run", counted_run)
    for handler in (SyncParameterServerHandler, WholeMean, BlockMedian):
        train(net, handler, eval_every=1)
    agree(not calls, calls)


def test_no_client_starts_from_the_client_before(net, agree):
    """Scalar w = 1, loss (w - y)^2, lr 0.25, one step; y = 2, 3, 0: clients end at 1.5, 2, 0.5 and the mean is 4/3.

    1.625 would mean that each client started from the one before.
    """

    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.w * x

    def loaders(client_id):
        return [(torch.ones(1), torch.tensor([(2.0, 3.0, 0.0)[client_id]]))]

    def make():
        model = Scalar()
        return ClientSGDTrainer(model, loaders, 1, torch.optim.SGD(model.parameters(), 0.25, 0.9), nn.MSELoss())

    local = ClientPassiveManager(net, make()) if not net.is_server or net.size == 1 else None
    if net.is_server:
        handler = SyncParameterServerHandler(Scalar(), 3)
        ServerManager(net, handler, local).run()
    else:
        local.run()
    w = on_root(net, lambda: float(handler.model_parameters))
    agree(w == pytest.approx(4 / 3, abs=1e-7), w)
