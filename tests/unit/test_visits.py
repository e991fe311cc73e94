"""What one client leaves behind does not reach the next, or is refused by name."""

from __future__ import annotations

import dataclasses
import logging
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedmpi import ClientSGDTrainer, ClientTrainer
from fedmpi.core.evaluate import Evaluator
from fedmpi.core.order import MessageCode, Order
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.errors import ConfigError, ModelError
from fedmpi.fedlab.visits import LeakCheck, TrainerVisitor

NO_STATE = np.empty(0, np.int64)


def batches(client_id: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(client_id)
    return [(torch.randn(3, 2, generator=generator), torch.tensor([0, 1, 0])) for _ in range(2 + client_id)]


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Counting(Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) / self.calls


class Listing(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.sums: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sums.append(float(x.detach().sum()))
        return super().forward(x) * (1 + sum(self.sums))


class Noisy(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + float(self.rng.normal()))


class Recurrent(Linear):
    hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = super().forward(x) * (1 if self.hidden is None else 1 + self.hidden.detach().mean())
        return self.hidden


class Hooking(Linear):
    """One more hook at each call, on a layer and on a weight."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.layer.register_forward_hook(lambda module, inputs, output: output * 0.9)
            self.layer.weight.register_hook(lambda gradient: gradient * 0.9)
        return super().forward(x)


class Namespace(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.stats = types.SimpleNamespace(calls=0)

    def forward(self, x: Tensor) -> Tensor:
        self.stats.calls += 1
        return super().forward(x) / self.stats.calls


def defaults() -> Linear:
    """A list that is a default value, in a class of its own."""

    class Defaults(Linear):
        def forward(self, x: Tensor, calls: list[int] = []) -> Tensor:  # noqa: B006  # the very thing
            calls.append(1)
            return super().forward(x) / len(calls)

    return Defaults()


class Lazy(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "mean"):
            self.mean = float(x.mean())
        return super().forward(x - self.mean)


def sgd_trainer(model: nn.Module, cls: type[ClientSGDTrainer] = ClientSGDTrainer, **fields: Any) -> ClientSGDTrainer:
    trainer = cls(model, batches, 1, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss())
    for name, value in fields.items():
        setattr(trainer, name, value)
    return trainer


def bits(visits: TrainerVisitor, start: Tensor, *clients: int) -> list[bytes]:
    """Return what clients come to, one after the other."""

    def trained(client_id: int) -> bytes:
        visits.train(0, client_id, start, NO_STATE)
        return visits.back.numpy().tobytes()

    return [trained(client_id) for client_id in clients]


@pytest.mark.parametrize("model", [Counting, Listing, Noisy, Recurrent, Lazy, Hooking, Namespace, defaults])
def test_what_a_model_keeps_does_not_reach_the_next_client(model: Callable[[], Linear]) -> None:
    start = sgd_trainer(Linear()).model_parameters.clone()
    alone = bits(TrainerVisitor(sgd_trainer(model())), start, 3)
    after_others = bits(TrainerVisitor(sgd_trainer(model())), start, 1, 0, 2, 3)
    assert after_others[-1] == alone[0]
    assert alone != bits(TrainerVisitor(sgd_trainer(Linear())), start, 3), "and it does decide something"


def test_what_changes_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("fedmpi"), "propagate", True)
    trainer = sgd_trainer(Counting())
    bits(TrainerVisitor(trainer), trainer.model_parameters.clone(), 0, 1, 2)
    assert [record.message for record in caplog.records] == [
        "model: training changes 'calls', put back before each client (a buffer would travel)"
    ]


class InPlace(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


@pytest.mark.parametrize("model", [Counting, Noisy, Recurrent, InPlace])
def test_what_a_model_keeps_does_not_reach_the_next_chunk(model: type[Linear]) -> None:
    """The sums over the shares of two ranks are those of one rank, which takes the chunks one after the other."""
    x = torch.randn(450, 2, generator=torch.Generator().manual_seed(1))
    evaluator = Evaluator(450, lambda start, stop: (x[start:stop], (x[start:stop, 0] > 0).long()))
    visits = TrainerVisitor(sgd_trainer(model()))
    vector = visits.trainer.model_parameters.clone()

    def renewal(visits: TrainerVisitor, vector: Tensor) -> Callable[[int], None] | None:
        def seed_of(chunk: int) -> int:
            return derive_seed(0, Stream.EVALUATION, 0, chunk)

        return visits.isolation.renewal(vector, NO_STATE, seed_of)

    def evaluated(share: int, num_shares: int) -> Any:
        bits(visits, vector, share)  # whoever was here before
        return evaluator.evaluate(visits.trainer.model, share, num_shares, renewal(visits, vector))

    assert (evaluated(0, 2) + evaluated(1, 2)).tolist() == evaluated(0, 1).tolist()


class Forgetful(ClientSGDTrainer):
    """Does not load what it is given."""

    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        for x, y in self.data_loader:
            self.optimizer.zero_grad()
            self.criterion(self.model(x), y).backward()
            self.optimizer.step()


class Unseeded(ClientSGDTrainer):
    """Leaves the inherited method out, and draws."""

    def begin_client(self, round_idx: int, client_id: int) -> None:
        self.data_loader = [(x + torch.randn(2), y) for x, y in batches(client_id)]


class Accumulating(ClientSGDTrainer):
    """Clears the gradient behind each step but the last."""

    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        for x, y in self.data_loader:
            self.criterion(self.model(x), y).backward()
            if self.client_id != 1:
                self.optimizer.step()
                self.optimizer.zero_grad()


@pytest.mark.parametrize("cls", [Forgetful, Unseeded, Accumulating])
def test_what_a_trainer_leaves_out_is_done_for_it(cls: type[ClientSGDTrainer]) -> None:
    start = sgd_trainer(Linear()).model_parameters.clone()
    alone = bits(TrainerVisitor(sgd_trainer(Linear(), cls)), start, 3)
    assert bits(TrainerVisitor(sgd_trainer(Linear(), cls)), start, 1, 0, 2, 3)[-1] == alone[0]


def test_a_replaced_tensor_is_refused_after_the_visit() -> None:
    class Renormed(Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.layer.weight.data = torch.renorm(self.layer.weight.data, 2, 0, 1.0)
            return super().forward(x)

    visits = TrainerVisitor(sgd_trainer(Renormed()))
    with pytest.raises(ModelError, match=r"layer\.weight"):
        bits(visits, visits.trainer.model_parameters.clone(), 0)


def order(*cohort: int) -> Order:
    ids = np.array(cohort, np.int64)
    return Order(MessageCode.PARAMETER_UPDATE, cohort=ids, ranks=ids * 0, weights=ids * 0 + 1, unit_max=ids[:1] * 0 + 1)


def try_leaks(trainer: ClientTrainer, *cohort: int) -> None:
    visits = TrainerVisitor(trainer)
    check = LeakCheck(visits)
    start = trainer.model_parameters.clone()
    visits.train(0, cohort[0], start, NO_STATE)
    check.after_visit(order(*cohort), start)


class Kept(ClientSGDTrainer):
    """Begins where the client ended last time."""

    kept: dict[int, Tensor]

    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        super().train(self.kept.get(self.client_id, model_parameters), epochs)
        self.kept[self.client_id] = self.model_parameters.clone()


class MixedAfter(ClientSGDTrainer):
    """Mixes the client's last model in behind the training: its own last model is a fixed point of that."""

    kept: dict[int, Tensor]

    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        super().train(model_parameters, epochs)
        if self.client_id in self.kept:
            self.model_parameters.lerp_(self.kept[self.client_id], 0.1)
        self.kept[self.client_id] = self.model_parameters.clone()


class Previous(ClientSGDTrainer):
    """Whoever was here before."""

    previous: Tensor | None = None

    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        start = model_parameters if self.previous is None else model_parameters.lerp(self.previous, 0.1)
        super().train(start, epochs)
        self.previous = self.model_parameters.clone()


class Decaying(ClientSGDTrainer):
    visits = 0

    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        self.visits += 1
        self.optimizer.param_groups[0]["lr"] = 0.1 / self.visits
        super().train(model_parameters, epochs)


class WarmingUp(ClientSGDTrainer):
    """Only its very first client is another."""

    warm = False

    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        self.optimizer.param_groups[0]["lr"] = 0.1 if self.warm else 0.01
        self.warm = True
        super().train(model_parameters, epochs)


class OwnOptimizer(ClientSGDTrainer):
    own: torch.optim.Optimizer

    def train(self, model_parameters: Tensor) -> None:  # type: ignore[override]  # the page's trainers have no epochs
        for x, y in self.data_loader:
            self.own.zero_grad()
            self.criterion(self.model(x), y).backward()
            self.own.step()


def own_optimizer() -> OwnOptimizer:
    trainer = sgd_trainer(Linear(), OwnOptimizer)
    assert isinstance(trainer, OwnOptimizer)
    trainer.own = torch.optim.SGD(trainer.model.parameters(), 0.1, momentum=0.9)
    return trainer


class Drawing(ClientSGDTrainer):
    rng: np.random.Generator

    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        self.optimizer.param_groups[0]["lr"] = float(self.rng.uniform())
        super().train(model_parameters, epochs)


class Moody(nn.Module):
    """A loss that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        self.scale *= 0.9
        return nn.functional.cross_entropy(outputs, labels) * self.scale


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: sgd_trainer(Linear(), Kept, kept={}), "kept"),
        (lambda: sgd_trainer(Linear(), MixedAfter, kept={}), "kept"),
        (lambda: sgd_trainer(Linear(), Previous), "previous"),
        (lambda: sgd_trainer(Linear(), Previous, previous=None), "previous"),
        (lambda: sgd_trainer(Linear(), Decaying), "visits"),
        (lambda: sgd_trainer(Linear(), WarmingUp), "warm"),
        (own_optimizer, "own"),
        (lambda: sgd_trainer(Linear(), Drawing, rng=np.random.default_rng(0)), "rng"),
        (lambda: sgd_trainer(Linear(), criterion=Moody()), "criterion"),
    ],
)
@pytest.mark.parametrize("cohort", [(0, 1, 2), (2,)])
def test_a_trainer_that_hands_something_on_is_refused_by_name(
    make: Callable[[], ClientTrainer], name: str, cohort: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match=rf"keeps '{name}' from client to client.*--leak-check off"):
        try_leaks(make(), *cohort)


class FromSecondRound(Decaying):
    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        if self.round_idx:
            super().train(model_parameters, epochs)
        else:
            ClientSGDTrainer.train(self, model_parameters, epochs)


def test_what_begins_to_change_later_is_tried_then() -> None:
    trainer = sgd_trainer(Linear(), FromSecondRound)
    visits = TrainerVisitor(trainer)
    check, start = LeakCheck(visits), trainer.model_parameters.clone()
    for round_idx in (0, 0, 1):
        visits.train(round_idx, 0, start, NO_STATE)
        here = dataclasses.replace(order(0, 1, 2), round_idx=round_idx)
        if round_idx:
            with pytest.raises(ConfigError, match="keeps 'visits'"):
                check.after_visit(here, start)
        else:
            check.after_visit(here, start)


class WritesInto(ClientSGDTrainer):
    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        super().train(model_parameters, epochs)
        model_parameters.mul_(0.5)


def test_the_vector_that_was_sent_stays_for_the_next_client() -> None:
    trainer = sgd_trainer(Linear(), WritesInto)
    start = trainer.model_parameters.clone()
    first = bits(TrainerVisitor(trainer), start, 1, 0, 1)
    assert first[0] == first[2]


class Logging(ClientSGDTrainer):
    """Keeps what decides nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.losses: dict[int, float] = {}
        self.last: Tensor | None = None

    def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
        super().train(model_parameters, epochs)
        self.losses[self.client_id], self.last = self.loss, self.model_parameters.clone()


def test_what_decides_nothing_may_be_kept() -> None:
    trainer = sgd_trainer(Linear(), Logging)
    assert isinstance(trainer, Logging)
    try_leaks(trainer, 1, 0, 2)
    assert list(trainer.losses) == [1], "the trial leaves no trace"


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_our_own_trainers_keep_nothing(momentum: float) -> None:
    trainer = sgd_trainer(Linear())
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1, momentum=momentum)
    try_leaks(trainer, 0, 1)


def test_the_fields_that_do_not_count_are_those_there_are() -> None:
    held = set(vars(sgd_trainer(Linear())))
    assert held - ClientSGDTrainer.own_fields == {"criterion"}
    assert ClientSGDTrainer.own_fields - held - {"engine_note"} == set()
    assert ClientTrainer.own_fields < ClientSGDTrainer.own_fields
