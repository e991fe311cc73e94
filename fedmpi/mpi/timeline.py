"""Who did what when: the spans of one rank, and all ranks' spans as a Chrome trace."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Sequence

Span = tuple[str, int, int]
"""What, from when, until when; nanoseconds since the timeline began."""


class Timeline:
    """Notes spans while it is on, and costs nothing while it is off."""

    def __init__(self) -> None:
        """Off."""
        self._spans: list[Span] | None = None
        self._begun = 0

    def begin(self) -> None:
        """On, from now; right behind a barrier, so that the ranks' clocks start together."""
        self._spans, self._begun = [], time.perf_counter_ns()

    @contextlib.contextmanager
    def span(self, *names: str) -> Iterator[None]:
        """What happens inside is called `names`; several share its time evenly, one after the other."""
        if self._spans is None:
            yield
            return
        start = time.perf_counter_ns()
        yield
        each = (time.perf_counter_ns() - start) / len(names)
        begin = start - self._begun
        self._spans += [(name, round(begin + i * each), round(begin + (i + 1) * each)) for i, name in enumerate(names)]

    def end(self) -> tuple[str, list[Span]]:
        """This rank's host and spans."""
        return socket.gethostname(), self._spans or []


def chrome_trace(held: Sequence[tuple[str, list[Span]]]) -> str:
    """JSON for chrome://tracing and Perfetto: a process a host, a thread a rank.

    Args:
        held: by rank, what `Timeline.end` returned.
    """
    hosts = sorted({host for host, _ in held})
    events: list[dict[str, object]] = [
        {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": host}} for pid, host in enumerate(hosts)
    ]
    for rank, (host, spans) in enumerate(held):
        where = {"pid": hosts.index(host), "tid": rank}
        title = f"rank {rank}, {'server' if rank == 0 else 'trainer'}"
        events.append({"name": "thread_name", "ph": "M", **where, "args": {"name": title}})
        events += [
            {
                "name": name,
                "cat": name.split(" ")[0],
                "ph": "X",
                **where,
                "ts": start / 1e3,
                "dur": (stop - start) / 1e3,
            }
            for name, start, stop in spans
        ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
