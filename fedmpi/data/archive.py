"""Taking named files out of a tar.gz that came from elsewhere: regular members only, in one pass, within a limit."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fedmpi.data.reading import MAX_DATA_BYTES, open_regular
from fedmpi.errors import shown

MAX_MEMBERS = 10_000


class ArchiveError(Exception):
    """The archive is damaged, or holds what a data set does not; the text says what."""


def members(archive: Path, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the `wanted` members, in the archive's order.

    Raises:
        FileNotFoundError: no such archive.
        ArchiveError: damaged, too large when unpacked, or a wanted member is a link, a device or a folder.
    """
    try:
        with (
            open_regular(archive, MAX_DATA_BYTES) as packed,
            gzip.open(packed) as plain,
            tarfile.open(fileobj=_Bounded(plain), mode="r|") as tar,
        ):
            for count, member in enumerate(tar):
                if count == MAX_MEMBERS:
                    raise ArchiveError(f"more than {MAX_MEMBERS} members")
                if member.name not in wanted:
                    continue
                content = tar.extractfile(member) if member.isreg() and not member.sparse else None
                if content is None:
                    raise ArchiveError(f"{shown(member.name)} is no plain file there")
                yield member.name, content.read()
    except FileNotFoundError:
        raise
    except (EOFError, OSError, ValueError, OverflowError, RecursionError, tarfile.TarError, zlib.error) as error:
        raise ArchiveError(shown(str(error)) or type(error).__name__) from error


class _Bounded(io.RawIOBase):
    """The unpacked bytes, up to `MAX_DATA_BYTES`: a small archive may stand for many."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain
        self._left = MAX_DATA_BYTES

    def read(self, size: int = -1) -> bytes:
        chunk: bytes = self._plain.read(2**16 if size < 0 else min(size, 2**20))
        self._left -= len(chunk)
        if self._left < 0:
            raise ArchiveError(f"it unpacks to more than {MAX_DATA_BYTES} bytes")
        return chunk
