"""Files that survive crashes: a path holds the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fedmpi.core.errors import FilesystemError

TEMP_SUFFIX = ".tmp"


def atomic_write(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Make `path` hold `content`, all of it or none: whoever looks, also after a crash, finds the old or the new file.

    Args:
        path: the file; its folder must exist.
        content: the bytes, or a function that writes them to the open file.

    Raises:
        FilesystemError: the folder cannot be written or is full; the old file, if any, is untouched.
    """
    temp = temp_path(path)
    try:
        with temp.open("xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise FilesystemError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink()


def temp_path(path: Path) -> Path:
    """A fresh hidden name beside `path`; `remove_temps` finds what a killed process left under such names."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMP_SUFFIX}")


def remove_temps(folder: Path, name: str = "*") -> None:
    """Remove what killed writers of `name` left in `folder`. Call it under the lock those writers hold."""
    for temp in folder.glob(f".{name}.*{TEMP_SUFFIX}"):
        with contextlib.suppress(OSError):
            temp.unlink()


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
