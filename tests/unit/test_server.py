"""What a server's author sees: means, sums, rows and numbers of visits, by hand on one rank."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedmpi.algorithm import Algorithm, Client, Segments, Server, make
from fedmpi.config import RunConfig
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.errors import ConfigError
from fedmpi.fedavg import FedAvg
from fedmpi.halves.algorithm_server import AlgorithmServer
from tests.unit.tiny import SIZES, Job, network, plain, play

N = len(SIZES)
EVERYBODY = np.arange(N)


class Toy(Algorithm[RunConfig]):
    """Clients move each entry of w by their own number plus one; what the server does is a function of the test's."""

    act: ClassVar[Callable[[Toy, Server], None]]

    def round(self, s: Server) -> None:
        type(self).act(self, s)

    def move(self, k: Client) -> None:
        k.back.w.add_(k.id + 1)
        k.report(number=k.id, samples=k.num_samples)

    def half(self, k: Client) -> None:
        k.back.w.add_(0.5)

    def stay(self, k: Client) -> None:
        if k.id % 2:
            k.report(odd=k.id)


class Extra(Toy):
    """With further segments."""

    extra: ClassVar[Any] = {"control": (3, "both"), "told": (2, "up"), "momentum": ("T", "down")}

    def all_ways(self, k: Client) -> None:
        assert not k.back["told"].any(), "what only goes up begins as zeros"
        assert torch.equal(k.back["momentum"], k.sent["momentum"])
        k.back["control"].add_(k.sent["momentum"][:3]).add_(k.id)
        k.back["told"].fill_(k.id + 1)
        k.back.w.add_(k.sent["momentum"])


def played(act: Callable[[Any, Server], None], cls: type[Toy] = Toy, **options: Any) -> Job:
    """Return the job of one round in which the server does `act`."""
    one = type(cls.__name__, (cls,), {"act": act, "__module__": __name__})
    job = play(one, **{"rounds": 1, **options})
    assert job.code == 0
    return job


def test_a_mean_is_weighted_by_samples_and_in_float64() -> None:
    """(8 x 1 + 1 x 2 + 12 x 3 + 4 x 4) / 25 = 2.48, whatever the order in which the cohort is given."""

    def act(self: Toy, s: Server) -> None:
        for cohort in ([0, 1, 2, 3], [2, 0, 3, 1]):
            mean = s.mean(cohort, self.move)
            assert mean.w.dtype == torch.float64
            assert mean.w.tolist() == pytest.approx([2.48] * len(mean.w), rel=1e-7)
        assert s.mean([3], self.move).w.tolist() == pytest.approx([4.0] * len(mean.w), rel=1e-6)
        assert s.total(EVERYBODY, self.half).w.tolist() == pytest.approx([12.5] * len(mean.w), rel=1e-6)

    played(act)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_weights_are_the_servers_and_in_the_order_of_the_cohort(kind: Callable[[Any], Any]) -> None:
    """(3 x 1 + 0 x 2 + 1 x 3) / 4 = 1.5; a sum is 6 in the author's own units, also if those are no whole numbers."""

    def act(self: Toy, s: Server) -> None:
        size = len(s.model.w)
        assert s.mean([2, 0, 1], self.move, kind([1, 3, 0])).w.tolist() == pytest.approx([1.5] * size, rel=1e-6)
        assert s.total([2, 0, 1], self.move, kind([1, 3, 0])).w.tolist() == pytest.approx([6.0] * size, rel=1e-6)
        for unit in (0.1, 1e-30, 1e30, math.pi):
            told = s.total([2, 0, 1], self.half, kind([1 * unit, 3 * unit, 0.0])).w
            assert told.tolist() == pytest.approx([2.0 * unit] * size, rel=1e-6)

    played(act)


def test_real_weights_are_off_by_2_to_the_minus_31_of_the_largest() -> None:
    weights = np.array([1.0, 1 / 3, 1e-7, 0.77])

    def act(self: Toy, s: Server) -> None:
        s.model.w.zero_()  # w + id is exact then
        told = float(s.total(EVERYBODY, self.move, weights).w[0])
        assert abs(told - math.fsum(weights * (EVERYBODY + 1))) <= 2**-31 * weights.max() * (EVERYBODY + 1).sum()
        assert float(s.total(EVERYBODY, self.move, weights * 0).w[0]) == 0
        assert float(s.mean(EVERYBODY, self.move, weights * 0).w[0]) == 0

    played(act)


@pytest.mark.parametrize(
    ("cohort", "options", "said"),
    [
        ([0, 1, 1], {}, "client 1 is twice in the cohort: give it twice the weight instead"),
        ([0, 4], {}, r"client ids must be in \[0, 4\), got 0 to 4"),
        ([-1], {}, r"client ids must be in \[0, 4\), got -1 to -1"),
        ([0.5], {}, "a cohort is client ids in one row, got float64"),
        ([[0]], {}, r"a cohort is client ids in one row, got int64 of shape \(1, 1\)"),
        ([0, 1], {"weights": [1]}, r"weights must be one number for each of 2 clients, got shape \(1,\)"),
        ([0, 1], {"weights": [1, -1]}, "weights must be finite numbers >= 0, one per client of the cohort, got -1"),
        ([0, 1], {"weights": [1, math.nan]}, "weights must be finite numbers >= 0"),
        ([0, 1], {"weights": {"x": [1, 1]}}, "weights by segment name w, b, got x"),
        ([0, 1], {"buckets": [0]}, "buckets must be one integer for each of 2 clients"),
        ([0, 1], {"buckets": [0, -1]}, "buckets must be integers >= 0, got -1"),
        ([0, 1], {"buckets": [0, 0.5]}, "buckets must be one integer for each of 2 clients"),
        ([0, 1], {"send_idx": [0, 1]}, r"send_idx must be one number in \[0, 1\) per client"),
    ],
)
def test_what_cannot_be_is_refused_on_the_call(cohort: Any, options: Any, said: str) -> None:
    def act(self: Toy, s: Server) -> None:
        for ask in (s.mean, s.total):
            with pytest.raises(ConfigError, match=said):
                ask(cohort, self.move, **options)

    played(act)


def test_weights_by_segment() -> None:
    """A segment without an entry, and a model without float buffers, take the sample counts."""

    def act(self: Extra, s: Server) -> None:
        s.model["momentum"].fill_(2.0)
        s.model["control"].fill_(10.0)
        by_name = {"told": [0, 0, 0.25, 0.75], "control": [1, 1, 1, 1], "b": [1, 1, 1, 1]}
        mean = s.mean(EVERYBODY, self.all_ways, by_name)
        assert mean["control"].tolist() == pytest.approx([2 + 1.5] * 3)
        assert mean["told"].tolist() == pytest.approx([0.25 * 3 + 0.75 * 4] * 2)
        assert mean.w.tolist() == pytest.approx([2.0] * len(mean.w), rel=1e-6)
        assert not mean["momentum"].any(), "it does not come back"
        total = s.total(EVERYBODY, self.all_ways, by_name)
        assert total["told"].tolist() == pytest.approx([0.25 * 3 + 0.75 * 4] * 2)
        assert total["control"].tolist() == pytest.approx([4 * 2 + 6.0] * 3)
        assert total.w.tolist() == pytest.approx([50.0] * len(mean.w), rel=1e-6)
        assert s.model["control"].unique().tolist() == [10.0], "nothing is stepped by itself"

    played(act, Extra)


def test_a_segment_that_only_goes_up_is_zero_as_sent_whatever_the_server_keeps_in_it() -> None:
    def act(self: Extra, s: Server) -> None:
        s.model["told"].fill_(100.0)
        assert s.mean([1, 2], self.all_ways, [1, 1])["told"].tolist() == [2.5, 2.5]
        assert s.model["told"].tolist() == [100.0, 100.0]

    played(act, Extra)


def test_buckets_are_sums_of_their_own() -> None:
    """Clients 2 and 0 in bucket 2, 1 in bucket 0; bucket 1 is empty."""

    def act(self: Toy, s: Server) -> None:
        s.model.w.zero_()
        means = s.mean([2, 1, 0], self.move, [1, 5, 3], buckets=[2, 0, 2])
        assert [float(mean.w[0]) for mean in means] == [2.0, 0.0, 1.5]
        assert [mean.reported.get("number") for mean in means] == [1.0, None, (2 * 1 + 0 * 3) / 4]
        totals = s.total([2, 1, 0], self.move, [0.1, 0.5, 0.3], buckets=[2, 0, 2])
        assert [float(total.w[0]) for total in totals] == pytest.approx([1.0, 0.0, 0.6])

    job = played(act)
    assert job.records[0].reported["number"] == pytest.approx((2 * 0.1 + 1 * 0.5 + 0 * 0.3) / 0.9), "of all buckets"


def test_clients_may_be_sent_different_models() -> None:
    """Each update is against what that client was sent."""
    seen: dict[int, float] = {}

    class Watching(Toy):
        def move(self, k: Client) -> None:
            seen[k.id] = float(k.sent.w[0])
            assert torch.equal(k.back.w, k.sent.w)
            super().move(k)

    def act(self: Toy, s: Server) -> None:
        models = [s.model.clone() for _ in range(3)]
        for i, model in enumerate(models):
            model.w.fill_(10.0 * i)
        mean = s.mean([3, 0, 1], self.move, [1, 1, 2], send=models, send_idx=[2, 0, 2])
        assert float(mean.w[0]) == (4 + 1 + 2 * 2) / 4
        assert seen == {3: 20.0, 0: 0.0, 1: 20.0}
        with pytest.raises(ConfigError, match=r"send_idx must be one number in \[0, 3\) per client"):
            s.mean([0], self.move, send=models)
        with pytest.raises(ConfigError, match=r"send takes Segments of \d+ float32, such as s.model.clone\(\), got"):
            s.mean([0], self.move, send=mean)
        s.mean([0], self.move, send=models[1])
        assert seen[0] == 10.0

    played(act, Watching)


def test_several_sends_of_clients_of_one_step_are_grouped_apart() -> None:
    """Grouped by what they are sent and by bucket, and as good as one by one."""

    class Cluster(FedAvg):
        def round(self, s: Server) -> None:
            models = [s.model, s.model.clone()]
            models[1].w.mul_(0.5)
            arguments: Any = {"send": models, "send_idx": [0, 1, 0, 1], "buckets": [0, 1, 1, 1]}
            s.state["means"] = [mean.w for mean in s.mean(EVERYBODY, self.client_update, **arguments)]

    jobs = [play(Cluster, rounds=1, batch_size=0, group_clients=count) for count in (1, 32)]
    pairs = zip(*(job.server.state["means"] for job in jobs), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
        assert one.any()


def test_columns_see_all_values_in_ascending_order_in_bounded_memory() -> None:
    shapes = []

    def rule(rows: Tensor, sent: Tensor) -> Tensor:
        shapes.append(tuple(rows.shape))
        assert (rows - sent).round().int().T.unique(dim=0).tolist() == [[1, 2, 4]]
        return rows.median(0).values

    def act(self: Toy, s: Server) -> None:
        update = s.columns([3, 0, 1], self.move, rule)
        assert update.w.tolist() == pytest.approx([2.0] * len(update.w), rel=1e-6)
        assert update.reported["number"] == (8 * 0 + 1 * 1 + 4 * 3) / 13

    played(act, block_bytes=3 * 4 * 10)
    size = len(torch.nn.utils.parameters_to_vector(plain().parameters()))
    assert shapes == [(3, 10)] * (size // 10) + [(3, size % 10)] * bool(size % 10)


@pytest.mark.parametrize("wrong", [lambda rows, sent: rows, lambda rows, sent: 3, lambda rows, sent: rows.mean()])
def test_a_rule_of_another_shape_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"a rule of columns must return a tensor of shape \(\d+,\), got"):
        played(lambda self, s: s.columns(EVERYBODY, self.move, wrong))


def test_buffers_take_the_mean_beside_a_rule_of_columns() -> None:
    def act(self: Toy, s: Server) -> None:
        mean = s.mean(EVERYBODY, self.train)  # type: ignore[attr-defined]  # of Training
        again = s.columns(EVERYBODY, self.train, lambda rows, sent: sent)  # type: ignore[attr-defined]
        s.state["pair"] = [mean.b, again.b]
        assert not again.w.any()

    class Training(Toy):
        def train(self, k: Client) -> None:
            assert torch.equal(k.back.b, k.sent.b)
            k.back.b.add_(k.id)

    job = played(act, Training, make_model=network, sizes=[8, 2, 11, 4])
    assert torch.equal(*job.server.state["pair"])
    assert job.server.state["pair"][0].any()


def test_rows_are_all_of_what_clients_send_back() -> None:
    def act(self: Extra, s: Server) -> None:
        s.model["momentum"].fill_(0.5)
        rows = s.rows([2, 0], self.all_ways)
        assert list(rows) == [0, 2]
        for client_id, row in rows.items():
            assert row["told"].tolist() == [client_id + 1] * 2
            assert torch.equal(row.w, s.model.w + 0.5)
        assert s.rows([], self.all_ways) == {}

    played(act, Extra)


def test_asked_clients_send_numbers_only_and_train_nothing() -> None:
    def act(self: Toy, s: Server) -> None:
        assert s.ask([3, 1, 0], self.stay) == {0: {}, 1: {"odd": 1.0}, 3: {"odd": 3.0}}
        assert type(s.ask([1], self.stay)[1]["odd"]) is float

    job = played(act)
    assert job.records[0].cohort == []
    assert job.records[0].reported["odd"] == 1.0
    assert job.records[0].bytes_up == 8 * 3


class Counter(nn.Module):
    """A counter that float32 cannot hold, a bool, and as many calls as there were steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(18, 4)
        self.register_buffer("many", torch.tensor([2**24, -(2**40)]))
        self.register_buffer("seen", torch.tensor([False, True]))
        self.register_buffer("small", torch.tensor(3, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.many += len(x)
            self.seen[0] = True
        return self.layer(x.flatten(1))


def test_integer_and_bool_buffers_are_the_largest_of_the_cohort_to_the_last_one() -> None:
    job = play(FedAvg, Counter, sizes=[8, 1, 12, 4], rounds=3, batch_size=4)
    model: Any = job.server.model
    assert model.many.tolist() == [2**24 + 3 * 12, -(2**40) + 3 * 12]
    assert (model.seen.tolist(), model.small.item()) == ([True, True], 3)
    assert (model.many.dtype, model.seen.dtype, model.small.dtype) == (torch.int64, torch.bool, torch.uint8)


def test_clients_that_are_only_asked_leave_integer_buffers_alone() -> None:
    class Asking(Toy):
        def stay(self, k: Client) -> None:
            k.sgd()

    job = played(lambda self, s: s.ask(EVERYBODY, self.stay), Asking, make_model=Counter)
    assert job.integers.tolist() == [2**24, -(2**40), 0, 1, 3]


def test_empty_cohorts_change_no_bit() -> None:
    def act(self: Toy, s: Server) -> None:
        before = s.model.flat.clone()
        for result in (s.mean([], self.move), s.total([], self.move), *s.mean([], self.move, buckets=[])):
            assert result.reported == {}
            for name in result:
                s.step(name, result[name])
        update = s.columns([], self.move, lambda rows, sent: rows.mean(0))
        for name in update:
            s.step(name, update[name])
        assert s.ask([], self.move) == {}
        assert s.sample(0).tolist() == []
        assert torch.equal(s.model.flat.view(torch.int32), before.view(torch.int32))

    def prepare(server: AlgorithmServer) -> None:
        server.flat[:5] = -0.0
        server.flat[server.layout["b"].columns] = -0.0

    for options in ({"make_model": network, "sizes": [8, 2, 11, 4]}, {"batch_size": 0}):
        job = played(act, prepare=prepare, **options)
        assert job.records[0].cohort == []
        assert job.records[0].train_loss is None


def test_a_client_of_several_exchanges_is_once_in_the_record() -> None:
    class Twice(FedAvg):
        def round(self, s: Server) -> None:
            s.total(EVERYBODY, self.client_update)
            super().round(s)

        def other(self, k: Client) -> None:
            k.back.w.add_(1)

    job = play(Twice, rounds=1)
    (record,) = job.records
    assert (record.cohort, record.num_samples) == ([0, 1, 2, 3], 25)
    assert record.train_loss is not None
    assert record.bytes_up == 2 * 4 * 4 * len(job.server.flat)


class Drawing(Toy):
    def draw(self, k: Client) -> None:
        numbers = [torch.rand(1, generator=k.generator(word)).item() for word in ("a", "a", "b")]
        k.report(first=numbers[0], again=numbers[1], other=numbers[2], world=torch.rand(1).item())


def test_generators_are_of_purpose_client_round_and_exchange() -> None:
    def act(self: Drawing, s: Server) -> None:
        told = [s.ask(EVERYBODY, self.draw) for _ in range(2)]
        for client_id in range(N):
            assert told[0][client_id]["first"] == told[0][client_id]["again"]
        drawn = [one[k][word] for one in told for k in range(N) for word in ("first", "other", "world")]
        ours = [s.generator(word).random() for word in ("a", "b", "a")]
        s.ask([], self.draw)
        ours += [s.generator("a").random()]
        assert ours[0] == ours[2]
        s.state.setdefault("drawn", []).extend([*drawn, *ours[:2], ours[3]])
        s.state.setdefault("cohorts", []).extend(s.sample(2).tolist() for _ in range(8))

    job = played(act, Drawing, rounds=2)
    drawn = job.server.state["drawn"]
    assert len(set(drawn)) == len(drawn) == 2 * (2 * N * 3 + 3)
    assert len({tuple(cohort) for cohort in job.server.state["cohorts"]}) > 3
    assert played(act, Drawing, rounds=2).server.state == job.server.state
    assert played(act, Drawing, rounds=2, seed=1).server.state["drawn"] != drawn


def test_a_cohort_is_the_same_for_a_seed_and_round() -> None:
    def act(self: Toy, s: Server) -> None:
        first, second = s.sample(2), s.sample(2)
        rng = np.random.default_rng(derive_seed(0, Stream.COHORT, 0))
        assert first.tolist() == np.sort(rng.choice(N, 2, replace=False, shuffle=False)).tolist()
        assert s.sample(N).tolist() == [*range(N)]
        s.state["both"] = [first.tolist(), second.tolist()]
        for count in (-1, N + 1):
            with pytest.raises(ConfigError, match=rf"a cohort has 0 to 4 clients, got {count}"):
                s.sample(count)

    played(act)


def test_means_of_reported_numbers_are_sums_in_client_order_with_the_same_weights() -> None:
    values = {0: 1e16, 1: 1.0, 2: -1e16, 3: 0.1}

    class Telling(Toy):
        def stay(self, k: Client) -> None:
            k.report(h=torch.tensor(values[k.id], dtype=torch.float64), whole=k.id)
            if k.id == 3:
                k.report(rare=7, never=math.nan)

    def act(self: Toy, s: Server) -> None:
        told = s.mean([3, 2, 1, 0], self.stay, [3, 1, 2, 1]).reported
        weights = {0: 1, 1: 2, 2: 1, 3: 3}
        assert told["h"] == math.fsum(weights[k] * values[k] for k in range(4)) / 7
        assert told["whole"] == (2 * 1 + 1 * 2 + 3 * 3) / 7
        assert told["rare"] == 7
        assert math.isnan(told["never"])
        with pytest.raises(ConfigError, match=r"report\(h=...\) takes a number, got a str"):
            s.ask([0], self.wrong)  # type: ignore[attr-defined]  # below

    def wrong(self: Toy, k: Client) -> None:
        k.report(h="a lot")  # type: ignore[arg-type]  # the very thing

    Telling.wrong = wrong  # type: ignore[attr-defined]  # one method more
    job = played(act, Telling)
    assert job.records[0].reported["never"] is None, "a history holds JSON"
    assert job.records[0].reported["rare"] == 7


def nothing(k: Client) -> None:
    """No method."""


def test_a_visit_is_a_method_of_the_algorithm_and_all_else_is_refused_on_the_call() -> None:
    def act(self: Toy, s: Server) -> None:
        other = make(type(self), self.config)
        for visit in (
            lambda k: None,
            nothing,
            functools.partial(self.move),
            other.move,
            Toy.move,
            self.round,
            s.sample,
            None,
            "move",
        ):
            for ask in (s.mean, s.total, s.rows, s.ask, lambda *args: s.columns(*args, lambda rows, sent: sent)):
                with pytest.raises(
                    ConfigError, match=r"a visit must be a method of Toy, e.g. self.client_update, .*got"
                ):
                    ask(EVERYBODY, visit)
        assert float(s.mean([0], self.move).w[0]) != float(s.mean([0], self.half).w[0])

    played(act)


def test_what_a_base_class_did_before_is_no_visit_of_a_derived_one() -> None:
    class Derived(Toy):
        def move(self, k: Client) -> None:
            k.back.w.add_(100)

    def act(self: Derived, s: Server) -> None:
        with pytest.raises(ConfigError, match="a visit must be a method"):
            s.mean([0], super(Derived, self).move)
        assert float(s.mean([0], self.move).w[0]) == pytest.approx(100)

    played(act, Derived)


# an algorithm is read-only


class Keeping(Toy):
    kept: Any = None

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.items: list[int] = []
        self.vector = torch.zeros(2)

    def noting(self, k: Client) -> None:
        self.items.append(k.id)

    def writing(self, k: Client) -> None:
        self.vector[0] = k.id + 1

    def setting(self, k: Client) -> None:
        self.kept = k.id

    def sharing(self, k: Client) -> None:
        SHARED["last"] = k.id


SHARED: dict[str, int] = {}


def set_in_round(self: Keeping, s: Server) -> None:
    self.kept = 3
    s.mean(EVERYBODY, self.move)


def append_in_round(self: Keeping, s: Server) -> None:
    self.items.append(3)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (set_in_round, "kept"),
        (append_in_round, "'items'"),
        (lambda self, s: s.mean(EVERYBODY, self.noting), "'items'"),
        (lambda self, s: s.ask(EVERYBODY, self.writing), "'vector'"),
        (lambda self, s: s.rows(EVERYBODY, self.setting), "kept"),
        (lambda self, s: self.__dict__.update(kept=4), "'kept'"),
    ],
)
def test_an_algorithm_that_changes_itself_is_refused_and_told_of_s_state(act: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*read-only.*s\.state.*extra"):
        played(act, Keeping)


def test_without_the_leak_check_containers_may_change_but_attributes_still_not() -> None:
    played(append_in_round, Keeping, leak_check="off")
    played(lambda self, s: s.mean(EVERYBODY, self.noting), Keeping, leak_check="off")
    with pytest.raises(ConfigError, match=r"kept cannot be set.*s\.state"):
        played(set_in_round, Keeping, leak_check="off")


# the server's state


def test_the_state_comes_back_from_a_checkpoint_as_it_was(tmp_path: Any) -> None:
    from fedmpi.lifecycle.checkpoint import read_state, snapshot, write_state

    kept = {
        "m": torch.rand(5, dtype=torch.float64), "n": torch.tensor([True, False]), "count": torch.tensor(2**53 + 1),
        "numbers": [1, 2.5, None, True, "text"], "inside": {"v": [torch.ones(2, 2)], "empty": {}}, "nan": math.inf,
    }  # fmt: skip

    def act(self: Toy, s: Server) -> None:
        if s.round_idx == 0:
            s.state.update(kept)
        s.step("w", s.mean(EVERYBODY, self.half).w)

    job = played(act)
    with (tmp_path / "state").open("wb") as file:
        write_state(file, snapshot(job.server.state_dict()))
    fresh = AlgorithmServer(make(FedAvg, RunConfig()), plain(), RunConfig())
    fresh.load_state_dict(read_state(tmp_path / "state"))
    assert fresh.flat.numpy().tobytes() == job.bits
    assert fresh.round_idx == 1
    assert same(dict(fresh.state), kept)


def same(one: Any, other: Any) -> bool:
    """Return True for the same types and values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros(3), r"s.state\['x'\] is a ndarray of float64"),
        ((1, 2), r"s.state\['x'\] is a tuple"),
        ({"a": [1, {2}]}, r"s.state\['x'\]\['a'\]\[1\] is a set"),
        ({3: 1.0}, r"s.state\['x'\] is a dict"),
        (np.float64(1), r"s.state\['x'\] is a float64 of float64"),
        (torch.zeros(1, dtype=torch.bfloat16), r"s.state\['x'\] is a Tensor of torch.bfloat16"),
    ],
)
def test_what_a_checkpoint_would_not_give_back_is_refused(value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"{said}, which a checkpoint does not give back: keep tensors"):
        played(lambda self, s: s.state.update(x=value))


def test_a_step_is_in_float64_and_rounded_once() -> None:
    def act(self: Toy, s: Server) -> None:
        before = s.model.w.clone()
        update = torch.full((len(before),), 1 / 3, dtype=torch.float64)
        s.step("w", update, 0.7)
        assert torch.equal(s.model.w, (before.double() + 0.7 * update).float())
        assert isinstance(s.model, Segments)
        assert isinstance(s.state, Mapping)

    played(act)
