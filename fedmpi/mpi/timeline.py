"""Spans of time that a rank spends on something, and all ranks' spans as a Chrome trace."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Sequence

Span = tuple[str, int, int]
"""Name, begin and end; nanoseconds since the timeline began."""


class Timeline:
    """Notes spans while it is on, and costs nothing while it is off."""

    def __init__(self) -> None:
        """Off."""
        self._spans: list[Span] | None = None
        self._begun = 0

    def begin(self) -> None:
        """Note spans from now on; right behind a barrier, so that the ranks' clocks start together."""
        self._spans, self._begun = [], time.perf_counter_ns()

    @contextlib.contextmanager
    def span(self, *names: str) -> Iterator[None]:
        """Note what happens inside as `names`; several share its time evenly, one after the other."""
        if self._spans is None:
            yield
            return
        start = time.perf_counter_ns()
        yield
        share = (time.perf_counter_ns() - start) / len(names)
        begin = start - self._begun
        times = [round(begin + i * share) for i in range(len(names) + 1)]
        self._spans += zip(names, times, times[1:], strict=False)

    def end(self) -> tuple[str, list[Span]]:
        """Return this rank's host and spans."""
        return socket.gethostname(), self._spans or []


def chrome_trace(by_rank: Sequence[tuple[str, list[Span]]]) -> str:
    """Return JSON for chrome://tracing and Perfetto: a process per host, a thread per rank.

    Args:
        by_rank: by rank, what `Timeline.end` returned.
    """
    hosts = sorted({host for host, _ in by_rank})
    events: list[dict[str, object]] = [
        {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": host}} for pid, host in enumerate(hosts)
    ]
    for rank, (host, spans) in enumerate(by_rank):
        where = {"pid": hosts.index(host), "tid": rank}
        title = f"rank {rank}, {'server' if rank == 0 else 'trainer'}"
        events.append({"name": "thread_name", "ph": "M", **where, "args": {"name": title}})
        for name, start, stop in spans:
            times = {"ts": start / 1e3, "dur": (stop - start) / 1e3}
            events.append({"name": name, "cat": name.split(" ")[0], "ph": "X", **where, **times})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
