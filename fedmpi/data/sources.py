"""Where the files of a data set come from: verified, once per folder, however many processes and jobs want them.

`obtain` is called by every process of a job before MPI starts. Mostly it compares four file times with a small record
of what was verified before. Otherwise one process, under a lock, tries the sources in turn while the others wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

from fedmpi.data.bring import STAGING, bring
from fedmpi.data.raw_sets import RAW_SETS, RawSet
from fedmpi.data.reading import is_folder, is_regular
from fedmpi.data.trust import exposed
from fedmpi.data.verify import RECORD, compare, recorded, say, wanted_sums, write_record
from fedmpi.errors import ConfigError, DataError, FilesystemError, shown
from fedmpi.lifecycle.files import remove_temps
from fedmpi.lifecycle.lock import FileLock

LOCK = ".lock"

logger = logging.getLogger(__name__)


def default_data_dir() -> Path:
    """`$FEDMPI_DATA`, else the user's cache folder."""
    own = os.environ.get("FEDMPI_DATA")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(own).expanduser() if own else Path(cache).expanduser() / "fedmpi"
    except RuntimeError as error:
        raise DataError("no home folder to keep data sets in: give --data-dir or $FEDMPI_DATA") from error


def data_root(data_dir: str | Path | None) -> Path:
    """The folder of all data sets: `data_dir` (`--data-dir`), else the default."""
    return default_data_dir() if data_dir is None else expanded(data_dir, "--data-dir")


def expanded(path: str | Path, option: str) -> Path:
    """`path`, the value of `option`, with the home folder for "~".

    Raises:
        ConfigError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{option} {shown(str(path))}: no such home folder") from error


def obtain(name: str, data_dir: str | Path | None = None) -> Path:
    """Make sure that the verified files of data set `name` are on this machine; the folder that holds them.

    Starts child processes if it must fetch: call it before MPI starts. Data sets without files are always there.

    Args:
        name: a key of `RAW_SETS`, or a data set without files.
        data_dir: the folder of all data sets; None: `default_data_dir()`.

    Raises:
        DataError: no source serves, or the folder is read-only and incomplete.
        FilesystemError: the folder cannot be written, is full, or another process holds its lock for too long.
    """
    root = data_root(data_dir)
    raw = RAW_SETS.get(name)
    home = root / name
    if raw is None:
        return home
    folder = recorded(raw, root, home)
    if folder is not None:
        if is_regular(home / LOCK):  # of a process that is about to leave, or was killed while it left
            with contextlib.suppress(FilesystemError), FileLock(home / LOCK, timeout_s=0):
                pass
        return folder
    problem = exposed(home / RECORD)
    if problem:
        folder = _found_where_others_write(name, raw, root, home, problem)
        if folder is not None:
            return folder
    if not writable(home):
        folder, wrong = _find(raw, root, home)
        if folder is None:
            raise DataError(f"{name}: {home} is read-only and {say(wrong)}: mend it there, or give another --data-dir")
        return folder
    try:
        home.mkdir(0o755, parents=True, exist_ok=True)
        with FileLock(home / LOCK):
            return recorded(raw, root, home) or _renew(name, raw, root, home)
    except OSError as error:
        raise FilesystemError(f"{error.filename or home} cannot be written: {error.strerror or error}") from error


def obtained(name: str, data_dir: str | Path | None = None) -> tuple[Path, dict[str, str]]:
    """Where `obtain` left the files, and their SHA-256 sums by file name; looks, writes nothing, starts nothing.

    Raises:
        DataError: they are not there.
    """
    root = data_root(data_dir)
    raw, home = RAW_SETS[name], root / name
    folder = recorded(raw, root, home) or _find(raw, root, home)[0]
    if folder is None:
        raise DataError(f"{name} is not in {home}: python -m fedmpi.data.prepare --dataset {name} brings it there")
    return folder, wanted_sums(raw, home)


def _found_where_others_write(name: str, raw: RawSet, root: Path, home: Path, problem: str) -> Path | None:
    """The folder with the right files, hashed now; None: it has to be fetched.

    Raises:
        DataError: the files have no known sums, so that nothing can be verified there.
    """
    if not all(raw.files.values()):
        raise DataError(f"{name}: {problem}, and decoded files cannot be verified there: give a --data-dir of your own")
    folder, _ = _find(raw, root, home)
    if folder is not None:
        logger.info("%s: %s: its files are hashed at each start", name, problem)
    return folder


def _renew(name: str, raw: RawSet, root: Path, home: Path) -> Path:
    """Under the lock: verify what is there, fetch what is not, write the record."""
    remove_temps(home)
    for left in home.glob(f"{STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)
    folder, wrong = _find(raw, root, home)
    if folder is None:
        for file, problem in wrong.items():
            if (home / file).exists():
                logger.warning("%s: %s %s: fetching it again", name, home / file, problem)
        bring(name, raw, root, home, wrong)
        folder = home
    if not exposed(home / RECORD):
        write_record(raw, root, home, folder)
    return folder


def _find(raw: RawSet, root: Path, home: Path) -> tuple[Path | None, dict[str, str]]:
    """The first folder whose files all have the wanted sums; else what is wrong with those in `home`."""
    wanted = wanted_sums(raw, home)
    wrong = compare(home, wanted)
    if not wrong:
        return home, {}
    for folder in (root / layout for layout in raw.layouts):
        if all(is_regular(folder / file) for file in wanted) and not compare(folder, wanted):
            return folder, {}
    return None, wrong


def writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or the folder itself; only asks."""
    while not (is_folder(folder) or is_regular(folder)) and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)
