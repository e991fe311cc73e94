"""Files that survive crashes: a path holds the old content or the new, never half of it.

What is opened by name may have been put there by somebody else: links are not followed, and a folder, a pipe or a
device in the place of a file is an error and no wait.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from fedmpi.errors import FedmpiError, FilesystemError

TEMP_SUFFIX = ".tmp"


def atomic_write(
    path: Path, content: bytes | Callable[[BinaryIO], None], may_write: Callable[[], None] | None = None
) -> None:
    """Make `path` hold `content`, all of it or none: whoever looks, also after a crash, finds the old or the new file.

    A link at `path` is replaced, not followed.

    Args:
        path: the file; its folder must exist.
        content: the bytes, or a function that writes them to the open file.
        may_write: called last, right before the new file takes the place of the old; it raises to keep the old one.

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
        if may_write is not None:
            may_write()
        temp.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise FilesystemError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink()


def open_regular(path: Path, flags: int = os.O_RDONLY, follow: bool = False) -> int:
    """Open a regular file, and return its descriptor at once whatever lies there.

    Args:
        path: the file.
        flags: of `os.open`.
        follow: go through a link: only for a path that the user names.

    Raises:
        OSError: there is none, it is no regular file, or it is a link; `strerror` says which.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW), 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink() and not follow:
            raise OSError(errno.ELOOP, "it is a link, and links are not followed here") from error
        if error.errno == errno.ENXIO:  # a pipe without a reader, a socket
            raise OSError(errno.ENXIO, "it is no regular file") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise OSError(errno.EINVAL, "it is no regular file")
    return descriptor


def read_regular(path: Path, limit: int, follow: bool = False) -> bytes:
    """The content of a regular file of at most `limit` bytes; see `open_regular`.

    Raises:
        OSError: as `open_regular`, or it is longer.
    """
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is longer than {limit:,} bytes")
    return content


def open_limited(path: str | Path, limit: int) -> BufferedReader:
    """Open a regular file of at most `limit` bytes to read; links are followed.

    Raises:
        FileNotFoundError: there is none.
        OSError: as `open_regular`, or it is longer; `strerror` says so.
    """
    try:
        descriptor = open_regular(Path(path), follow=True)
    except ValueError as error:  # a null byte in the name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
    size = os.fstat(descriptor).st_size
    if size > limit:
        os.close(descriptor)
        raise OSError(errno.EFBIG, f"it has {size} bytes, at most {limit} are read")
    return os.fdopen(descriptor, "rb")


def sha256_of(path: str | Path, limit: int) -> str:
    """Return the SHA-256 (hex) of a regular file of at most `limit` bytes; errors as in `open_limited`."""
    with open_limited(path, limit) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def os_errors(error_class: type[FedmpiError], what: str) -> Iterator[None]:
    """Turn an OSError inside into `error_class` with the message "`what`: reason"."""
    try:
        yield
    except OSError as error:
        raise error_class(f"{what}: {error.strerror or error}") from error


def refuse_odd(path: Path, folder: bool = False) -> None:
    """See that `path` is a regular file (or a folder), no link, or not there.

    Raises:
        FilesystemError: it is something else, which somebody put there.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise FilesystemError(f"{path} cannot be read: {error.strerror}") from error
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
        found = kinds.get(stat.S_IFMT(mode), "a pipe, socket or device")
        raise FilesystemError(f"{path} must be {'a folder' if folder else 'a file'}, found {found}: remove it")


def temp_path(path: Path) -> Path:
    """A fresh hidden name beside `path`; `remove_temps` finds what a killed process left under such names."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMP_SUFFIX}")


def free_path(path: Path) -> Path:
    """`path`, or `path`-2, `path`-3, ...: the first that nothing has, not even a link to nowhere."""
    names = (path.name if attempt == 1 else f"{path.name}-{attempt}" for attempt in range(1, 10_000))
    for name in names:
        if not os.path.lexists(path.with_name(name)):
            return path.with_name(name)
    raise FilesystemError(f"{path}: ten thousand such names are taken")


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
