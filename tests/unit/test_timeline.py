"""Spans, and the trace they make."""

from __future__ import annotations

import json
import time

from fedmpi.mpi.timeline import Timeline, chrome_trace


def test_nothing_is_noted_before_it_begins() -> None:
    timeline = Timeline()
    with timeline.span("broadcast"):
        pass
    assert timeline.end()[1] == []


def test_spans_follow_the_clock() -> None:
    timeline = Timeline()
    timeline.begin()
    with timeline.span("client 3"):
        time.sleep(0.01)
    with timeline.span("idle"):
        pass
    _, ((first, start, stop), (second, later, _)) = timeline.end()
    assert (first, second) == ("client 3", "idle")
    assert stop - start >= 10_000_000
    assert 0 <= start < stop <= later


def test_the_trace_has_a_process_a_host_and_a_thread_a_rank() -> None:
    held = [("a", [("order", 0, 1000)]), ("b", [("client 3", 2000, 5000)]), ("a", [])]
    events = json.loads(chrome_trace(held))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [(e["name"], e["pid"], e["tid"], e["ts"], e["dur"]) for e in spans] == [
        ("order", 0, 0, 0.0, 1.0),
        ("client 3", 1, 1, 2.0, 3.0),
    ]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["a", "b", "rank 0, server", "rank 1, trainer", "rank 2, trainer"]
