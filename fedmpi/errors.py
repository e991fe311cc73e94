"""Exceptions whose exit code says whose turn it is to act.

Each class takes one message and nothing else, so that it survives a pickle round trip between ranks. The message
says what is wrong, the value found, the range wanted and the option that mends it, on one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from fedmpi.interrupt import EXIT_INTERRUPTED as EXIT_INTERRUPTED

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_MISTAKE = 2
EXIT_DIVERGED = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped early on purpose, run again to go on


class FedmpiError(Exception):
    """A failure with a message meant for the user; the job ends with `exit_code` and no traceback."""

    exit_code: ClassVar[int] = EXIT_MISTAKE
    everywhere: bool = False  # whether every rank raised it, so that each may exit by itself


class ConfigError(FedmpiError):
    """An option is unknown, malformed, out of range or contradicts another."""


class LaunchError(FedmpiError):
    """The processes were not started as one MPI job, or no MPI library is there."""


class DataError(FedmpiError):
    """A data set is missing, damaged, or cannot be obtained."""


class PartitionError(FedmpiError):
    """A data split is infeasible, damaged, or was made for something else."""


class ModelError(FedmpiError):
    """A model cannot be trained: its dtype, its shape, or the function that builds it."""


class DisagreementError(FedmpiError):
    """Ranks that must hold the same value hold different ones."""


class TransferError(FedmpiError):
    """A buffer handed to MPI has another type, length, order or layout than the transfer wants."""


class CheckpointError(FedmpiError):
    """A checkpoint is damaged, or belongs to another run."""


class FilesystemError(FedmpiError):
    """A folder cannot be written, is full, or is in use by another job."""


class PeerLostError(FedmpiError):
    """Another rank has died."""

    exit_code: ClassVar[int] = EXIT_CRASH


class DivergedError(FedmpiError):
    """Training produced a non-finite number."""

    exit_code: ClassVar[int] = EXIT_DIVERGED


def shown(value: object, limit: int = 80) -> str:
    """Return what a message says of a value that comes from outside: one line, printable characters only, cut.

    Text, bytes and numbers are told as they are, a list by its first values, anything else by its type alone: no code
    of a foreign object runs. The cost does not depend on the size of the value.
    """
    text = _listed(value, limit) if isinstance(value, list | tuple) else _plain_text(value, limit)
    line = " ".join(text.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return line if len(line) <= limit else f"{line[: max(0, limit - 3)]}..."


def _listed(values: Sequence[object], limit: int) -> str:
    if type(values) not in (list, tuple):
        return f"a {type(values).__name__}"
    nested = (list, tuple)
    parts = [f"a {type(item).__name__}" if isinstance(item, nested) else shown(item, limit) for item in values[:3]]
    return f"[{', '.join(parts + ['...'] * (len(values) > 3))}]"


def _plain_text(value: object, limit: int) -> str:
    most = 4 * limit  # white space is folded afterwards
    if type(value) is str:
        return value[:most]
    if type(value) in (bytes, bytearray):
        return bytes(value[:most]).decode(errors="backslashreplace")  # type: ignore[index]  # one of the two
    if type(value) is int and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if value is None or type(value) in (bool, int, float):
        return str(value)
    return f"a {type(value).__name__}"
