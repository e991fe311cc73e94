"""The SHA-256 sums that files of a data set must have, and the record that spares hashing them again.

The record counts only where nobody else can write (see `trust`): elsewhere the files are hashed each time.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fedmpi.data.raw_sets import RawSet
from fedmpi.data.reading import MAX_DATA_BYTES, open_regular, read_regular
from fedmpi.data.trust import exposed
from fedmpi.lifecycle.files import atomic_write

RECORD = "verified.json"
MISSING = "missing"

_MAX_RECORD_BYTES = 2**20


def write_record(raw: RawSet, root: Path, home: Path, folder: Path) -> None:
    """Record in `home` that the files in `folder` were verified (or, for decoded ones, just made)."""
    wanted = wanted_sums(raw, home)
    entries = {}
    for file in raw.files:
        sha256 = wanted[file] if raw.decode is None else sha256_of(folder / file)
        entries[file] = {"sha256": sha256, "stat": stat_of(folder / file)}
    record = {"folder": os.path.relpath(folder, root), "files": entries}
    atomic_write(home / RECORD, json.dumps(record, indent=1).encode())


def compare(folder: Path, wanted: dict[str, str]) -> dict[str, str]:
    """File -> what is wrong with it, for those that are missing or damaged."""
    wrong = {}
    for file, pinned in wanted.items():
        try:
            found = sha256_of(folder / file)
        except FileNotFoundError:
            wrong[file] = MISSING
        except OSError as error:
            wrong[file] = f"cannot be read ({error.strerror})"
        else:
            if not pinned:
                wrong[file] = f"is not in {RECORD}"
            elif found != pinned:
                wrong[file] = f"has SHA-256 {found}, wanted {pinned}"
    return wrong


def recorded(raw: RawSet, root: Path, home: Path) -> Path | None:
    """The folder in the record, if its files are those that were verified: same size, times and inode."""
    record = _read_record(home)
    try:
        folder: Path = root / record["folder"]
        for file, pinned in raw.files.items():
            entry = record["files"][file]
            if entry["stat"] != stat_of(folder / file) or entry["sha256"] != (pinned or entry["sha256"]):
                return None
    except (OSError, LookupError, TypeError, ValueError):
        return None
    return folder


def _read_record(home: Path) -> dict[str, Any]:
    if exposed(home / RECORD):
        return {}
    try:
        record = json.loads(read_regular(home / RECORD, _MAX_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def wanted_sums(raw: RawSet, home: Path) -> dict[str, str]:
    """File -> SHA-256 it must have: the pinned one, or, for decoded files, the one found when they were made."""
    entries = _read_record(home).get("files", {})
    sums = {}
    for file, pinned in raw.files.items():
        entry = entries.get(file, {}) if isinstance(entries, dict) else {}
        sums[file] = pinned or (str(entry.get("sha256", "")) if isinstance(entry, dict) else "")
    return sums


def stat_of(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path, MAX_DATA_BYTES) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def say(wrong: dict[str, str]) -> str:
    missing = [file for file, problem in wrong.items() if problem == MISSING]
    others = [f"{file} {problem}" for file, problem in wrong.items() if problem != MISSING]
    verb = "is" if len(missing) == 1 else "are"
    return "; ".join(([f"{', '.join(missing)} {verb} {MISSING}"] if missing else []) + others)
