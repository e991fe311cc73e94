"""The visits of a trainer to one client after the other, on one model object.

Shapes: V entries of a flat vector, T trainable entries.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedmpi.config import RunConfig
from fedmpi.core.evaluate import Evaluator, Metrics, metrics_of
from fedmpi.core.isolation import Isolation
from fedmpi.core.memory_format import laid_out, memory_format_of
from fedmpi.core.model_checks import check_model
from fedmpi.core.order import IntArray, Order
from fedmpi.core.seeding import Stream, derive_seed, seed_everything
from fedmpi.core.vector import flatten, layout_of, load_integer_state
from fedmpi.core.worker import Visit
from fedmpi.data.client_data import ClientData
from fedmpi.engines.choose import choose_engine
from fedmpi.engines.proof import why_not
from fedmpi.engines.rehearsal import rehearse
from fedmpi.errors import ModelError
from fedmpi.halves.algorithm_object import AnyAlgorithm, ReadOnlyCheck, is_own, visits_of
from fedmpi.halves.client import Client

_TRIAL_SIZE = 256
"""Most samples of the trial before the first round."""


class ClientVisitor:
    """Visits one client after the other, as a method of the algorithm says.

    Attributes:
        algorithm: this rank's.
        data: the training set and its split.
        config: the options.
        model: the module; its trainable parameters and float buffers are views into `back`.
        engine: takes the steps of SGD.
        engine_note: which one, and why.
        smallest_batch: samples that the model needs in training.
        groups: takes the steps of clients of one step together; None: each takes its own.
        changed_attributes: names of the model's attributes that were seen to change in trial steps.
    """

    def __init__(
        self, algorithm: AnyAlgorithm, model: nn.Module, data: ClientData, config: RunConfig, device: torch.device
    ) -> None:
        """Over all clients' data.

        Raises:
            ModelError: the model cannot be trained.
        """
        self.algorithm, self.data, self.config, self.seed = algorithm, data, config, config.seed
        check_model(model)  # memory that two tensors share comes apart when they are moved
        self.model = model.to(device)
        self.layout = layout_of(self.model, algorithm.extra)
        self.back = flatten(self.model, self.layout)
        sgd = config.client_lr, config.client_momentum, config.client_weight_decay
        self.smallest_batch, self.changed_attributes = self._rehearse(sgd)
        self.engine, self.engine_note = choose_engine(
            config.engine, self.model, data.input_shape, *sgd, self.smallest_batch
        )
        self.memory_format = memory_format_of(self.model)
        self._visits = visits_of(type(algorithm))
        self._own = is_own(algorithm)
        stateless = why_not(self.model) is None
        self.isolation = Isolation(self.model, self.back[self.layout.vector], stateless, self.changed_attributes)
        self._read_only = ReadOnlyCheck(algorithm, self.model, config)
        only_w = self.layout.up == self.layout["w"].columns
        grouped = config.group_clients > 1 and not algorithm.transforms and only_w
        self.groups = self.engine.groups if grouped else None
        self._checked_round = -1
        self._names = [(name, p.numel()) for name, p in self.model.named_parameters() if p.requires_grad]

    def num_samples(self, client_ids: IntArray) -> IntArray:
        """Return the sample counts of clients."""
        return self.data.num_samples(client_ids)

    def visit(self, order: Order, client_id: int, sent: Tensor, may_defer: bool) -> Visit:
        """Visit a client; what it sends back is then in `back`, unless its step was put off."""
        version = sent._version
        k = Client(self, order, client_id, sent, may_defer and self.groups is not None)
        if not self._own:
            self.seed_global(order, client_id)
        getattr(self.algorithm, self._visits[order.visit_idx])(k)
        if not k.deferred:
            k.settle()
            for transform in self.algorithm.transforms:
                transform.encode(k)
            self.isolation.check()
        if sent._version != version:
            raise ModelError(
                f"{type(self.algorithm).__name__} writes into k.sent, which other clients read: copy it first"
            )
        return Visit(k.num_samples, math.nan if k.deferred else k.loss_value, k.reported, k.deferred)

    def step_together(self, order: Order, client_ids: Sequence[int], sent: Tensor) -> tuple[Tensor, list[float], bool]:
        """Take the one step of clients that put it off; see `core.worker.Visitor`."""
        assert self.groups is not None
        self.check_model(order.round_idx)
        indices = [self.data.partition[client_id] for client_id in client_ids]
        inputs, labels = self.data.take(np.concatenate(indices))
        weights = order.weight_rows()[0][[order.place_of(client_id) for client_id in client_ids]].tolist()
        step = self.groups.run(sent[self.layout.vector], inputs, labels, [len(part) for part in indices], weights)
        return step.update, step.losses, step.finite

    def end_order(self, order: Order, sent: Sequence[Tensor]) -> None:
        """See that the algorithm's object is what it was.

        Raises:
            ConfigError: names the attributes that visits have changed.
        """
        self._read_only.check()

    def begin(self, order: Order, client_id: int, sent: Tensor) -> None:
        """Make the model new for a client, and load what was sent."""
        seed = derive_seed(self.seed, Stream.CLIENT, order.round_idx, client_id, order.exchange_idx)
        self.isolation.begin(seed)
        if self.engine.runs_model:
            self.seed_global(order, client_id)
        self.model.train()
        self.back[: self.layout.down.stop].copy_(sent[: self.layout.down.stop])
        self.back[self.layout.down.stop :].zero_()
        if len(order.integers):
            load_integer_state(self.model, order.integers)

    def seed_global(self, order: Order, client_id: int) -> None:
        """Seed the global random generators for a client alone."""
        seed_everything(derive_seed(self.seed, Stream.CLIENT, order.round_idx, client_id, order.exchange_idx))

    def evaluate(self, client_id: int) -> Metrics:
        """Return the metrics of the model at hand on a client's own samples; it may move the model's buffers."""
        indices = self.data.partition[client_id]

        def load(start: int, stop: int) -> tuple[Tensor, Tensor]:
            inputs, labels = self.data.take(indices[start:stop])
            return laid_out(inputs, self.memory_format), labels

        return metrics_of(Evaluator(len(indices), load).evaluate(self.model, 0, 1))

    def named(self, pattern: str) -> list[slice]:
        """Return the ranges of (T,) that belong to parameters of matching names.

        Raises:
            ModelError: none matches.
        """
        found, start = [], 0
        for name, size in self._names:
            if fnmatch.fnmatchcase(name, pattern):
                found.append(slice(start, start + size))
            start += size
        if not found:
            names = ", ".join(name for name, _ in self._names[:5])
            raise ModelError(f"only={pattern!r} matches no trainable parameter of the model ({names}, ...)")
        return found

    def check_model(self, round_idx: int) -> None:
        """See, once per round, that the model is still the stack for which the engine was chosen.

        Raises:
            ModelError: it is not.
        """
        if self.config.engine != "auto" or self.engine.runs_model or self._checked_round == round_idx:
            return
        reason = why_not(self.model)
        if reason is not None:
            raise ModelError(
                f"the model is not the one any more for which --engine auto chose fused: {reason}; change it in its own"
                " function, or take --engine eager"
            )
        self._checked_round = round_idx if self._own else -1

    def _rehearse(self, sgd: tuple[float, float, float]) -> tuple[int, list[str]]:
        """Return the samples that the model needs in training, and attributes that a trial step changes.

        Raises:
            ModelError: it cannot train, or a client or --batch-size gives it less.
        """
        sizes, name = self.data.partition.sizes, self.config.model
        largest = int(sizes.argmax())
        n = min(int(sizes[largest]), self.config.batch_size or _TRIAL_SIZE, _TRIAL_SIZE)
        if not n:
            return 1, []
        samples = self.data.take(self.data.partition[largest][: max(n, 2)])
        smallest, changed = rehearse(self.model, *samples, self.data.num_classes, name, sgd)
        single = np.flatnonzero(sizes == 1)
        if smallest > 1 and self.config.batch_size == 1:
            raise ModelError(f"--batch-size must be 0 or >= 2, got 1: --model {name} cannot train on one sample")
        if smallest > 1 and len(single):
            first = ", ".join(map(str, single[:5])) + (f" and {len(single) - 5} more" * (len(single) > 5))
            raise ModelError(
                f"--model {name} cannot train on one sample, and that is all that client {first} has:"
                " --min-samples 2 (with --partition dirichlet), or fewer --num-clients"
            )
        return smallest, changed
