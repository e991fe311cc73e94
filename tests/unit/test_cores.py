from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpi.machine import cores

V1 = "4:memory:/job\n3:cpu,cpuacct:{path}\n1:name=systemd:/\n0::/\n"


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, Path]:
    root = tmp_path / "cgroup"
    root.mkdir()
    return root, tmp_path / "membership"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_v2_quota_of_the_cgroup_itself(tree: tuple[Path, Path]) -> None:
    root, membership = tree
    membership.write_text("0::/user.slice/job_7\n")
    write(root / "user.slice" / "job_7", cpu__max="150000 100000")
    assert cores.cgroup_quota(root, membership) == 1.5


def test_v2_the_smallest_quota_up_the_hierarchy_counts(tree: tuple[Path, Path]) -> None:
    root, membership = tree
    membership.write_text("0::/a/b/c\n")
    write(root / "a", cpu__max="100000 100000")
    write(root / "a" / "b", cpu__max="max 100000")
    write(root / "a" / "b" / "c", cpu__max="800000 100000")
    assert cores.cgroup_quota(root, membership) == 1.0


@pytest.mark.parametrize("path", ["/docker/0123abcd", "/", "/../.."])
def test_v2_in_a_container_the_root_holds_the_quota(tree: tuple[Path, Path], path: str) -> None:
    root, membership = tree
    membership.write_text(f"0::{path}\n")
    write(root, cpu__max="200000 100000")
    assert cores.cgroup_quota(root, membership) == 2.0


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_v1_quota(tree: tuple[Path, Path], mount: str) -> None:
    root, membership = tree
    membership.write_text(V1.format(path="/job"))
    write(root / mount / "job", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    write(root / mount, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cores.cgroup_quota(root, membership) == 0.5


def test_hybrid_v2_lies_under_unified(tree: tuple[Path, Path]) -> None:
    root, membership = tree
    membership.write_text(V1.format(path="/"))
    write(root / "unified", cpu__max="300000 100000")
    assert cores.cgroup_quota(root, membership) == 3.0


@pytest.mark.parametrize("text", ["max 100000", "-1 100000", "0 100000", "", "100000", "a b", "1 2 3"])
def test_what_is_no_quota(tree: tuple[Path, Path], text: str) -> None:
    root, membership = tree
    membership.write_text("0::/\n")
    write(root, cpu__max=text)
    assert cores.cgroup_quota(root, membership) is None


def test_no_cgroups_no_quota(tmp_path: Path) -> None:
    assert cores.cgroup_quota(tmp_path, tmp_path / "missing") is None


def test_this_machine_answers() -> None:
    assert 1 <= cores.available_cores() <= len(cores.affinity())


def test_without_affinity_masks_every_core_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores.affinity() == frozenset(range(6))


@pytest.mark.parametrize(
    ("masks", "quota", "allocation", "expected"),
    [
        ([{0, 1, 2, 3}], None, None, 4),
        ([{0}, {1}, {2}], None, None, 3),  # a launcher that binds each rank to a core of its own
        ([{0}, {0}, {0}], None, None, 1),  # taskset -c 0
        ([set(range(16))], 1.5, None, 2),
        ([set(range(16))], 0.5, None, 1),
        ([set(range(16))], None, 4, 4),  # srun -c 4 without enforcement
        ([{0, 1}], None, 16, 2),  # a Slurm that declares more cores than there are
        ([{0, 1}], 8.0, 16, 2),
    ],
)
def test_cores_of_node(masks: list[set[int]], quota: float | None, allocation: int | None, expected: int) -> None:
    assert cores.cores_of_node([frozenset(mask) for mask in masks], quota, allocation) == expected


@given(
    st.lists(st.frozensets(st.integers(0, 63)), min_size=1),
    st.none() | st.floats(0.01, 256),
    st.none() | st.integers(1, 256),
)
def test_cores_of_node_is_at_least_one_and_no_limit_is_passed(
    masks: list[frozenset[int]], quota: float | None, allocation: int | None
) -> None:
    count = cores.cores_of_node(masks, quota, allocation)
    assert count >= 1
    assert count <= max(1, len(frozenset().union(*masks)))
    assert quota is None or count <= quota + 1
    assert allocation is None or count <= allocation


def test_threads_per_trainer() -> None:
    assert cores.threads_per_trainer(1, 16, 4) == 1
    assert cores.threads_per_trainer(8, 2, 4) == 8  # an explicit value wins
    assert cores.threads_per_trainer("auto", 16, 5) == 3
    assert cores.threads_per_trainer("auto", 1, 3) == 1


HAVE = "(affinity, cgroup quota, Slurm): use"


@pytest.mark.parametrize(
    ("cores_here", "num_trainers", "threads", "with_server", "said"),
    [
        (2, 2, 1, True, None),  # README's mpirun -n 3 on two cores: the server sleeps
        (4, 2, 2, True, None),
        (1, 0, 1, True, None),
        (1, 1, 1, True, None),
        (2, 10, 1, True, f"10 trainers share 2 cores {HAVE} at most 2 trainers (3 ranks) for full speed"),
        (1, 2, 1, True, f"2 trainers share 1 core {HAVE} at most 1 trainer (2 ranks) for full speed"),
        (4, 5, 1, False, f"5 trainers share 4 cores {HAVE} at most 4 trainers (4 ranks) for full speed"),
        (4, 3, 2, True, f"3 trainers with 2 threads each share 4 cores {HAVE} "
         "at most 2 trainers (3 ranks) for full speed"),
        (4, 2, 8, True, f"2 trainers with 8 threads each share 4 cores {HAVE} "
         "--threads 2 or fewer trainers for full speed"),
        (2, 1, 4, False, f"4 threads share 2 cores {HAVE} --threads 2 or less for full speed"),
    ],
)  # fmt: skip
def test_trainers_that_share_cores_are_counted_without_the_server(
    cores_here: int, num_trainers: int, threads: int, with_server: bool, said: str | None
) -> None:
    assert cores.oversubscription_warning(cores_here, num_trainers, threads, with_server) == said


def test_a_left_over_slurm_allocation_changes_nothing() -> None:
    assert cores.slurm_allocation({"SLURM_CPUS_ON_NODE": "1"}) is None
    assert cores.slurm_allocation({"SLURM_CPUS_ON_NODE": "1", "SLURM_TASK_PID": "2"}) is None


def test_a_live_slurm_allocation_counts(tmp_path: Path) -> None:
    me = tmp_path / str(os.getpid())
    me.mkdir()
    (me / "stat").write_text(f"{os.getpid()} (py (x) y) S 1 1 1")
    (me / "environ").write_bytes(f"A=1\0SLURM_TASK_PID={os.getpid()}\0".encode())
    environ = {"SLURM_CPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "2", "SLURM_TASK_PID": str(os.getpid())}
    assert cores.slurm_allocation(environ, tmp_path) == 4
    assert cores.slurm_allocation({**environ, "SLURM_CPUS_ON_NODE": "4(x2)"}, tmp_path) is None
