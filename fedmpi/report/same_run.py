"""Whether a job may go on with a run: what must be as it was, and what may differ at a price."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmpi.config import RunConfig
from fedmpi.core.errors import ConfigError
from fedmpi.options import flag_of, result_options

logger = logging.getLogger(__name__)

_DECIDES_BITS = ("fedmpi", "torch", "threads", "engine", "capability")


def description(config: RunConfig, data: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    """What makes a run this one. Rounds may be added to it, so their number is not part of it."""
    options = {name: value for name, value in result_options(config).items() if name != "rounds"}
    return {"options": options, "data": dict(data)}


def refuse_other_run(path: Path, stored: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare a checkpoint's `description` with this job's.

    Raises:
        ConfigError: names what differs, its value there and here, and how to start afresh.
    """
    for kind, values in given.items():
        for name, value in values.items():
            before = stored[kind].get(name)
            if before != value:
                what = flag_of(name) if kind == "options" else name
                raise ConfigError(
                    f"--run-dir {path} holds a run with {what} {_said(before)}, this one has {_said(value)}: name"
                    " another, or --resume never to start over"
                )


def warn_of_other_bits(stored: Mapping[str, Any], given: Mapping[str, object]) -> None:
    """One line if the rest of a run is computed by other means than its beginning."""
    differing = [
        f"{name} {_said(stored.get(name))}, now {_said(given[name])}"
        for name in _DECIDES_BITS
        if stored.get(name) != given[name]
    ]
    if differing:
        logger.warning(
            "this run began with %s: its last bits may differ from those of a run of one piece", "; ".join(differing)
        )


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "unset" if value is None else str(value)
