"""Which paths only this user and root can change."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedmpi.data.trust import exposed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "a" / "b").mkdir(parents=True, mode=0o755)
    path = tmp_path / "a" / "b" / "file"
    path.touch(0o644)
    return path


def test_an_own_file_is_not_exposed(file: Path) -> None:
    assert exposed(file) == ""
    assert exposed(file.parent / "not" / "yet") == ""


@pytest.mark.parametrize("up", [0, 1, 2])
def test_a_path_with_a_part_that_others_may_write(file: Path, up: int) -> None:
    part = [file, *file.parents][up]
    part.chmod(stat.S_IMODE(part.stat().st_mode) | 0o002)
    assert exposed(file) == f"others may write to {part}"
    if part.is_dir():
        part.chmod(0o1777)  # sticky, as /tmp: entries belong to their owners
        assert exposed(file) == ""


@pytest.mark.parametrize(
    ("group", "members", "own"), [("u", [], True), ("u", ["u"], True), ("staff", [], False), ("u", ["v"], False)]
)
def test_a_group_counts_as_own_if_it_is_this_users_alone(
    file: Path, monkeypatch: pytest.MonkeyPatch, group: str, members: list[str], own: bool
) -> None:
    file.parent.chmod(0o775)
    gid = file.parent.stat().st_gid
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_gid=gid, pw_name="u"))
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name=group, gr_mem=members))
    assert exposed(file) == ("" if own else f"others may write to {file.parent}")


def test_a_folder_of_another_user(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 12345)
    assert exposed(file).endswith(" belongs to another user") or file.stat().st_uid == 0
    if os.getuid() == 0:
        monkeypatch.undo()
        os.chown(file.parent, 65534, 65534)
        assert exposed(file) == f"{file.parent} belongs to another user"


def test_links_are_followed_to_what_they_are(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file.parent)
    assert exposed(link / "file") == ""
    file.parent.chmod(0o777)
    assert exposed(link / "file") == f"others may write to {file.parent}"
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert exposed(tmp_path / "round").endswith("cannot be followed") or exposed(tmp_path / "round") == ""
