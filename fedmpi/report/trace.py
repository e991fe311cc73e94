"""`timeline.json` over the lives of a run: the trace of a job behind the traces of the jobs before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedmpi.lifecycle.files import read_regular

_MOST_BYTES = 2**30
_MOST_US = 1e16


def join_traces(path: Path, trace: str, begun_s: float) -> str:
    """Return the trace in a file and, `begun_s` seconds after its beginning, another one; a host keeps its place.

    Args:
        path: the file; if there is none, only the other one.
        trace: the other one, from its own zero.
        begun_s: seconds.

    Raises:
        ValueError: the file is none of `chrome_trace`'s.
    """
    try:
        before = _events(read_regular(path, _MOST_BYTES))
    except FileNotFoundError:
        before = []
    except OSError as error:
        raise ValueError(str(error.strerror)) from error
    content = json.loads(trace)
    now: list[dict[str, Any]] = content["traceEvents"]
    places = {_host(event): event["pid"] for event in before if event["name"] == "process_name"}
    moved = {}
    for event in now:
        if event["name"] == "process_name":
            moved[event["pid"]] = places.setdefault(_host(event), len(places))
    ended_us = max((event["ts"] + event["dur"] for event in before if event["ph"] == "X"), default=0.0)
    begun_us = max(begun_s * 1e6, ended_us)  # a job writes on for a moment after its last checkpoint
    known = {_key(event) for event in before if event["ph"] == "M"}
    for event in now:
        event["pid"] = moved[event["pid"]]
        if "ts" in event:
            event["ts"] += begun_us
    content["traceEvents"] = before + [event for event in now if event["ph"] != "M" or _key(event) not in known]
    return json.dumps(content)


def _events(content: bytes) -> list[dict[str, Any]]:
    try:
        events: list[dict[str, Any]] = json.loads(content)["traceEvents"]
        for event in events:
            if not isinstance(event["name"], str) or event["ph"] not in ("M", "X") or type(event["pid"]) is not int:
                raise ValueError("event")
            if event["name"] == "process_name":
                _host(event)
            if event["ph"] == "X" and not all(0 <= float(event[name]) < _MOST_US for name in ("ts", "dur")):
                raise ValueError("event")
    except (KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError("event") from error
    return events


def _host(event: dict[str, Any]) -> str:
    return str(event["args"]["name"])


def _key(event: dict[str, Any]) -> tuple[str, int, object]:
    return event["name"], event["pid"], event.get("tid")
