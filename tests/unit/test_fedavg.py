"""FedAvg's client half on a tiny data set: its arithmetic, and that no client leaves anything to the next."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmpi.config import RunConfig
from fedmpi.core.exactsum import ExactSum
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.data import client_data
from fedmpi.data.client_data import ClientData, Samples
from fedmpi.data.datasets import Dataset, Split
from fedmpi.data.split import PartitionIndex
from fedmpi.errors import ConfigError, ModelError
from fedmpi.fedavg import FEDAVG, FedAvgTrainer, fedavg_handler

CPU = torch.device("cpu")
SIZES = [8, 1, 12, 4]


def tiny() -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (25, 2, 3, 3), np.uint8)
    y = rng.integers(0, 4, 25).astype(np.int64)
    return Dataset("tiny", Split(x, y), Split(x[:9], y[:9]), 4, (0.4, 0.6), (0.2, 0.3), "")


def partition(sizes: Sequence[int] = SIZES) -> PartitionIndex:
    return PartitionIndex(np.cumsum([0, *sizes]), np.random.default_rng(1).permutation(25))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))


def pictures() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 4))


def at_one_pixel() -> nn.Module:
    """A BatchNorm2d over one pixel per sample."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 4))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, 4))


def trainer(model: nn.Module | None = None, seed: int = 0, **options: Any) -> FedAvgTrainer:
    model = model or dense()
    sizes = [8, 2, 11, 4] if any(isinstance(each, nn.BatchNorm1d) for each in model.modules()) else SIZES
    made = FedAvgTrainer(model, ClientData(tiny(), partition(sizes), CPU), RunConfig(**options), CPU)
    made.seed = seed
    return made


def visit(client: FedAvgTrainer, client_id: int, start: Tensor, round_idx: int = 0) -> Tensor:
    client.begin_client(round_idx, client_id)
    client.train(start)
    return client.model_parameters.detach().clone()


def steps(client: FedAvgTrainer) -> list[tuple[int, list[int]]]:
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
    counts = trainer().num_samples(np.array([2, 0]))
    assert counts.tolist() == [12, 8]
    assert counts.dtype == np.int64
    assert not trainer().single_client, "any rank can train any client"


@pytest.mark.parametrize("model", [dense, network])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_result_does_not_depend_on_who_was_trained_before(model: Any, momentum: float) -> None:
    """Dropout, BatchNorm statistics, momentum, order of samples: all of them the client's own."""
    options = {"client_momentum": momentum, "batch_size": 4, "local_epochs": 2}
    client = trainer(model(), **options)
    start = client.model_parameters.detach().clone()
    alone = visit(client, 2, start, round_idx=3)
    loss = client.loss
    for before in ([0], [3, 0, 2]):
        other = trainer(model(), **options)
        torch.rand(5)
        for client_id in before:
            visit(other, client_id, start, round_idx=2)
        other.model.eval()  # as an evaluation leaves it
        assert torch.equal(visit(other, 2, start, round_idx=3), alone)
        assert other.loss == loss
    assert not torch.equal(visit(client, 2, start, round_idx=4), alone)
    assert not torch.equal(visit(trainer(model(), seed=1, **options), 2, start, round_idx=3), alone)


def test_the_received_model_is_left_alone() -> None:
    client = trainer()
    start = client.model_parameters.detach().clone()
    before = start.clone()
    visit(client, 0, start)
    assert torch.equal(start, before)


def test_training_is_algorithm_1_of_the_paper() -> None:
    """The same steps by torch's own optimizer and autograd."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 4))
    reference = copy.deepcopy(model)
    client = trainer(model, batch_size=5, local_epochs=2, client_lr=0.05, client_momentum=0.5, client_weight_decay=0.01)
    start = client.model_parameters.detach().clone()
    end = visit(client, 2, start, round_idx=1)
    inputs, labels = ClientData(tiny(), partition(), CPU).load(2)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.5, weight_decay=0.01)
    generator = torch.Generator().manual_seed(derive_seed(0, Stream.BATCHES, 1, 2))
    losses = []
    for _ in range(2):
        order = torch.randperm(12, generator=generator)
        for batch in order.split(5):
            loss = functional.cross_entropy(reference(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    expected = torch.cat([p.detach().reshape(-1) for p in reference.parameters()])
    torch.testing.assert_close(end, expected, rtol=1e-5, atol=1e-6)
    assert client.loss == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "client_id", "sizes"),
    [(5, 2, [5, 5, 2]), (4, 3, [4]), (5, 1, [1]), (100, 2, [12]), (0, 2, [12]), (0, 1, [1]), (1, 3, [1] * 4)],
)
def test_an_epoch_is_every_sample_once_the_remainder_included(
    batch_size: int, client_id: int, sizes: list[int]
) -> None:
    client = trainer(batch_size=batch_size, local_epochs=2)
    seen = steps(client)
    visit(client, client_id, client.model_parameters.detach().clone())
    assert [size for size, _ in seen] == sizes * 2
    labels = sorted(tiny().train.y[partition()[client_id]].tolist())
    epochs = [[label for _, batch in half for label in batch] for half in (seen[: len(sizes)], seen[len(sizes) :])]
    assert [sorted(epoch) for epoch in epochs] == [labels, labels]
    if len(labels) == 12:
        assert epochs[0] != epochs[1], "shuffled anew"


def test_epochs_of_the_call_win() -> None:
    client = trainer(batch_size=0, local_epochs=1)
    seen = steps(client)
    client.begin_client(0, 2)
    client.train(client.model_parameters.detach().clone(), epochs=3)
    assert len(seen) == 3
    client.begin_client(0, 2)
    client.train(client.model_parameters.detach().clone(), epochs=0)
    assert len(seen) == 3
    assert math.isnan(client.loss)


def test_a_client_without_samples_stays_where_it_was() -> None:
    index = PartitionIndex(np.array([0, 0, 25]), np.arange(25))
    client = FedAvgTrainer(dense(), ClientData(tiny(), index, CPU), RunConfig(), CPU)
    start = torch.linspace(-1, 1, len(client.model_parameters))
    assert torch.equal(visit(client, 0, start), start)
    assert math.isnan(client.loss)


def test_a_derived_trainer_that_draws_has_generators_of_the_client() -> None:
    """Whatever engine takes the steps, and though a single step needs no model: its own `train` is what runs."""

    class Noisy(FedAvgTrainer):
        def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
            super().train(model_parameters, epochs)
            self.model_parameters.add_(torch.randn(len(self.model_parameters)))

    config = RunConfig(batch_size=0)
    ends = []
    for order in ((0, 1), (1, 0)):
        made = Noisy(plain(), ClientData(tiny(), partition(), CPU), config, CPU)
        assert made.engine_note == "fused"
        assert not made.takes_one_step(0)
        start = torch.zeros(len(made.model_parameters))
        held = {client_id: visit(made, client_id, start) for client_id in order}
        ends.append([held[0], held[1]])
    assert all(torch.equal(*each) for each in zip(*ends, strict=True))
    assert trainer(plain(), batch_size=0).takes_one_step(0)
    assert not trainer(dense(), batch_size=0).takes_one_step(0)


def test_batch_norm_of_a_cohort_is_the_closed_form() -> None:
    """Case E1: everybody once, one full batch: the mean of the clients' statistics, weighted by samples.

    running_mean = 0.1 x the mean input over all samples, running_var = 0.9 + 0.1 x the weighted mean of the clients'
    unbiased variances, whatever the step size.
    """
    index = PartitionIndex(np.array([0, 7, 12, 25]), np.random.default_rng(1).permutation(25))
    data = ClientData(tiny(), index, CPU)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(18), nn.Linear(18, 4))
    server = fedavg_handler(copy.deepcopy(model), RunConfig(num_clients=3, cohort_size=3))
    client = FedAvgTrainer(model, data, RunConfig(batch_size=0, client_lr=0.7), CPU)
    server.client_sizes = index.sizes
    cohort = server.sample_clients()
    start = server.model_parameters.clone()
    server.update_model([visit(client, k, start) for k in cohort])
    flat = [data.load(k)[0].flatten(1).double() for k in range(3)]
    mean = torch.cat(flat).mean(0)
    variance = sum(len(x) * x.var(0) for x in flat) / 25
    norm = server.model[1]
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * variance, rtol=0, atol=1e-6)


def test_the_server_half_takes_the_options() -> None:
    config = RunConfig(num_clients=30, cohort_size=4, rounds=9, target_accuracy=0.5, server_lr=0.25, seed=6)
    server = FEDAVG.handler(nn.Linear(1, 1), config)
    assert (server.num_clients, server.cohort_size, server.rounds) == (30, 4, 9)
    assert (server.target_accuracy, server.server_lr, server.seed) == (0.5, 0.25, 6)
    assert server.needs() == "sum"
    assert FEDAVG.trainer is FedAvgTrainer


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
        client = trainer(made, batch_size=batch_size)
        start = client.model_parameters.detach().clone()
        end = visit(client, 2, start)
        exact = ExactSum(start, 20, 12)
        exact.add(end, 12)
        if client.takes_one_step(0):
            for _, columns, values in client.single_steps([0], start).pieces([0]):
                exact.add_piece(columns, values, 8)
            exact.count(1)
        sums = client_data.test_evaluator(tiny(), CPU, client.memory_format, None).evaluate(client.model, 0, 1)
        return [end.tolist(), client.loss, exact.mean().tolist(), sums.tolist(), client.engine_note]

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
    index = PartitionIndex(np.array([0, 9, 14, 25]), np.random.default_rng(1).permutation(25))
    client = FedAvgTrainer(model(), ClientData(tiny(), index, CPU), RunConfig(batch_size=4), CPU)
    assert "a last batch of one sample joins the one before it" in client.engine_note
    for client_id in range(3):
        visit(client, client_id, client.model_parameters.detach().clone())
        assert math.isfinite(client.loss)
    assert "a last batch" not in trainer(dense()).engine_note


@pytest.mark.parametrize("model", [network, Squeezed])
def test_clients_and_batches_of_one_are_refused_before_the_first_round(model: Any) -> None:
    def made(sizes: list[int], **options: Any) -> FedAvgTrainer:
        index = PartitionIndex(np.cumsum([0, *sizes]), np.arange(sum(sizes)))
        return FedAvgTrainer(model(), ClientData(tiny(), index, CPU), RunConfig(**options), CPU)

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
        trainer(Wrong(mode))
    assert "\n" not in str(caught.value)


def test_a_tensor_that_leaves_the_vector_is_found_before_the_first_round() -> None:
    with pytest.raises(ModelError, match="training replaced 'scale'"):
        trainer(Wrong("replaced"))


def test_a_crash_of_the_users_own_is_left_to_training() -> None:
    """There it is told with its client and round."""
    client = trainer(Wrong("boom"))
    with pytest.raises(ValueError, match="boom"):
        visit(client, 0, client.model_parameters.detach().clone())


def test_the_trial_leaves_no_trace() -> None:
    model = Wrong("fine")
    state = torch.get_rng_state()
    before = torch.cat([model.layer.weight.detach().flatten(), model.layer.bias.detach(), torch.ones(1)])
    client = trainer(model)
    assert torch.equal(client.model_parameters, before)
    assert (model.calls, int(model.steps)) == (0, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_derived_trainer_may_use_its_model_otherwise() -> None:
    class Own(FedAvgTrainer):
        def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
            self.model_parameters.copy_(model_parameters)

    made = Own(Wrong("tuple"), ClientData(tiny(), partition(), CPU), RunConfig(), CPU)
    visit(made, 0, made.model_parameters.detach().clone())


def test_a_derived_trainer_that_hooks_into_a_fused_model_is_found() -> None:
    class Hooked(FedAvgTrainer):
        def train(self, model_parameters: Tensor, epochs: int | None = None) -> None:
            if self.round_idx == 1:
                self.model[1].weight.register_hook(torch.zeros_like)
            super().train(model_parameters, epochs)

    made = Hooked(plain(), ClientData(tiny(), partition(), CPU), RunConfig(), CPU)
    start = made.model_parameters.detach().clone()
    visit(made, 0, start)
    with pytest.raises(ModelError, match=r"1.weight has a hook.*--engine eager"):
        visit(made, 0, start, round_idx=1)


@pytest.mark.parametrize("batch_size", [3, 0])
def test_a_hook_that_comes_after_the_choice_is_found(batch_size: int) -> None:
    """Also where clients of one step are taken together."""
    made = trainer(plain(), batch_size=batch_size)
    start = made.model_parameters.detach().clone()
    made.model[1].register_forward_hook(lambda module, inputs, output: output.clamp(-0.05, 0.05))
    with pytest.raises(ModelError, match=r"has a hook.*--engine eager"):
        visit(made, 0, start)
    with pytest.raises(ModelError, match=r"has a hook.*--engine eager"):
        made.single_steps([0, 2], start)


def test_what_a_derived_trainer_makes_of_its_vector_counts() -> None:
    """The path of many clients at once would not see it."""

    class Halved(FedAvgTrainer):
        @property
        def model_parameters(self) -> Tensor:
            return super().model_parameters

    made = Halved(plain(), ClientData(tiny(), partition(), CPU), RunConfig(batch_size=0), CPU)
    assert not made.takes_one_step(0)


@pytest.mark.parametrize("batch_size", [300_000_000, 10**13, 10**30])
@pytest.mark.parametrize("model", [plain, dense])
def test_a_batch_size_beyond_the_client_is_the_clients_size(model: Any, batch_size: int) -> None:
    ends = []
    for size in (batch_size, 0):
        client = trainer(model(), batch_size=size, local_epochs=2)
        ends.append(visit(client, 2, client.model_parameters.detach().clone()))
    assert torch.equal(*ends)
