"""Dead jobs' files go, and nothing else: in a /dev/shm, a folder for temporary files and a process table of our own."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedmpi.mpi.stale_segments import remove_leftovers

HOST = socket.gethostname()
UID = os.geteuid()
INIT = {"pid": "pid:[4026531836]", "ipc": "ipc:[4026531839]", "other pid": "pid:[4026532001]", "other ipc": "ipc:[7]"}
SEGMENTS = (
    "mpich_shm_c63c355c_0",
    "mpich_shm_2aa8_0",
    "mpich_shar_tmp0Rruio",
    "ucx_shm_posix_1b599455",
    f"sm_segment.{HOST}.{UID}.bbd80001.0",
    f"osc_sm.{HOST}.bbd80001.0.4",
    f"vader_segment.{HOST}.{UID}.bbd80001.0",
)


class Node:
    """Folders like those of a node, and what a job that starts on it removes."""

    def __init__(self, root: Path) -> None:
        self.shm, self.temporary, self.proc = root / "shm", root / "tmp", root / "proc"
        for folder in (self.shm, self.temporary, self.proc / "self" / "ns"):
            folder.mkdir(parents=True)
        self.namespaces("pid", "ipc")

    def namespaces(self, pid: str, ipc: str) -> None:
        for kind, name in (("pid", pid), ("ipc", ipc)):
            link = self.proc / "self" / "ns" / kind
            link.unlink(missing_ok=True)
            link.symlink_to(INIT[name])

    def segment(self, name: str) -> Path:
        path = self.shm / name
        path.write_bytes(b"x" * 100)
        return path

    def session(self, name: str, host: str = HOST) -> Path:
        path = self.temporary / name
        (path / "1" / "0").mkdir(parents=True)
        (path / f"pmix.{host}.tool").write_text("")
        return path

    def process(
        self, pid: int, maps: str = "", cwd: str = "/", opened: str = "/dev/null", shared: str = "0 kB"
    ) -> Path:
        path = self.proc / str(pid)
        (path / "fd").mkdir(parents=True)
        (path / "maps").write_text(
            f"7f00-7f01 r-xp 00000000 08:01 99 /usr/bin/python\n7f02-7f03 rw-p 0 00:00 0\n{maps}"
        )
        (path / "cwd").symlink_to(cwd)
        (path / "fd" / "3").symlink_to(opened)
        (path / "status").write_text(f"Name:\tpython\nUid:\t{UID}\t{UID}\t{UID}\t{UID}\nRssShmem:\t{shared}\n")
        return path

    def start_job(self, age_s: float = -1.0, **environ: str) -> set[str]:
        """`age_s`: of the job; less than 0: younger than all that is there."""
        return {path.name for path in remove_leftovers(environ, self.shm, self.temporary, self.proc, age_s)}


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


def maps_line(path: Path) -> str:
    about = path.stat()
    device = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}"
    return f"7f5ad22eb000-7f5ad25f3000 rw-s 00000000 {device} {about.st_ino}                       /elsewhere/name\n"


@pytest.mark.parametrize("name", SEGMENTS)
def test_a_segment_that_nobody_maps_is_removed(node, name):
    path = node.segment(name)
    node.process(10)
    assert node.start_job() == {name}
    assert not path.exists()
    assert node.start_job() == set()


def test_a_segment_of_a_running_job_stays(node):
    """Known by its inode, whatever its name is in that process, by its path, or by being open."""
    by_inode, by_path, opened, dead = (node.segment(f"mpich_shm_{name}_0") for name in "abcd")
    node.process(10, maps_line(by_inode))
    node.process(11, f"7f00-7f01 rw-s 00000000 00:1f 4256 {by_path}\n")
    node.process(12, opened=str(opened))
    assert node.start_job() == {dead.name}
    assert by_inode.exists()
    assert by_path.exists()
    assert opened.exists()


def test_a_segment_younger_than_this_process_stays(node):
    """A job that is just starting has made it and not mapped it yet."""
    path = node.segment(SEGMENTS[0])
    assert node.start_job(age_s=60) == set()
    assert path.exists()


@pytest.mark.parametrize("name", ["psm2_shm.1", "mpich_shm_", "my_mpich_shm_1_0", "sem.mpich_shm_1", "results.npy"])
def test_other_names_stay(node, name):
    assert node.segment(name)
    assert node.start_job() == set()


def test_links_are_neither_followed_nor_removed(node, tmp_path):
    target = tmp_path / "precious"
    target.write_text("x")
    (node.shm / "mpich_shm_1_0").symlink_to(target)
    (node.shm / "mpich_shm_2_0").hardlink_to(target)
    (node.shm / "mpich_shm_3_0").mkdir()
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / f"pmix.{HOST}.tool").write_text("")
    (node.temporary / "ompi.999999").symlink_to(folder)
    session = node.session("ompi.999998")
    (session / "link").symlink_to(folder)
    assert node.start_job() == {session.name}
    assert target.exists()
    assert (folder / "inner").exists()
    assert not session.exists()


def test_only_the_first_rank_of_a_node_removes(node):
    node.segment(SEGMENTS[0])
    for name in ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"):
        assert node.start_job(**{name: "1"}) == set()
    assert node.start_job(MPI_LOCALRANKID="0", SLURM_LOCALID="0") == {SEGMENTS[0]}


@pytest.mark.parametrize(
    ("pid", "ipc", "removed"),
    [("pid", "ipc", True), ("other pid", "other ipc", True), ("pid", "other ipc", True), ("other pid", "ipc", False)],
)
def test_nothing_is_removed_where_users_of_the_memory_cannot_be_seen(node, pid, ipc, removed):
    """A container with the host's /dev/shm and processes of its own."""
    node.namespaces(pid, ipc)
    node.segment(SEGMENTS[0])
    assert node.start_job() == ({SEGMENTS[0]} if removed else set())


def test_without_a_process_table_nothing_is_removed(node):
    node.segment(SEGMENTS[0])
    shutil.rmtree(node.proc)
    assert node.start_job() == set()


@pytest.mark.parametrize(("shared", "pid", "removed"), [("2048 kB", 10, False), ("0 kB", 10, True), ("64 kB", 1, True)])
def test_an_own_process_that_cannot_be_read_may_use_them_all(node, monkeypatch, shared, pid, removed):
    """Unless it has no shared memory, as ssh-agent has not, or is init."""
    node.segment(SEGMENTS[0])
    secret = node.process(pid, shared=shared)
    real = Path.read_bytes

    def read_bytes(path):
        if path == secret / "maps":
            raise PermissionError(path)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert node.start_job() == ({SEGMENTS[0]} if removed else set())


def test_another_users_files_stay(node, monkeypatch):
    path, session = node.segment(SEGMENTS[0]), node.session("ompi.999999")
    monkeypatch.setattr(os, "geteuid", lambda: UID + 1)
    assert node.start_job() == set()
    assert path.exists()
    assert session.exists()


def test_a_dead_sessions_folder_is_removed(node):
    dead, running, other_host, unknown = (
        node.session("ompi.999999"),
        node.session("ompi.10"),
        node.session("ompi.999998", host="elsewhere"),
        node.session("ompi.999997", host=f"{HOST}2"),
    )
    by_host = node.session(f"prte.{HOST}.{UID}/dvm.999999")
    kept = node.session(f"ompi.{HOST}.{UID}/pid.10")
    elsewhere = node.session(f"prte.elsewhere.{UID}/dvm.999999", host="elsewhere")
    node.process(10)
    assert node.start_job() == {dead.name, by_host.name}
    assert running.exists()
    assert other_host.exists()
    assert unknown.exists()
    assert kept.exists()
    assert elsewhere.exists()


@pytest.mark.parametrize("use", ["maps", "cwd", "opened"])
def test_a_session_somebody_is_in_stays(node, use):
    session = node.session("ompi.999999")
    inside = f"{session}/1/segment"
    node.process(10, **{use: f"7f00-7f01 rw-s 00000000 00:1f 4256 {inside}\n" if use == "maps" else inside})
    assert node.start_job() == set()


def test_jobs_that_start_together_take_turns(node):
    names = sorted(node.segment(f"mpich_shm_{i}_0").name for i in range(50))
    with ThreadPoolExecutor(4) as pool:
        removed = [pool.submit(node.start_job) for _ in range(4)]
    assert sorted(name for names in removed for name in names.result()) == names
    assert list(node.shm.iterdir()) == []


def test_where_the_kernel_has_no_locks_nothing_is_removed(node, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    segment = node.segment("mpich_shm_1")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert node.start_job() == set()
    assert segment.exists()
    monkeypatch.undo()
    assert node.start_job() == {segment.name}


def test_what_has_the_name_of_a_leftover_by_now_stays(node, monkeypatch):
    """Another job removes the leftover and makes its own segment between our look at the processes and our removal."""
    path = node.segment(SEGMENTS[0])
    process = node.process(10)
    real = Path.read_bytes

    def read_bytes(file):
        if file == process / "maps":
            path.unlink()
            node.segment("in the way of the inode")
            node.segment(SEGMENTS[0])
        return real(file)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert node.start_job() == set()
    assert path.exists()


def test_it_takes_no_time(node):
    """100 processes of 300 mappings each; none is looked at if there is nothing to remove."""
    lines = "".join(f"7f{i:04x}-7f{i:04x} r-xp 00000000 08:01 {i} /usr/lib/lib{i}.so\n" for i in range(300))
    for pid in range(2, 102):
        node.process(pid, lines)
    begun = time.process_time()
    node.start_job()
    empty_s = time.process_time() - begun
    node.segment(SEGMENTS[0])
    assert node.start_job() == {SEGMENTS[0]}
    assert empty_s < 0.01
    assert time.process_time() - begun < 0.5
