"""The end of a job, as the program that started it learns of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fedmpi.core.vector import vector_hash
from fedmpi.errors import FedmpiError


@dataclass(frozen=True)
class Outcome:
    """The end of a job.

    Attributes:
        exit_code: the same on every rank.
        folder: of the run; on the server only, as what follows.
        model_hash: of the global model, finished or not.
        failure: why the run diverged, if it did.
    """

    exit_code: int
    folder: Path | None = None
    model_hash: str = ""
    failure: FedmpiError | None = None


def outcome_of(
    code: int,
    folder: Path | None,
    model: nn.Module,
    failure: FedmpiError | None = None,
) -> Outcome:
    """The outcome as this rank knows it."""
    if folder is None:
        return Outcome(code)
    return Outcome(code, folder, vector_hash(model.state_dict()), failure)
