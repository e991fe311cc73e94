"""Placement between nodes by expected cost, and a server whose own step diverges."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

from fedmpi import ClientPassiveManager, ClientSGDTrainer, ServerManager, SyncParameterServerHandler
from fedmpi.core.schedule import CostModel, place
from fedmpi.mpi.setup import on_root

SIZES = np.array([3, 40, 8, 21, 5, 13, 2, 30, 9])


def loader_of(client_id):
    rng = np.random.default_rng(client_id)
    x = torch.from_numpy(rng.normal(size=(SIZES[client_id], 3)).astype(np.float32))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4)


class Recording(ClientSGDTrainer):
    """A trainer that records its clients."""

    def train(self, model_parameters, epochs=None):
        self.trained.append(self.client_id)
        super().train(model_parameters, epochs)


def network():
    torch.manual_seed(3)
    return nn.Linear(3, 2)


def one_round(net, **options):
    """Run one round of all clients; return the clients this rank trained, and the final model's bytes on every rank."""
    model = network()
    trainer = Recording(model, loader_of, 1, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss())
    trainer.trained = []
    local = ClientPassiveManager(net, trainer) if not net.is_server or net.size == 1 else None
    if net.is_server:
        handler = SyncParameterServerHandler(network(), len(SIZES))
        ServerManager(net, handler, local, **options).run()
    else:
        local.run()
    return trainer.trained, on_root(net, lambda: handler.model_parameters.numpy().tobytes())


def test_between_nodes_clients_are_placed_by_their_expected_cost(net, agree, monkeypatch):
    _, drawn = one_round(net)
    monkeypatch.setattr(net, "one_node", False)  # as with ranks that share no memory
    trained, placed = one_round(net)
    trainers = place(np.arange(len(SIZES)), CostModel().costs(SIZES), net.num_trainers, len(SIZES))
    expected = np.flatnonzero(trainers + (net.size > 1) == net.rank).tolist()
    agree(trained == expected, f"{trained}, not {expected}")
    agree(placed == drawn, "another model")


@pytest.mark.parametrize("options", [{"server_lr": 1e44}, {"server_lr": float("inf")}])
def test_a_global_model_that_is_not_finite_ends_all_ranks_with_3(net, agree, caplog, monkeypatch, options):
    """The clients' models are finite: the server's own step is too long."""
    monkeypatch.setattr(logging.getLogger("fedmpi"), "propagate", True)
    model = network()
    trainer = ClientSGDTrainer(model, loader_of, 1, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss())
    local = ClientPassiveManager(net, trainer) if not net.is_server or net.size == 1 else None
    if net.is_server:
        code = ServerManager(net, SyncParameterServerHandler(network(), len(SIZES), rounds=3, **options), local).run()
    else:
        code = local.run()
    agree(code == 3, code)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    agree(len(said) == net.is_server, said)
    agree(not net.is_server or "the global model is not finite after round 0: lower --server-lr" in said[0], said)
