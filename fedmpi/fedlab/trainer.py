"""The client half: what a trainer rank does with one client.

Shapes: P vector entries.
"""

from __future__ import annotations

import copy
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmpi.core.model_checks import check_model
from fedmpi.core.seeding import Stream, derive_seed, seed_everything
from fedmpi.core.vector import SerializationTool, flatten
from fedmpi.errors import ModelError
from fedmpi.lifecycle import progress
from fedmpi.machine.device import own_gpu

Batches = Iterable[tuple[Tensor, Tensor]]


class ClientTrainer(ABC):
    """Trains one client after the other on one model object.

    For each client of a round the manager calls `begin_client`, then `train`, then reads `model_parameters`. Nothing of
    one client may reach the next: `train` starts from the vector it is given, and `begin_client` clears the rest.

    Attributes:
        model: the module; its trainable parameters and float buffers are views into one vector.
        client_id: the client at hand.
        round_idx: the round at hand.
        loss: mean training loss of the last `train`; NaN when it did not say.
        seed: the run's seed, set by the manager before the first round.
        single_client: True if this rank holds one client of its own, client rank - 1, and can train no other.
        own_fields: names of the attributes that fedmpi itself keeps right from client to client.
    """

    single_client = False
    own_fields: ClassVar[frozenset[str]] = frozenset(
        {"device", "model", "_vector", "client_id", "round_idx", "loss", "seed", "single_client"}
    )

    def __init__(self, model: nn.Module, cuda: bool | str | torch.device = False) -> None:
        """Takes over `model`.

        Args:
            model: float32 module; moved to the device and flattened in place.
            cuda: False for CPU, True for the GPU of this rank (round robin over its node's), or a device.

        Raises:
            ModelError: the model has entries that are not float32.
        """
        self.device = own_gpu() if cuda is True else torch.device(cuda or "cpu")
        check_model(model)  # memory that two tensors share comes apart when they are moved
        self.model = model.to(self.device)
        self._vector = flatten(self.model)
        self.client_id = 0
        self.round_idx = 0
        self.loss = math.nan
        self.seed = 0

    @property
    def model_parameters(self) -> Tensor:
        """(P,) float32, the model itself and not a copy: writing to it changes the model."""
        return self._vector

    def begin_client(self, round_idx: int, client_id: int) -> None:
        """Make ready for one client: its number, and the global random generators seeded for it alone."""
        self.round_idx, self.client_id, self.loss = round_idx, client_id, math.nan
        seed_everything(derive_seed(self.seed, Stream.CLIENT, round_idx, client_id))
        self.model.train()

    @abstractmethod
    def num_samples(self, client_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample counts of those clients: their weights in the mean. Asked once, before the first round."""

    @abstractmethod
    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        """Train the client at hand from `model_parameters` (P,); the result is in `model_parameters` of this object.

        Args:
            model_parameters: (P,) float32 on this trainer's device; not to be changed.
            epochs: passes over the client's data; None: as many as the trainer was made with.
        """


class ClientSGDTrainer(ClientTrainer):
    """FedLab's trainer: plain PyTorch over any loader.

    The optimizer starts afresh for every client. A loader with `shuffle=True`, or over a `torch.utils.data.Sampler`
    that draws from torch's global generator, gives the same batches on any rank.
    """

    own_fields = ClientTrainer.own_fields | {
        "_loader_of", "data_loader", "epochs", "optimizer", "_logger", "_fresh_optimizer",
    }  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        data_loader: Batches | Callable[[int], Batches],
        epochs: int,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[[Tensor, Tensor], Tensor],
        cuda: bool | str | torch.device = False,
        logger: logging.Logger | None = None,
    ) -> None:
        """As in FedLab.

        Args:
            model: the module.
            data_loader: this rank's loader (then client k lives on rank k + 1), or a function client_id -> loader
                (then any rank can train any client). Loaders have no worker processes.
            epochs: passes over the client's data each round.
            optimizer: over `model.parameters()`.
            criterion: (outputs, labels) -> scalar loss.
            cuda: False for CPU, True for the GPU of this rank (round robin over its node's), or a device.
            logger: where to say what was trained; None: the module's logger.
        """
        super().__init__(model, cuda)
        self.single_client = not callable(data_loader)
        self._loader_of = data_loader if callable(data_loader) else lambda _: data_loader
        self.data_loader = self._loader_of(0) if self.single_client else ()
        self.epochs = epochs
        self.optimizer = optimizer
        self.criterion = criterion
        self._logger = logger or logging.getLogger(__name__)
        self._fresh_optimizer = copy.deepcopy(optimizer.state_dict())

    def begin_client(self, round_idx: int, client_id: int) -> None:
        """Also a fresh optimizer, and the client's loader."""
        super().begin_client(round_idx, client_id)
        self.optimizer.load_state_dict(copy.deepcopy(self._fresh_optimizer))
        self.optimizer.zero_grad(set_to_none=True)
        self.data_loader = self._checked_loader(client_id)
        batches = getattr(self.data_loader, "batch_sampler", None)
        samplers = getattr(self.data_loader, "sampler", None), batches, getattr(batches, "sampler", None)
        for part in (self.data_loader, *samplers):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):  # its state would depend on the clients before
                generator.manual_seed(derive_seed(self.seed, Stream.BATCHES, round_idx, client_id))

    def num_samples(self, client_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples that a loader yields in one pass, as its batch sampler, its sampler or its data set tells."""
        return np.array([_len_of(self._checked_loader(int(k))) for k in client_ids], np.int64)

    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        """`epochs` passes of SGD over `data_loader`."""
        SerializationTool.deserialize_model(self.model, model_parameters)
        self._logger.debug("client %d trains in round %d", self.client_id, self.round_idx)
        total, steps = 0.0, 0
        for _ in range(self.epochs if epochs is None else epochs):
            for inputs, labels in self.data_loader:
                loss = self.criterion(self.model(inputs.to(self.device)), labels.to(self.device))
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                self.optimizer.step()
                progress.beat()
                total, steps = total + float(loss.detach()), steps + 1
        self.loss = total / steps if steps else math.nan

    def _checked_loader(self, client_id: int) -> Batches:
        loader = self._loader_of(client_id)
        workers = getattr(loader, "num_workers", 0)
        if workers:
            raise ModelError(f"DataLoader(num_workers={workers}) starts processes, which MPI does not survive: use 0")
        return loader


def _len_of(loader: Any) -> int:
    try:
        batches = getattr(loader, "batch_sampler", None)
        if type(batches) is torch.utils.data.BatchSampler:
            num_samples = len(batches.sampler)  # type: ignore[arg-type]  # a TypeError if it has no length
            return num_samples - (num_samples % batches.batch_size if batches.drop_last else 0)
        if batches is not None:
            return sum(map(len, batches))
        for part in ("sampler", "dataset"):
            if hasattr(loader, part):
                return len(getattr(loader, part))
    except (TypeError, NotImplementedError):  # an IterableDataset
        pass
    else:
        if hasattr(loader, "__len__"):
            return sum(len(labels) for _, labels in loader)
    raise ModelError(
        f"cannot tell the samples of a {type(loader).__name__}, which has no length: give a list of batches or a "
        "DataLoader over a data set with __len__, or override num_samples(client_ids)"
    )
