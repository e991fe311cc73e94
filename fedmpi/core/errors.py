"""What can go wrong, as exceptions whose exit code says whose turn it is to act.

Each class takes one message and nothing else, so that it survives a pickle round trip between ranks. The message
says what is wrong, the value found, the range wanted and the option that mends it, on one line.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_MISTAKE = 2
EXIT_DIVERGED = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped early on purpose, run again to go on
EXIT_INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


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
