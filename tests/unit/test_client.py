"""What a client's author sees: local SGD with its arguments, the door behind it, and steps that are put off."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmpi.algorithm import Algorithm, Client, Clip, Server, Transform
from fedmpi.config import RunConfig
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.data.client_data import ClientData
from fedmpi.engines.steps import Steps
from fedmpi.errors import ConfigError, ModelError
from fedmpi.fedavg import FedAvg
from fedmpi.options import option
from tests.unit.tiny import CPU, Job, dense, network, partition, plain, play, tiny, visit, visited, visitor

Act = Callable[[Client], Any]


def author(act: Act, **members: Any) -> type[FedAvg]:
    """Return an algorithm whose clients do `act`."""

    def client_update(self: FedAvg, k: Client) -> None:
        act(k)

    return type("Own", (FedAvg,), {"client_update": client_update, "__module__": __name__, **members})


def end(act: Act, model: Callable[[], nn.Module] = plain, client_id: int = 2, **options: Any) -> Tensor:
    """Return what a client that does `act` sends back."""
    made = visitor(model(), cls=author(act), **options)
    return visit(made, client_id, made.back.clone())


def by_torch(  # the same by torch's own optimizer
    model: nn.Module, start: Tensor | None, terms: Callable[[Tensor], Tensor], lr: float, epochs: int, momentum: float,
    still: Sequence[str] = (), client_id: int = 2,
) -> Tensor:  # fmt: skip
    """Return the (T,) weights after SGD in float64 along the gradient plus `terms(w)`, batches of 5."""
    model = copy.deepcopy(model).double()
    params = dict(model.named_parameters())
    sizes = [param.numel() for param in params.values()]
    if start is not None:
        for param, part in zip(params.values(), torch.split(start.double(), sizes), strict=True):
            param.data = part.view(param.shape).clone()
    optimizer = torch.optim.SGD([p for name, p in params.items() if name not in still], lr, momentum)
    inputs, labels = ClientData(tiny(), partition(), CPU).load(client_id)
    shuffles = torch.Generator().manual_seed(derive_seed(0, Stream.BATCHES, 0, client_id))
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=shuffles).split(5):
            loss = functional.cross_entropy(model(inputs[batch].double()), labels[batch])
            w = torch.cat([param.reshape(-1) for param in params.values()])
            gradients = torch.autograd.grad(loss, list(params.values()))
            more = torch.split(terms(w.detach()), sizes)
            for param, gradient, term in zip(params.values(), gradients, more, strict=True):
                param.grad = gradient + term.view(param.shape)
            optimizer.step()
    return torch.cat([param.detach().reshape(-1) for param in params.values()])


def vector(seed: int, size: int = 188) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.1


ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "start": {"start": vector(1)},
    "prox": {"prox": 0.5},
    "anchor": {"prox": 0.5, "anchor": vector(2)},
    "drift": {"drift": vector(3)},
    "epochs": {"epochs": 3},
    "lr": {"lr": 0.02},
    "only": {"only": "3.*"},
    "all": {"start": vector(1), "prox": 0.3, "anchor": vector(2), "drift": vector(3), "epochs": 2, "lr": 0.03},
}


@pytest.mark.parametrize("engine", ["eager", "fused"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_sgd_is_torchs_with_the_terms_written_out(name: str, momentum: float, engine: str) -> None:
    arguments = {"prox": 0.0, "drift": torch.zeros(188), "epochs": 2, "lr": 0.1, **ARGUMENTS[name]}
    sent = torch.cat([param.detach().reshape(-1) for param in plain().parameters()])
    anchor = arguments.get("anchor", sent).double()

    def terms(w: Tensor) -> Tensor:
        return arguments["prox"] * (w - anchor) + arguments["drift"].double()

    steps: list[Steps] = []
    options = {"batch_size": 5, "local_epochs": 2, "client_momentum": momentum, "engine": engine}
    found = end(lambda k: steps.append(k.sgd(**ARGUMENTS[name])), **options)
    still = ["1.weight", "1.bias"] if "only" in arguments else []
    settings = arguments["lr"], arguments["epochs"], momentum, still
    wanted = by_torch(plain(), arguments.get("start"), terms, *settings)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, sent)
    if still:
        assert torch.equal(found[:152], sent[:152]), "not a bit"
    assert steps[0].count == 3 * arguments["epochs"]
    if not momentum and not arguments["prox"]:
        assert steps[0].scale == steps[0].count


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_no_pull_and_no_drift_are_plain_steps_bit_for_bit(engine: str) -> None:
    options = {"batch_size": 5, "local_epochs": 2, "client_momentum": 0.9, "engine": engine}
    usual = end(lambda k: k.sgd(), **options)
    for act in (
        lambda k: k.sgd(prox=0.0, anchor=vector(2)), lambda k: k.sgd(start=k.sent.w, drift=None),
        lambda k: k.sgd(start=k.sent.w.clone(), lr=0.1, epochs=2, only="*"),
    ):  # fmt: skip
        assert torch.equal(end(act, **options), usual)


def test_an_anchor_in_the_clients_own_memory_is_taken_before_the_steps() -> None:
    def act(k: Client) -> None:
        k.back.w.copy_(vector(2))
        k.sgd(prox=0.5, anchor=k.back.w)

    assert torch.equal(end(act, batch_size=5), end(lambda k: k.sgd(prox=0.5, anchor=vector(2)), batch_size=5))


@pytest.mark.parametrize("name", ["start", "anchor", "drift"])
@pytest.mark.parametrize("wrong", [torch.zeros(1), torch.zeros(187), torch.zeros(188, 1)])
def test_vectors_of_another_shape_are_refused(name: str, wrong: Tensor) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must have the shape of k.sent.w, \(188,\), got \("):
        end(lambda k: k.sgd(prox=0.1, **{name: wrong}))
    with pytest.raises(ConfigError, match=r"^at must have the shape of k.sent.w"):
        end(lambda k: k.evaluate(wrong))


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match=r"only='head.\*' matches no trainable parameter of the model \(1.weight, "):
        end(lambda k: k.sgd(only="head.*"))


# the door behind sgd


def three_lines(k: Client) -> None:
    for batch in k.batches():
        k.back.w.add_(k.gradient(batch), alpha=-0.1)


@pytest.mark.parametrize("batch_size", [5, 1, 0])
@pytest.mark.parametrize("model", [plain, dense, network])
def test_three_lines_have_the_bits_of_the_eager_engine(model: Callable[[], nn.Module], batch_size: int) -> None:
    options = {"batch_size": max(batch_size, 2) if model is network else batch_size, "local_epochs": 2}
    options["engine"] = "eager"  # type: ignore[assignment]  # text
    assert torch.equal(end(three_lines, model, **options), end(lambda k: k.sgd(), model, **options))


def test_batches_are_those_of_sgd_and_of_the_pass() -> None:
    seen: list[list[list[int]]] = []

    def act(k: Client) -> None:
        seen.extend([[batch.labels.tolist() for batch in k.batches(count)] for count in (2, 1)])
        assert [len(batch.inputs) for batch in k.batches()] == [5, 5, 2]

    end(act, batch_size=5)
    first, second = seen
    labels = sorted(tiny().train.y[partition()[2]].tolist())
    for one_pass in (first[:3], first[3:], second):
        assert sorted(itertools.chain.from_iterable(one_pass)) == labels
    assert first[:3] != second, "a second loop has an order of its own"


def test_gradient_and_loss_at_another_vector_leave_the_client_as_it_was() -> None:
    def act(k: Client) -> None:
        before, elsewhere = k.back.flat.clone(), k.sent.w + 0.5
        batch = next(k.batches())
        there, loss = k.gradient(batch, elsewhere), k.loss(batch, at=elsewhere)
        metrics = k.evaluate(elsewhere), k.evaluate()
        assert torch.equal(k.back.flat, before)
        here = k.gradient(batch)
        k.back.w.copy_(elsewhere)
        assert torch.equal(k.gradient(batch), there)
        assert not torch.equal(here, there)
        assert k.loss(batch) == loss
        k.back.b.copy_(k.sent.b)
        assert k.evaluate() == metrics[0] != metrics[1]
        assert metrics[0].num_samples == k.num_samples

    end(act, network)
    end(act, plain)


def test_evaluation_leaves_training_mode_and_counters_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(18, 4)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x.flatten(1)) * (1 if self.training else 2)

    def act(k: Client) -> None:
        k.evaluate()
        k.sgd()

    assert torch.equal(end(act, Counting), end(lambda k: k.sgd(), Counting))
    job = play(author(act), Counting, rounds=1, batch_size=0)
    assert job.integers.tolist() == [1]


def test_a_client_without_samples_has_no_metrics_and_no_batches() -> None:
    def act(k: Client) -> None:
        assert list(k.batches()) == []
        assert k.sgd() == Steps(0, 0.0)
        metrics = k.evaluate()
        assert (math.isnan(metrics.accuracy), math.isnan(metrics.loss), metrics.num_samples) == (True, True, 0)

    end(act, client_id=0, sizes=[0, 25])


def test_what_was_sent_is_read_only() -> None:
    for act in (
        lambda k: k.sent.w.add_(1), lambda k: k.sent.flat.zero_(), lambda k: k.sent["w"][:1].fill_(0),
        lambda k: (k.sgd(), k.sent.w.mul_(1)),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=r"^Own writes into k.sent, which other clients read: copy it first$"):
            end(act, batch_size=0)
    for name in ("w", "b", "vector"):
        with pytest.raises(AttributeError):
            end(lambda k, name=name: setattr(k.back, name, torch.zeros(188)))  # type: ignore[misc]  # a default


def test_generators_are_those_of_the_client_and_end_where_they_began() -> None:
    def act(k: Client) -> None:
        k.back.w.add_(torch.randn(188, generator=k.generator("noise")))

    other = visitor(plain(), cls=author(act))
    start = other.back.clone()
    visit(other, 0, start)
    assert torch.equal(visit(other, 2, start), end(act))
    assert not torch.equal(visit(other, 2, start, round_idx=1), end(act))
    assert not torch.equal(visit(other, 2, start, exchange_idx=1), end(act))


@pytest.mark.parametrize("model", [plain, dense])
def test_a_second_exchange_has_other_batches(model: Callable[[], nn.Module]) -> None:
    made = visitor(model(), batch_size=5)
    start = made.back.clone()
    ends = [visit(made, 2, start, exchange_idx=idx) for idx in (0, 1, 2, 0)]
    assert torch.equal(ends[0], ends[3])
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


# steps that are put off


ONE_STEP = {"batch_size": 0, "client_lr": 0.3}


@pytest.mark.parametrize(
    ("act", "deferred"),
    [
        (lambda k: k.sgd(), True),
        (lambda k: k.sgd(prox=0.5), True),
        (lambda k: k.sgd(prox=0.5, anchor=k.sent.w), True),
        (lambda k: k.sgd(start=k.sent.w, epochs=1), True),
        (lambda k: (k.sgd(), k.report(h=k.num_samples), k.generator("x"), k.sent.w.sum()), True),
        (lambda k: k.sgd(epochs=2), False),
        (lambda k: k.sgd(lr=0.3), False),
        (lambda k: k.sgd(drift=torch.zeros(188)), False),
        (lambda k: k.sgd(start=k.sent.w.clone()), False),
        (lambda k: k.sgd(prox=0.5, anchor=k.sent.w.clone()), False),
        (lambda k: k.sgd(only="*"), False),
        (lambda k: (k.sgd(), k.back), False),
        (lambda k: (k.back.w.add_(1), k.sgd()), False),
        (lambda k: (k.sgd(), k.sgd()), False),
        (lambda k: (k.sgd(), k.loss_value), False),
        (lambda k: (k.sgd(), k.evaluate()), False),
        (lambda k: (k.sgd(), next(k.batches())), False),
        (lambda k: None, False),
    ],
)
def test_only_a_plain_single_step_that_nothing_reads_is_put_off(act: Act, deferred: bool) -> None:
    made = visitor(plain(), cls=author(act), **ONE_STEP)
    start = made.back.clone()
    assert visited(made, 2, start, may_defer=True).deferred == deferred
    for other in ({"batch_size": 11}, {"group_clients": 1}, {"engine": "eager"}):
        made = visitor(plain(), cls=author(act), **{**ONE_STEP, **other})
        assert not visited(made, 2, start, may_defer=True).deferred
    made = visitor(plain(), cls=author(act, transforms=(Clip(1.0),)), **ONE_STEP)
    assert not visited(made, 2, start, may_defer=True).deferred


def test_reading_what_goes_back_takes_the_step_with_its_arguments() -> None:
    def reading(k: Client) -> None:
        assert k.sgd(prox=0.7) == Steps(1, 1.0)
        w = k.back.w.clone()
        assert not torch.equal(w, k.sent.w)
        k.report(loss=k.loss_value)

    made = visitor(plain(), cls=author(reading), **ONE_STEP)
    start = made.back.clone()
    seen = visited(made, 2, start, may_defer=True)
    assert torch.equal(made.back, end(lambda k: k.sgd(), **ONE_STEP, group_clients=1))
    assert seen.reported["loss"] == seen.loss


def noisy(k: Client) -> None:
    k.sgd(prox=0.1)
    k.back.w.add_(torch.randn(188, generator=k.generator("noise")), alpha=0.01)


@dataclasses.dataclass(frozen=True)
class ClipConfig(RunConfig):
    largest: float = option(0.05, "largest length of an update", "Federation", "(0, inf)")


class Clipped(FedAvg):
    Config = ClipConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transforms = (Clip(config.largest),)


def pair(cls: type[Algorithm[Any]], **options: Any) -> tuple[Job, Job]:
    """Return the same job with every client by itself and in groups."""
    one, other = (play(cls, **{**ONE_STEP, **options, "group_clients": count}) for count in (1, 32))
    assert one.code == other.code
    return one, other


@pytest.mark.parametrize("options", [{}, {"local_epochs": 2, "batch_size": 5}])
def test_noise_on_what_goes_back_and_a_clip_have_the_bits_of_the_ungrouped_run(options: Any) -> None:
    for cls in (author(noisy), Clipped):
        one, other = pair(cls, **options, rounds=3)
        assert one.bits == other.bits
        assert [record.train_loss for record in one.records] == [record.train_loss for record in other.records]


def test_a_clip_by_hand() -> None:
    """Two updates of lengths 1 and 5, clipped to 2: 1 and 2; a clip beyond all of them changes no bit."""

    class Lengths(Clipped):
        def client_update(self, k: Client) -> None:
            k.back.w[k.id] += (1.0, 5.0)[k.id]

    job = play(Lengths, sizes=[3, 3], rounds=1, largest=2.0, prepare=lambda server: server.flat.zero_())
    assert job.server.flat[:3].tolist() == pytest.approx([0.5, 1.0, 0.0])
    wide = play(Clipped, rounds=2, largest=1e9)
    assert wide.bits == play(FedAvg, rounds=2, group_clients=1).bits
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="a clip's largest length must be > 0"):
            Clip(wrong)


def test_transforms_are_undone_in_reverse() -> None:
    class Times(Transform):
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def encode(self, k: Client) -> None:
            k.back.w.copy_(k.sent.w + (k.back.w - k.sent.w + self.factor) * self.factor)

        def decode(self, s: Server, result: Any) -> None:
            result.w.div_(self.factor).sub_(self.factor)

    job = play(author(lambda k: k.back.w.add_(1.0), transforms=(Times(2.0), Times(4.0))), rounds=1,
               prepare=lambda server: server.flat.zero_())  # fmt: skip
    assert job.server.flat.tolist() == pytest.approx([1.0] * 188)


# groups


@pytest.mark.parametrize("size", [1, 6, 100, 127])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
def test_groups_of_large_mean_updates_equal_the_clients_one_by_one(size: float, weight_decay: float) -> None:
    """The step size makes the mean update's largest entry `size`; some clients' own are larger than 2^7 then."""

    class Once(FedAvg):
        def round(self, s: Server) -> None:
            s.state["mean"] = s.mean(np.arange(s.num_clients), self.client_update).w

    options: dict[str, Any] = {"rounds": 1, "sizes": [6, 1, 9, 5, 4], "client_weight_decay": weight_decay}
    unit = play(Once, **{**options, "batch_size": 0, "client_lr": 1.0, "group_clients": 1}).server.state["mean"]
    one, other = pair(Once, **options, client_lr=size / float(unit.abs().max()))
    alone, together = (job.server.state["mean"] for job in (one, other))
    assert float(alone.abs().max()) == pytest.approx(size, rel=1e-4)
    assert (alone - together).abs().max() <= 64 * 2**-24 * size
    assert one.records[0].train_loss == pytest.approx(other.records[0].train_loss, rel=1e-6)


def test_groups_with_weights_that_are_no_sample_counts_one_of_them_zero() -> None:
    weights = [0.3, 0.0, 1.7, 0.01]

    class Weighted(FedAvg):
        def round(self, s: Server) -> None:
            for ask in (s.mean, s.total):
                s.state[ask.__name__] = ask([0, 1, 2, 3], self.client_update, weights).w
            s.state["without"] = s.mean([0, 2, 3], self.client_update, [0.3, 1.7, 0.01]).w

    one, other = pair(Weighted, rounds=1, client_weight_decay=0.01)
    for name, alone in one.server.state.items():
        torch.testing.assert_close(other.server.state[name], alone, rtol=1e-5, atol=1e-7)
    kept = other.server.state
    torch.testing.assert_close(kept["total"], kept["mean"] * math.fsum(weights), rtol=1e-6, atol=1e-9)
    assert other.records[0].cohort == [0, 1, 2, 3], "also the one of weight 0 was visited"


@pytest.mark.parametrize("weight", [None, [1, 1, 0, 1]])
@pytest.mark.parametrize("count", [1, 32])
def test_a_client_that_is_not_finite_is_named_alone_also_if_it_weighs_nothing(count: int, weight: Any) -> None:
    class Weighted(FedAvg):
        def round(self, s: Server) -> None:
            s.step("w", s.mean([0, 1, 2, 3], self.client_update, weight).w)

    with pytest.MonkeyPatch.context() as patch:
        real = ClientData.take

        def take(self: ClientData, indices: Any) -> tuple[Tensor, Tensor]:
            inputs, labels = real(self, indices)
            inputs[np.isin(indices, partition()[2][:1])] = math.inf
            return inputs, labels

        patch.setattr(ClientData, "take", take)
        patch.setattr(ClientData, "load", lambda self, k, order=None: self.take(
            self.partition[k] if order is None else self.partition[k][order]))  # fmt: skip
        job = play(Weighted, rounds=3, **ONE_STEP, group_clients=count)
    assert job.code == 3
    assert str(job.failure) == (
        "client 2's model is not finite after training in round 0: lower --client-lr; no round was good"
    )
    assert job.records == []


def test_reports_of_clients_in_groups_arrive() -> None:
    def act(k: Client) -> None:
        k.sgd()
        k.report(id=k.id, noise=torch.rand(1).item())

    one, other = pair(author(act), rounds=2)
    assert [record.reported for record in one.records] == [record.reported for record in other.records]
    for record, twin in zip(one.records, other.records, strict=True):
        assert record.train_loss == pytest.approx(twin.train_loss, rel=1e-5)
        assert (record.bytes_down, record.bytes_up, record.cohort) == (twin.bytes_down, twin.bytes_up, twin.cohort)


def test_bytes_are_those_of_a_real_federation() -> None:
    """Four clients: 188 weights down and up, a segment of 188 down only, one of 3 up only."""
    job = play(author(lambda k: k.sgd(), extra={"m": ("T", "down"), "h": (3, "up")}), rounds=1)
    assert (job.records[0].bytes_down, job.records[0].bytes_up) == (4 * 4 * 376, 4 * 4 * 191)
