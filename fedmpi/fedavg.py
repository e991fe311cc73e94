"""FedAvg: clients run local SGD, the server takes the sample-weighted mean of where they got to.

    mpirun -n 11 python -m fedmpi.fedavg --dataset mnist

Source: McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017,
arXiv 1602.05629, algorithm 1.

Shapes: P vector entries, n samples of the client at hand.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below: --help and a wrong option need no torch
    from fedmpi.launch import main

    raise SystemExit(main("fedmpi.fedavg:FEDAVG"))

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmpi.config import RunConfig
from fedmpi.core.handler import SyncParameterServerHandler
from fedmpi.core.memory_format import laid_out, memory_format_of
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.core.trainer import ClientTrainer, SingleSteps
from fedmpi.data.client_data import ClientData
from fedmpi.engines.choose import choose_engine
from fedmpi.engines.proof import why_not
from fedmpi.engines.rehearsal import rehearse
from fedmpi.errors import ModelError
from fedmpi.job import Algorithm

_TRIAL_SIZE = 256
"""Most samples of the trial before the first round."""


class FedAvgTrainer(ClientTrainer):
    """The client half: E epochs of SGD from the global model."""

    own_fields = ClientTrainer.own_fields | {
        "data", "config", "engine", "memory_format", "stateless_model", "changed_attributes", "_shuffles", "_is_plain",
        "_checked_round",
    }  # fmt: skip

    def __init__(self, model: nn.Module, data: ClientData, config: RunConfig, device: torch.device) -> None:
        """Over all clients' data; which client trains is said by `begin_client`.

        Args:
            model: float32 module.
            data: the training set and its split.
            config: local epochs, batch size, step size, momentum, weight decay.
            device: where to train.
        """
        super().__init__(model, device)
        self.data = data
        self.config = config
        self._is_plain = not _overridden(type(self))
        sgd = config.client_lr, config.client_momentum, config.client_weight_decay
        smallest, self.changed_attributes = self._rehearse(sgd)
        self.engine, self.engine_note = choose_engine(config.engine, self.model, data.input_shape, *sgd, smallest)
        self.memory_format = memory_format_of(self.model)
        self._shuffles = torch.Generator("cpu")
        self._checked_round = -1
        self.stateless_model = self._is_plain and why_not(self.model) is None

    def begin_client(self, round_idx: int, client_id: int) -> None:
        """Without the global generators where nobody draws from them: no user's model, no class derived from this."""
        if self.engine.runs_model or not self._is_plain:
            super().begin_client(round_idx, client_id)
        else:
            self.round_idx, self.client_id, self.loss = round_idx, client_id, math.nan

    def takes_one_step(self, client_id: int) -> bool:
        """One epoch of one batch, an engine for it, and no class derived from this one that does more for a client."""
        n = len(self.data.partition[client_id])
        one_step = 0 < n <= (self.config.batch_size or n) and self.config.local_epochs == 1
        return one_step and self._is_plain and self.engine.single_steps is not None

    def single_steps(self, client_ids: Sequence[int], model_parameters: Tensor) -> SingleSteps:
        """The step of `train`; a single batch needs no shuffling."""
        assert self.engine.single_steps is not None
        self._check_still_plain()
        held = [self.data.partition[client_id] for client_id in client_ids]
        inputs, labels = self.data.take(np.concatenate(held))
        return self.engine.single_steps.run(model_parameters, inputs, labels, [len(each) for each in held])

    def num_samples(self, client_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples of each client."""
        return self.data.num_samples(client_ids)

    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        """ClientUpdate(k, w): B <- batches of size B; for each epoch, for each batch b: w <- w - lr grad l(w; b)."""
        self.model_parameters.copy_(model_parameters)
        self.engine.reset()
        n = len(self.data.partition[self.client_id])
        if not n:
            return
        self._check_still_plain()
        shuffles = self._shuffles.manual_seed(derive_seed(self.seed, Stream.BATCHES, self.round_idx, self.client_id))
        losses: list[float] = []
        for _ in range(self.config.local_epochs if epochs is None else epochs):
            inputs, labels = self.data.load(self.client_id, torch.randperm(n, generator=shuffles, device="cpu").numpy())
            shuffled = laid_out(inputs, self.memory_format)
            losses += self.engine.epoch(shuffled, labels, min(self.config.batch_size or n, n)).tolist()
        self.loss = math.fsum(losses) / len(losses) if losses else math.nan

    def _rehearse(self, sgd: tuple[float, float, float]) -> tuple[int, list[str]]:
        """Samples that the model needs in training, and attributes that it changes, by a trial on the largest client's.

        Raises:
            ModelError: it cannot train, or a client or --batch-size gives it less.
        """
        sizes, name = self.data.partition.sizes, self.config.model
        largest = int(sizes.argmax())
        n = min(int(sizes[largest]), self.config.batch_size or _TRIAL_SIZE, _TRIAL_SIZE)
        if not n:
            return 1, []
        samples = self.data.take(self.data.partition[largest][: max(n, 2)])
        try:
            smallest, changed = rehearse(self.model, *samples, self.data.num_classes, name, sgd)
        except ModelError:
            if type(self).train is FedAvgTrainer.train:
                raise
            return 1, []  # a class with a training of its own may use the model otherwise
        single = np.flatnonzero(sizes == 1)
        if smallest > 1 and type(self).train is FedAvgTrainer.train:
            if self.config.batch_size == 1:
                raise ModelError(f"--batch-size must be 0 or >= 2, got 1: --model {name} cannot train on one sample")
            if len(single):
                first = ", ".join(map(str, single[:5])) + (f" and {len(single) - 5} more" * (len(single) > 5))
                raise ModelError(
                    f"--model {name} cannot train on one sample, and that is all that client {first} has:"
                    " --min-samples 2 (with --partition dirichlet), or fewer --num-clients"
                )
        return smallest, changed

    def _check_still_plain(self) -> None:
        """See that the model is still the stack for which the engine was chosen.

        Raises:
            ModelError: it is not.
        """
        if self.config.engine != "auto" or self.engine.runs_model:
            return
        if self._is_plain and self._checked_round == self.round_idx:  # nobody else's code runs in between
            return
        reason = why_not(self.model)
        if reason is not None:
            raise ModelError(
                f"the model is not the one any more for which --engine auto chose fused: {reason}; change it in its own"
                " function, or take --engine eager"
            )
        self._checked_round = self.round_idx


def _overridden(cls: type) -> set[str]:
    """What a derived class replaces of what decides a client's training."""
    derived = cls.__mro__[: cls.__mro__.index(FedAvgTrainer)]
    names = {name for base in derived for name in vars(base) if not name.startswith("__")}
    return (names & set(dir(FedAvgTrainer))) - {"num_samples"}


def fedavg_handler(model: nn.Module, config: RunConfig) -> SyncParameterServerHandler:
    """The server half: w <- w + server_lr x sum_k (n_k / n) (w_k - w), which is what the base class does."""
    return SyncParameterServerHandler(
        model,
        config.num_clients,
        cohort_size=config.clients_per_round,
        rounds=config.rounds,
        target_accuracy=config.target_accuracy,
        server_lr=config.server_lr,
        seed=config.seed,
    )


FEDAVG = Algorithm("FedAvg", FedAvgTrainer, fedavg_handler)
