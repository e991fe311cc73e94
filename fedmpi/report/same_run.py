"""The check that a job may go on with a run: some facts must be as they were, others may differ at a price."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmpi.config import RunConfig
from fedmpi.errors import ConfigError, shown
from fedmpi.options import flag_of, result_options

logger = logging.getLogger(__name__)

_MAY_CHANGE = ("rounds", "threads")  # more rounds extend a run; threads are told like another torch or CPU
_DECIDES_BITS = ("fedmpi", "torch", "numpy", "threads", "engine", "capability", "server_capability")
_CENTURIES_S = 1e10
_MISSING = "nothing of that name"


def description(
    config: RunConfig, data: Mapping[str, object], identity: Mapping[str, Mapping[str, object]]
) -> dict[str, dict[str, Any]]:
    """Return the facts that make a run this one.

    Args:
        config: the options; rounds may be added to a run, so their number is not part of it.
        data: what data, split how.
        identity: more of the kind: the algorithm's name, the parts of the model.
    """
    options = {name: value for name, value in result_options(config).items() if name not in _MAY_CHANGE}
    algorithm = {kind: dict(values) for kind, values in identity.items()}
    return {**algorithm, "options": options, "data": dict(data)}


def refuse_other_run(
    path: Path, stored: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]], same_version: bool = True
) -> None:
    """Compare a checkpoint's `description` with this job's: every key that either of them has.

    Args:
        path: the run folder, for the message.
        stored: the checkpoint's.
        given: this job's.
        same_version: whether this version of fedmpi wrote the checkpoint. In another version's, an option of fedmpi's
            own may be missing if it has its default here: it was added since.

    Raises:
        ConfigError: names what differs, its value there and here, and how to start afresh.
    """
    for kind, values in given.items():
        if kind not in stored and kind != "options":
            raise ConfigError(
                f"--run-dir {path} holds a run with no record of its {kind}, by an earlier fedmpi: go on with that one,"
                " name another, or --resume never to start over"
            )
        before = stored[kind]
        for name in [*values, *(name for name in before if name not in values)]:
            there, here = before.get(name, _MISSING), values.get(name, _MISSING)
            if there == here and type(there) is type(here):
                continue
            if kind == "options" and name not in before and not same_version and _is_default(name, here):
                continue
            if isinstance(there, str) and isinstance(here, str) and kind == "model":
                there, here = _differing(there, here), _differing(here, there)
            what = flag_of(name) if kind == "options" else f"{'model part ' * (kind == 'model')}{name}"
            raise ConfigError(
                f"--run-dir {path} holds a run with {shown(what)} {_said(there)}, this one has {_said(here)}: name"
                " another, or --resume never to start over"
            )


def _differing(part: str, other: str) -> str:
    """Return the words of a part's description that the other one lacks."""
    known = other.split("; ")
    return "; ".join(text for text in part.split("; ") if text not in known) or "no more than that"


def _is_default(name: str, value: object) -> bool:
    return any(f.name == name and f.default == value for f in dataclasses.fields(RunConfig))


def check_numbers(stored: Mapping[str, Any], round_of_name: int) -> None:
    """See that numbers which nothing else checks are in range.

    Raises:
        ValueError: it is not; names it.
    """
    server = stored["server"]
    done, num_bytes = server["half"]["round_idx"], stored["history_bytes"]
    if type(done) is not int or done != round_of_name:
        raise ValueError(f"it holds round {shown(done)}, its name says {round_of_name}")
    if type(num_bytes) is not int or num_bytes < 0:
        raise ValueError(f"history_bytes {shown(num_bytes)}")
    for name, value, kind, dtype in (
        ("vector", server["half"]["vector"], torch.Tensor, torch.float32),
        ("integers", server["half"]["integers"], np.ndarray, np.int64),
        ("costs", server.get("costs", np.zeros(5)), np.ndarray, np.float64),
    ):
        if not isinstance(value, kind) or value.dtype != dtype or value.ndim != 1:
            raise ValueError(f"{name} {shown(value)}")
    if len(server.get("costs", range(5))) != 5:
        raise ValueError("costs of another length")
    seconds = {"elapsed_s": server.get("elapsed_s", 0.0), **server.get("pace", {})}
    for name, value in seconds.items():
        if not isinstance(value, int | float) or not 0 <= value < _CENTURIES_S:
            raise ValueError(f"{name} {shown(value)}")


def changes(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Return the means by which the rest of a run is computed otherwise than its beginning, as text; empty: none."""
    differing = [
        f"{name} {_said(stored.get(name))}, now {_said(given.get(name))}"
        for name in _DECIDES_BITS
        if stored.get(name) != given.get(name)
    ]
    return "; ".join(differing)


def changed_sources(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Return the source files of the user's own functions that have changed, as text; empty: none."""
    before, now = stored.get("sources") or {}, given.get("sources") or {}
    differing = [
        f"{shown(role)} in {shown(where['file'], 300)} ({_digest(before.get(role))}, now {_digest(where)})"
        for role, where in now.items()
        if _digest(before.get(role)) != _digest(where)
    ]
    gone = [f"{shown(role)}, which had a file" for role in before if role not in now]
    return "; ".join(differing + gone)


def _digest(where: Any) -> str:
    return shown(where["sha256"])[:8] if isinstance(where, Mapping) and "sha256" in where else "none"


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(shown, value[:8]))
    return "unset" if value is None else shown(value)
