"""FedAvg's client half on a tiny data set: its arithmetic, and that no client leaves anything to the next."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmpi.algorithm import Algorithm, Client, Server
from fedmpi.config import RunConfig
from fedmpi.core.cohort import sample_cohort
from fedmpi.core.exactsum import ExactSum
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.data import client_data
from fedmpi.data.client_data import ClientData, Samples
from fedmpi.engines.steps import Steps
from fedmpi.errors import ConfigError, ModelError
from fedmpi.fedavg import FedAvg
from fedmpi.halves.visitor import ClientVisitor
from tests.unit.tiny import (
    CPU,
    dense,
    network,
    order_of,
    partition,
    pictures,
    plain,
    play,
    tiny,
    visit,
    visited,
    visitor,
)  # fmt: skip


def at_one_pixel() -> nn.Module:
    """A BatchNorm2d over one pixel per sample."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 4))


def steps(client: ClientVisitor) -> list[tuple[int, list[int]]]:
    """Notes the size and labels of each batch that the engine is given from now on."""
    seen: list[tuple[int, list[int]]] = []
    real = client.engine.epoch

    def epoch(inputs: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        seen.extend((len(batch), batch.tolist()) for batch in torch.split(labels, batch_size))
        return real(inputs, labels, batch_size)

    client.engine.epoch = epoch  # type: ignore[method-assign]
    return seen


def test_samples_come_normalised_in_buffers_of_their_own() -> None:
    data, index = tiny(), partition()
    inputs, labels = ClientData(data, index, CPU).load(0)
    mine = index[0]
    mean, std = (np.array(v, np.float64).reshape(1, 2, 1, 1) for v in (data.mean, data.std))
    np.testing.assert_allclose(inputs.numpy(), (data.train.x[mine] / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert labels.tolist() == data.train.y[mine].tolist()
    assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
    inputs.zero_()
    labels.zero_()
    assert data.train.y[mine].any(), "the data set is left alone"
    test_inputs, _ = Samples(data, data.test, CPU).take(np.arange(2, 5))
    assert test_inputs.shape == (3, 2, 3, 3)


def test_sample_counts_are_the_splits() -> None:
    counts = visitor().num_samples(np.array([2, 0]))
    assert counts.tolist() == [12, 8]
    assert counts.dtype == np.int64


@pytest.mark.parametrize("model", [dense, network])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_result_does_not_depend_on_who_was_trained_before(model: Any, momentum: float) -> None:
    """Dropout, BatchNorm statistics, momentum, order of samples: all of them the client's own."""
    options = {"client_momentum": momentum, "batch_size": 4, "local_epochs": 2}
    client = visitor(model(), **options)
    start = client.back.clone()
    alone = visit(client, 2, start, round_idx=3)
    loss = visited(client, 2, start, round_idx=3).loss
    for before in ([0], [3, 0, 2]):
        other = visitor(model(), **options)
        torch.rand(5)
        for client_id in before:
            visit(other, client_id, start, round_idx=2)
        other.model.eval()  # as an evaluation leaves it
        assert torch.equal(visit(other, 2, start, round_idx=3), alone)
        assert visited(other, 2, start, round_idx=3).loss == loss
    assert not torch.equal(visit(client, 2, start, round_idx=4), alone)
    assert not torch.equal(visit(visitor(model(), seed=1, **options), 2, start, round_idx=3), alone)


def test_the_received_model_is_left_alone() -> None:
    client = visitor()
    start = client.back.clone()
    before = start.clone()
    visit(client, 0, start)
    assert torch.equal(start, before)


def test_training_is_algorithm_1_of_the_paper() -> None:
    """The same steps by torch's own optimizer and autograd."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
    reference = copy.deepcopy(model)
    client = visitor(model, batch_size=5, local_epochs=2, client_lr=0.05, client_momentum=0.5, client_weight_decay=0.01)
    start = client.back.clone()
    loss = visited(client, 2, start, round_idx=1).loss
    end = client.back.clone()
    inputs, labels = ClientData(tiny(), partition(), CPU).load(2)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.5, weight_decay=0.01)
    generator = torch.Generator().manual_seed(derive_seed(0, Stream.BATCHES, 1, 2))
    losses = []
    for _ in range(2):
        order = torch.randperm(12, generator=generator)
        for batch in order.split(5):
            value = functional.cross_entropy(reference(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
    expected = torch.cat([p.detach().reshape(-1) for p in reference.parameters()])
    torch.testing.assert_close(end, expected, rtol=1e-5, atol=1e-6)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "client_id", "sizes"),
    [(5, 2, [5, 5, 2]), (4, 3, [4]), (5, 1, [1]), (100, 2, [12]), (0, 2, [12]), (0, 1, [1]), (1, 3, [1] * 4)],
)
def test_an_epoch_is_every_sample_once_the_remainder_included(
    batch_size: int, client_id: int, sizes: list[int]
) -> None:
    client = visitor(batch_size=batch_size, local_epochs=2)
    seen = steps(client)
    visit(client, client_id, client.back.clone())
    assert [size for size, _ in seen] == sizes * 2
    labels = sorted(tiny().train.y[partition()[client_id]].tolist())
    epochs = [[label for _, batch in half for label in batch] for half in (seen[: len(sizes)], seen[len(sizes) :])]
    assert [sorted(epoch) for epoch in epochs] == [labels, labels]
    if len(labels) == 12:
        assert epochs[0] != epochs[1], "shuffled anew"


class Epochs(Algorithm[RunConfig]):
    def three(self, k: Client) -> None:
        assert k.sgd(epochs=3) == Steps(3, 3.0)

    def none(self, k: Client) -> None:
        assert k.sgd(epochs=0) == Steps(0, 0.0)


def test_epochs_of_the_call_win() -> None:
    client = visitor(cls=Epochs, batch_size=0, local_epochs=1)
    seen = steps(client)
    start = client.back.clone()
    visited(client, 2, start, method="three")
    assert len(seen) == 3
    assert math.isnan(visited(client, 2, start, method="none").loss)
    assert len(seen) == 3
    assert torch.equal(client.back, start)


def test_a_client_without_samples_stays_where_it_was() -> None:
    client = visitor(dense(), sizes=[0, 25])
    start = torch.linspace(-1, 1, len(client.back))
    assert torch.equal(visit(client, 0, start), start)
    assert math.isnan(visited(client, 0, start).loss)


class Noisy(FedAvg):
    def client_update(self, k: Client) -> None:
        k.sgd()
        k.back.w.add_(torch.randn(len(k.back.w)))


@pytest.mark.parametrize("may_defer", [True, False])
def test_a_visit_that_draws_has_generators_of_the_client(may_defer: bool) -> None:
    """Whatever engine takes the steps, and though a single step needs no model: what the visit adds counts."""
    ends = []
    for order in ((0, 1), (1, 0)):
        made = visitor(plain(), cls=Noisy, batch_size=0)
        assert made.engine_note == "fused"
        start = torch.zeros(len(made.back))
        torch.rand(len(order))
        found = {}
        for client_id in order:
            assert not visited(made, client_id, start, may_defer=may_defer).deferred
            found[client_id] = made.back.clone()
        ends.append([found[0], found[1]])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
    for model, cls, deferred in ((plain(), FedAvg, True), (dense(), FedAvg, False), (plain(), Noisy, False)):
        made = visitor(model, cls=cls, batch_size=0)
        assert visited(made, 0, made.back.clone(), may_defer=True).deferred == deferred


def test_batch_norm_of_a_cohort_is_the_closed_form() -> None:
    """Case E1: everybody once, one full batch: the mean of the clients' statistics, weighted by samples.

    running_mean = 0.1 x the mean input over all samples, running_var = 0.9 + 0.1 x the weighted mean of the clients'
    unbiased variances, whatever the step size.
    """
    sizes = [7, 5, 13]
    data = ClientData(tiny(), partition(sizes), CPU)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(18), nn.Linear(18, 4))
    job = play(FedAvg, lambda: copy.deepcopy(model), sizes, rounds=1, batch_size=0, client_lr=0.7)
    flat = [data.load(k)[0].flatten(1).double() for k in range(3)]
    mean = torch.cat(flat).mean(0)
    variance = sum(len(x) * x.var(0) for x in flat) / 25
    norm: Any = job.server.model[1]
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * variance, rtol=0, atol=1e-6)


class Watched(FedAvg):
    def round(self, s: Server) -> None:
        assert s.num_clients == 4
        s.state.setdefault("cohorts", []).append(s.sample(self.config.clients_per_round).tolist())
        before = s.model.w.clone()
        mean = s.mean(s.state["cohorts"][-1], self.client_update)
        s.step("w", mean.w, self.config.server_lr)
        assert torch.equal(s.model.w, (before.double() + 0.25 * mean.w).float())


def test_the_server_half_takes_the_options() -> None:
    job = play(Watched, cohort_size=3, rounds=5, server_lr=0.25, seed=6, client_lr=0.01)
    cohorts = job.server.state["cohorts"]
    assert [record.cohort for record in job.records] == cohorts
    assert {len(cohort) for cohort in cohorts} == {3}
    expected = [sample_cohort(derive_seed(6, Stream.COHORT, round_idx), 4, 3).tolist() for round_idx in range(5)]
    assert cohorts == expected
    assert len(play(FedAvg, rounds=9, target_accuracy=0.01).records) == 1
    assert len(play(FedAvg, rounds=3, target_accuracy=1.0).records) == 3


def test_evaluation_on_some_samples_spreads_them_over_the_test_set() -> None:
    data = tiny()
    total = len(data.test)
    few = client_data.test_evaluator(data, CPU, torch.preserve_format, total // 2)
    assert few.num_samples == total // 2
    every_second, _ = Samples(data, data.test, CPU).take(np.arange(total // 2) * total // (total // 2))
    assert torch.equal(few._load(0, total // 2)[0], every_second)
    with pytest.raises(ConfigError, match=rf"--eval-samples must be in \[1, {total}\]"):
        client_data.test_evaluator(data, CPU, torch.preserve_format, total + 1)


@contextlib.contextmanager
def other_defaults() -> Iterator[None]:
    """What a user's module may set when it is imported."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # as torch.set_default_device("meta")
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("model", [plain, dense, network, pictures])
@pytest.mark.parametrize("batch_size", [0, 4])
def test_no_bit_depends_on_global_defaults(model: Any, batch_size: int) -> None:
    """Through both engines, the step of many clients together, evaluation and the exact sum."""

    def results(made: nn.Module) -> list[Any]:
        client = visitor(made, batch_size=batch_size)
        start = client.back.clone()
        loss: Any = visited(client, 2, start).loss
        end = client.back.clone()
        exact = ExactSum(start, 20, 12)
        exact.add(end, 12)
        if client.groups is not None and batch_size == 0:
            update, losses, finite = client.step_together(order_of(client, [0]), [0], start)
            assert finite
            exact.add_group(update, 8)
            loss = [loss, *losses]
        sums = client_data.test_evaluator(tiny(), CPU, client.memory_format, None).evaluate(client.model, 0, 1)
        return [end.tolist(), loss, exact.mean().tolist(), sums.tolist(), client.engine_note]

    usual = results(model())
    made = model()
    with other_defaults():
        assert results(made) == usual


class Squeezed(nn.Module):
    """Right for every batch but one of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).squeeze()


@pytest.mark.parametrize("model", [network, Squeezed, at_one_pixel])
def test_a_last_batch_of_one_joins_the_one_before_for_a_model_that_cannot_take_it(model: Any) -> None:
    client = visitor(model(), sizes=[9, 5, 11], batch_size=4)
    assert "a last batch of one sample joins the one before it" in client.engine_note
    for client_id in range(3):
        assert math.isfinite(visited(client, client_id, client.back.clone()).loss)
    assert "a last batch" not in visitor(dense()).engine_note


@pytest.mark.parametrize("model", [network, Squeezed])
def test_clients_and_batches_of_one_are_refused_before_the_first_round(model: Any) -> None:
    def made(sizes: list[int], **options: Any) -> ClientVisitor:
        return visitor(model(), sizes=sizes, **options)

    made([5, 0, 3])
    with pytest.raises(
        ModelError, match=r"cannot train on one sample, and that is all that client 1, 3 has: --min-samples 2"
    ):
        made([5, 1, 3, 1])
    with pytest.raises(ModelError, match=r"client 1, 2, 3, 4, 5 and 2 more has: --min-samples 2"):
        made([5, *[1] * 7])
    with pytest.raises(ModelError, match=r"^--batch-size must be 0 or >= 2, got 1: --model cnn cannot train on one"):
        made([5, 3], batch_size=1)


class Wrong(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.layer, self.mode, self.calls = nn.Linear(18, 4), mode, 0
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.steps += 1
        y = self.layer(x.flatten(1))
        if self.mode == "replaced":
            self.scale = self.scale * 0.9
        if self.mode == "boom":
            raise ValueError("boom")
        if self.mode == "asserts":
            assert x.shape[1] == 3, "three channels, please"
        if self.mode == "unpacks":
            _, _, _ = x.shape
        return {"narrow": y[:, :3], "wide": torch.cat([y, y], 1), "tuple": (y, y), "maps": y[:, :, None]}.get(
            self.mode, y.detach() if self.mode == "detached" else y
        )


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("narrow", r"ValueError: its output has shape \(2, 3\), wanted is \(2, 4\)"),
        ("wide", r"its output has shape \(2, 8\), wanted is \(2, 4\)"),
        ("maps", r"its output has shape \(2, 4, 1\)"),
        ("tuple", r"its output is a tuple, wanted is a tensor of shape \(2, 4\)"),
        ("detached", "RuntimeError: element 0 of tensors does not require grad"),
        ("asserts", r"AssertionError: three channels, please.* \(test_fedavg.py, line \d+\)"),
        ("unpacks", r"ValueError: too many values to unpack"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_one_line_before_the_first_round(mode: str, said: str) -> None:
    start = r"^--model cnn cannot train on 2 samples of shape \(2, 3, 3\): "
    with pytest.raises(ModelError, match=rf"{start}.*{said}") as caught:
        visitor(Wrong(mode))
    assert "\n" not in str(caught.value)


def test_a_tensor_that_leaves_the_vector_is_found_before_the_first_round() -> None:
    with pytest.raises(ModelError, match="training replaced 'scale'"):
        visitor(Wrong("replaced"))


def test_a_crash_of_the_users_own_is_left_to_training() -> None:
    """There it is told with its client and round."""
    client = visitor(Wrong("boom"))
    with pytest.raises(ValueError, match="boom"):
        visit(client, 0, client.back.clone())


def test_the_trial_leaves_no_trace() -> None:
    model = Wrong("fine")
    state = torch.get_rng_state()
    before = torch.cat([model.layer.weight.detach().flatten(), model.layer.bias.detach(), torch.ones(1)])
    client = visitor(model)
    assert torch.equal(client.back, before)
    assert (model.calls, int(model.steps)) == (0, 0)
    assert torch.equal(torch.get_rng_state(), state)


MODELS: list[nn.Module] = []


class Hooked(FedAvg):
    def client_update(self, k: Client) -> None:
        if k.round_idx == 1:
            MODELS[-1][1].weight.register_hook(torch.zeros_like)  # type: ignore[index]  # a Sequential
        k.sgd()


def test_a_visit_that_hooks_into_a_fused_model_is_found() -> None:
    MODELS.append(plain())
    made = visitor(MODELS[-1], cls=Hooked)
    start = made.back.clone()
    visit(made, 0, start)
    with pytest.raises(ModelError, match=r"1.weight has a hook.*--engine eager"):
        visit(made, 0, start, round_idx=1)


@pytest.mark.parametrize("batch_size", [3, 0])
def test_a_hook_that_comes_after_the_choice_is_found(batch_size: int) -> None:
    """Also where clients of one step are taken together."""
    made = visitor(plain(), batch_size=batch_size)
    start = made.back.clone()
    made.model[1].register_forward_hook(lambda module, inputs, output: output.clamp(-0.05, 0.05))
    with pytest.raises(ModelError, match=r"has a hook.*--engine eager"):
        visit(made, 0, start)
    with pytest.raises(ModelError, match=r"has a hook.*--engine eager"):
        made.step_together(order_of(made, [0, 2]), [0, 2], start)


@pytest.mark.parametrize("batch_size", [300_000_000, 10**13, 10**30])
@pytest.mark.parametrize("model", [plain, dense])
def test_a_batch_size_beyond_the_client_is_the_clients_size(model: Any, batch_size: int) -> None:
    ends = []
    for size in (batch_size, 0):
        client = visitor(model(), batch_size=size, local_epochs=2)
        ends.append(visit(client, 2, client.back.clone()))
    assert torch.equal(*ends)
