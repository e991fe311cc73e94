"""The suite itself under mpiexec: a test that fails on one rank ends the run, and one report says which."""

from __future__ import annotations

import shutil

import pytest

from tests.e2e.conftest import ROOT


@pytest.fixture
def suite(job, tmp_path):
    """`suite(text)` runs a copy of the suite whose spmd part is `text`, on three ranks."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("test_*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def suite(text: str):
        (tmp_path / "tests" / "spmd" / "test_mine.py").write_text(text)
        return job(3, "tests/spmd", "-q", program=("-m", "pytest"), cwd=tmp_path)

    return suite


def test_a_failure_on_one_rank_fails_the_run_and_names_the_rank(suite):
    result = suite("def test_mine(net, agree):\n    agree(net.rank != 1, 'the detail')\n")
    assert result.code != 0
    assert result.out.count("rank 1: the detail") >= 1
    assert result.out.count("1 failed") == 1


def test_a_bare_assert_on_one_rank_fails_the_run_too(suite):
    result = suite("def test_mine(net):\n    assert net.rank != 1\n\ndef test_next(net):\n    net.barrier()\n")
    assert result.code != 0
    assert "failed on rank 1 of 3" in result.out
    assert "1 failed, 1 passed" in result.out


def test_a_rank_that_never_enters_a_collective_ends_the_run(suite):
    result = suite("def test_mine(net):\n    assert net.rank != 2, 'not here'\n    net.barrier()\n")
    assert result.code != 0
    assert "test_mine failed on rank 2 of 3" in result.text
    assert result.text.count("AssertionError: not here") == 1


def test_all_ranks_share_tmp_path(suite):
    result = suite(
        "def test_mine(net, agree, tmp_path):\n"
        "    if net.is_server:\n"
        "        (tmp_path / 'a').write_text('x')\n"
        "    net.barrier()\n"
        "    agree((tmp_path / 'a').exists())\n"
    )
    assert result.code == 0, result.text
    assert "1 passed" in result.out


@pytest.mark.slow
def test_two_suites_at_the_same_time_do_not_meet(start, tmp_path):
    args = ("tests/spmd/test_comm.py", "-q")
    both = [start(3, *args, program=("-m", "pytest"), cwd=ROOT) for _ in range(2)]
    assert [each.end().code for each in both] == [0, 0]
