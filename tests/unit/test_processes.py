"""The process table, and what it looks like where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmpi.mpi.processes import PROC, Stat, lineage, namespace, process_age_s, process_stat, read_entry

needs_a_table = pytest.mark.skipif(not PROC.exists(), reason="no process table")


@needs_a_table
def test_this_process_and_its_parents() -> None:
    assert process_stat("self") == process_stat(os.getpid())
    assert process_stat("self").parent == os.getppid()
    assert lineage()[:2] in ([os.getpid(), os.getppid()], [os.getpid()])
    assert sys.argv[-1].encode() in (read_entry("self", "cmdline") or b"")
    assert namespace("pid").startswith("pid:[")


@needs_a_table
def test_the_age_of_a_process_is_that_of_its_start() -> None:
    before = process_age_s()
    time.sleep(0.1)
    assert 0.05 < process_age_s() - before < 5


@needs_a_table
def test_a_process_that_has_ended_and_one_that_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_stat(process.pid).state == "Z"
        assert process_stat(process.pid).started >= process_stat("self").started
    assert process_stat(process.pid) == Stat("", 0, 0)


def test_a_name_may_hold_what_parts_the_fields(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    for line in ("7 (odd) name) S 5 1 1", "7 (S 1) T 5 " + "0 " * 17 + "99 3"):
        (tmp_path / "7" / "stat").write_text(line)
        stat = process_stat(7, tmp_path)
        assert stat == (Stat("S", 5, 0) if "odd" in line else Stat("T", 5, 99))
    (tmp_path / "7" / "stat").write_text("nonsense")
    assert process_stat(7, tmp_path) == Stat()


def test_without_a_table_all_is_empty(tmp_path: Path) -> None:
    assert process_stat("self", tmp_path) == Stat()
    assert lineage(tmp_path) == []
    assert read_entry("self", "environ", tmp_path) is None
    assert namespace("user", tmp_path) == ""


def test_a_table_of_circles_comes_to_an_end(tmp_path: Path) -> None:
    (tmp_path / str(os.getpid())).mkdir()
    (tmp_path / str(os.getpid()) / "stat").write_text(f"1 (a) S {os.getpid()} 0")
    assert len(lineage(tmp_path)) == 1000
