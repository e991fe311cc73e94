"""The server in one round, as an author sees it.

Shapes: V entries of a flat vector, K clients in the cohort, N clients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedmpi.core.cohort import aligned, checked_cohort, reported_means, sample_cohort, weight_unit
from fedmpi.core.columns import apply_rule, whole_rows
from fedmpi.core.coordinator import Coordinator
from fedmpi.core.exactsum import integer_weights
from fedmpi.core.exchange import Arrived
from fedmpi.core.order import ClientUpdate, Collect, IntArray
from fedmpi.core.seeding import Stream, derive_seed
from fedmpi.core.segments import Layout, Segments
from fedmpi.core.vector import load_integer_state
from fedmpi.errors import ConfigError
from fedmpi.halves.algorithm_object import visits_of

if TYPE_CHECKING:
    from fedmpi.halves.algorithm_server import AlgorithmServer
    from fedmpi.halves.client import Client

Visitation = Callable[["Client"], None]
"""A bound method of the algorithm that takes a client."""

Weights = ArrayLike | Mapping[str, ArrayLike] | None
"""(K,) numbers >= 0 in the order of the cohort, or such by segment; None: the sample counts."""


class Result(Segments):
    """Result of an exchange, by segment.

    Attributes:
        reported: weighted means of what visits reported, by name.
    """

    __slots__ = ("reported",)

    def __init__(self, flat: Tensor, layout: Layout, reported: Mapping[str, float]) -> None:
        """See `Segments`."""
        super().__init__(flat, layout)
        self.reported = reported


class Server:
    """The server in one round.

    Attributes:
        model: the global model, and the segments that go with it; writing to it changes it.
        state: kept from round to round.
        round_idx: the round, from 0.
        num_clients: N.
        client_sizes: (N,) sample counts.
    """

    def __init__(self, half: AlgorithmServer, coordinator: Coordinator) -> None:
        """Over the server's half of an algorithm."""
        self._half, self._coordinator, self._samples = half, coordinator, 0
        self.model = Segments(half.flat, half.layout)
        self.state = half.state
        self.round_idx = half.round_idx
        self.client_sizes = coordinator.client_sizes
        self.num_clients = len(self.client_sizes)

    def sample(self, count: int) -> IntArray:
        """(count,) distinct client ids, ascending; uniform, and the same for a (seed, round) whatever else differs.

        Raises:
            ConfigError: there are fewer clients.
        """
        if not 0 <= count <= self.num_clients:
            raise ConfigError(f"a cohort has 0 to {self.num_clients} clients, got {count}")
        again = f"sample {self._samples}" if self._samples else ""
        self._samples += 1
        return sample_cohort(self._seed(Stream.COHORT, again), self.num_clients, count)

    def mean(
        self,
        cohort: ArrayLike,
        visit: Visitation,
        weights: Weights = None,
        *,
        buckets: ArrayLike | None = None,
        send: Segments | Sequence[Segments] | None = None,
        send_idx: ArrayLike | None = None,
    ) -> Any:
        """Collective through the trainers. Visit clients; return the exact weighted mean of `back - sent`, in float64.

        Args:
            cohort: (K,) distinct client ids; K may be 0.
            visit: a method of the algorithm.
            weights: see `Weights`.
            buckets: (K,) integers >= 0: one mean per bucket, as a list.
            send: what goes down; None: `model`.
            send_idx: (K,) which of several `send` a client gets.

        Raises:
            ConfigError: the cohort, its weights or the visit cannot be.
            DivergedError: a client sent back something that is not finite.
        """
        return self._sums(cohort, visit, weights, buckets, send, send_idx, total=False)

    def total(
        self,
        cohort: ArrayLike,
        visit: Visitation,
        weights: Weights = None,
        *,
        buckets: ArrayLike | None = None,
        send: Segments | Sequence[Segments] | None = None,
        send_idx: ArrayLike | None = None,
    ) -> Any:
        """Return the weighted sum of `back - sent` in the units of `weights`; else as `mean`."""
        return self._sums(cohort, visit, weights, buckets, send, send_idx, total=True)

    def columns(self, cohort: ArrayLike, visit: Visitation, rule: Callable[[Tensor, Tensor], Tensor]) -> Result:
        """Visit clients; return the update to what a rule makes of their values, column by column, in bounded memory.

        Args:
            cohort: (K,) distinct client ids.
            visit: a method of the algorithm.
            rule: (K, B) float32 values in ascending order of client ids, (B,) values that were sent -> (B,) values.
                Float buffers get their weighted mean instead.

        Returns:
            The rule's values, rounded to float32, less what was sent: in float64, as of `mean`.
        """
        ids, weights, _ = self._cohort(cohort, None, None)
        arrived = self._train(ids, weights, visit, Collect.ROWS)
        layout, sent = self._half.layout, self._half.flat.clone()
        sent[layout.down.stop :].zero_()  # as clients get it
        update = apply_rule(arrived.blocks, layout, sent, rule, "a rule of columns").to(torch.float64).sub_(sent)
        result = Result(update, layout, self._note(arrived.updates, ids, weights[0]))
        assert arrived.sums is not None
        result.b.copy_(arrived.sums.mean(0).b)
        return self._decoded(result)

    def rows(self, cohort: ArrayLike, visit: Visitation) -> Mapping[int, Segments]:
        """Visit clients; return all that each sends back, by client id: K x V entries at once."""
        ids, weights, _ = self._cohort(cohort, None, None)
        arrived = self._train(ids, weights, visit, Collect.ROWS)
        values = whole_rows(arrived.blocks, self._half.layout, len(ids))
        self._note(arrived.updates, ids, weights[0])
        return {
            client_id: Segments(row, self._half.layout) for client_id, row in zip(ids.tolist(), values, strict=True)
        }

    def ask(
        self,
        clients: ArrayLike,
        visit: Visitation,
        *,
        send: Segments | Sequence[Segments] | None = None,
        send_idx: ArrayLike | None = None,
    ) -> Mapping[int, Mapping[str, float]]:
        """Visit clients; return only the numbers that the visits reported, by client id; `send` as for `mean`."""
        ids, rows, _ = self._cohort(clients, None, None)
        vectors, chosen = self._sent(clients, send, send_idx)
        arrived = self._train(ids, rows, visit, Collect.NUMBERS, vectors, send_idx=chosen)
        self._note(arrived.updates, ids, rows[0])
        return {update.client_id: dict(update.reported) for update in arrived.updates}

    def step(self, segment: str, update: Tensor, lr: float = 1.0) -> None:
        """Write segment <- segment + lr x update, in float64, rounded once."""
        if bool(update.any()):  # an update of an empty cohort changes no bit, not even that of a zero
            values = self.model[segment]
            values.copy_(values.to(torch.float64).add_(update, alpha=lr))

    def generator(self, purpose: str) -> np.random.Generator:
        """Return random numbers of this round and exchange, for one purpose."""
        return np.random.default_rng(self._seed(Stream.SERVER, purpose))

    def _seed(self, stream: Stream, purpose: str) -> int:
        exchange_idx = self._coordinator.exchange_idx
        return derive_seed(self._half.seed, stream, self.round_idx, 0, exchange_idx, purpose)

    def _cohort(
        self, cohort: ArrayLike, weights: Weights, buckets: ArrayLike | None
    ) -> tuple[IntArray, IntArray, IntArray | None]:
        """Return ascending ids, (R, K) integer weights, and buckets in that order."""
        ids, order = checked_cohort(cohort, self.num_clients)
        sizes = self.client_sizes[ids]
        if isinstance(weights, Mapping):
            known = [part.name for part in self._half.layout.segments if part.direction != "down"]  # also an empty b
            if unknown := set(weights) - set(known):
                raise ConfigError(f"weights by segment name {', '.join(known)}, got {', '.join(sorted(unknown))}")
            names = [segment.name for segment in self._half.layout.sent_up()]
            rows = [self._weights(weights[name], order) if name in weights else sizes for name in names]
        else:
            rows = [sizes if weights is None else self._weights(weights, order)]
        return ids, np.stack([integer_weights(row) for row in rows]), aligned(buckets, order, "buckets")

    def _weights(self, weights: ArrayLike, order: IntArray) -> NDArray[Any]:
        given = np.asarray(weights.detach().cpu() if isinstance(weights, Tensor) else weights)
        if given.shape != order.shape:
            raise ConfigError(f"weights must be one number for each of {len(order)} clients, got shape {given.shape}")
        return np.asarray(given[order])

    def _train(
        self, ids: IntArray, rows: IntArray, visit: Visitation, collect: Collect, vectors: Sequence[Tensor] = (),
        **options: Any,
    ) -> Arrived:  # fmt: skip
        half = self._half
        half.check_algorithm()
        vectors = vectors or [half.flat]
        arrived = self._coordinator.train(
            self.round_idx, ids, rows, vectors, half.integer_state(),
            visit_idx=self._visit_idx(visit), collect=collect, **options,
        )  # fmt: skip
        if len(arrived.integers) and arrived.updates:
            load_integer_state(half.model, arrived.integers)
        return arrived

    def _visit_idx(self, visit: Visitation) -> int:
        algorithm, names = self._half.algorithm, visits_of(type(self._half.algorithm))
        name = visit.__name__ if inspect.ismethod(visit) and visit.__self__ is algorithm else ""
        if name in names and getattr(type(algorithm), name) is visit.__func__:  # type: ignore[attr-defined]  # a method
            return names.index(name)
        raise ConfigError(
            f"a visit must be a method of {type(algorithm).__name__}, e.g. self.client_update, since it is called by"
            f" its name on other ranks; got {getattr(visit, '__name__', type(visit).__name__)!r}"
        )

    def _sums(
        self, cohort: ArrayLike, visit: Visitation, weights: Weights, buckets: ArrayLike | None,
        send: Segments | Sequence[Segments] | None, send_idx: ArrayLike | None, total: bool,
    ) -> Any:  # fmt: skip
        ids, rows, of_bucket = self._cohort(cohort, weights, buckets)
        vectors, chosen = self._sent(cohort, send, send_idx)
        num_buckets = 1 if of_bucket is None else int(of_bucket.max(initial=0)) + 1
        if of_bucket is not None and of_bucket.min(initial=0) < 0:
            raise ConfigError(f"buckets must be integers >= 0, got {of_bucket.min()}")
        arrived = self._train(
            ids, rows, visit, Collect.SUM, vectors,
            buckets=of_bucket, num_buckets=num_buckets, send_idx=chosen,
        )  # fmt: skip
        assert arrived.sums is not None
        units = self._units(weights, rows) if total else {}
        self._note(arrived.updates, ids, rows[0])
        results = []
        for bucket in range(num_buckets):
            inside = np.ones(len(ids), bool) if of_bucket is None else of_bucket == bucket
            reported = reported_means(arrived.updates, ids[inside], rows[0][inside])
            summed = arrived.sums.total(bucket) if total else arrived.sums.mean(bucket)
            for name, unit in units.items():
                summed[name].mul_(unit)
            results.append(self._decoded(Result(summed.flat, self._half.layout, reported)))
        return results[0] if of_bucket is None else results

    def _sent(
        self, cohort: ArrayLike, send: Segments | Sequence[Segments] | None, send_idx: ArrayLike | None
    ) -> tuple[list[Tensor], IntArray | None]:
        """Return the vectors that go down, none for `model`, and by ascending client which of them a client gets."""
        several = [] if send is None else [send] if isinstance(send, Segments) else list(send)
        for part in several:
            flat = part.flat if isinstance(part, Segments) else None
            if flat is None or flat.dtype != torch.float32 or flat.shape != self.model.flat.shape:
                found = f"{flat.dtype} {tuple(flat.shape)}" if flat is not None else f"a {type(part).__name__}"
                raise ConfigError(
                    f"send takes Segments of {len(self.model.flat)} float32, such as s.model.clone(), got {found}"
                )
        chosen = aligned(send_idx, checked_cohort(cohort, self.num_clients)[1], "send_idx")
        count = max(1, len(several))
        if (chosen is None and count > 1) or (
            chosen is not None and len(chosen) and not 0 <= chosen.min() <= chosen.max() < count
        ):
            raise ConfigError(f"send_idx must be one number in [0, {count}) per client: which of `send` it gets")
        return [part.flat for part in several], chosen

    def _units(self, weights: Weights, rows: IntArray) -> dict[str, float]:
        """Return what one of the integer weights is worth, by segment."""
        names = [segment.name for segment in self._half.layout.sent_up()]
        given = [weights.get(name) for name in names] if isinstance(weights, Mapping) else [weights] * len(names)
        return {
            name: weight_unit(one, rows[i if len(rows) > 1 else 0])
            for i, (name, one) in enumerate(zip(names, given, strict=True))
            if one is not None
        }

    def _note(self, updates: Sequence[ClientUpdate], ids: IntArray, weights: IntArray) -> dict[str, float]:
        """Return the weighted means of what the visits of an exchange reported, and keep them for the history."""
        means = reported_means(updates, ids, weights)
        self._half.reported = {**self._half.reported, **means}
        return means

    def _decoded(self, result: Result) -> Result:
        for transform in reversed(self._half.algorithm.transforms):
            transform.decode(self, result)
        return result
