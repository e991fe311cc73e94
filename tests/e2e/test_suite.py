"""The suite itself under mpiexec: a test that fails on one rank ends the run, and one report says which."""

from __future__ import annotations

import shutil
import sys

import pytest

from tests.e2e.conftest import ROOT, mpiexec


@pytest.fixture
def suite(job, tmp_path):
    """`suite(text)` runs a copy of the suite whose spmd part is `text`, on three ranks.

    `conftest`: more lines for that part's conftest.py; `root`: for the suite's, before anything is imported there;
    `options`: of rank 2 alone.
    """
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("test_*", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def suite(text: str, conftest: str = "", root: str = "", options: tuple[str, ...] = ()):
        (tmp_path / "tests" / "spmd" / "test_mine.py").write_text(HERE + text)
        for file, lines in ((tmp_path / "tests" / "spmd", conftest), (tmp_path / "tests", root)):
            before, mark, after = (file / "conftest.py").read_text().partition("\nimport pytest\n")
            (file / "conftest.py").write_text(before + mark + (f"{HERE}{lines}\n" if lines else "") + after)
        words = ("-m", "pytest", "tests/spmd", "-q")
        others = (mpiexec(), "-n", "2", sys.executable, *words, ":", "-n", "1") if options else None
        return job(3, *words[2:], *options, program=words[:2], launcher=others, cwd=tmp_path)

    return suite


HERE = """
import os, sys, pytest
LAST = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))) == 2
"""
TWO = """
def test_mine(net):
    net.barrier()

def test_next(net):
    net.barrier()
"""


def fixture(scope: str, before: str = "pass", after: str = "pass") -> str:
    return (
        f"@pytest.fixture(autouse=True, scope={scope!r})\ndef fixture():\n    {before}\n    yield\n    {after}\n{TWO}"
    )


RAISE = "if LAST: raise ValueError('boom')"

ON_ONE_RANK = {
    "import": {"text": f"{RAISE}\n{TWO}"},
    "sys.exit at import": {"text": f"if LAST: sys.exit(0)\n{TWO}"},
    "os._exit at import": {"text": f"if LAST: os._exit(0)\n{TWO}"},
    "Ctrl-C at import": {"text": f"if LAST: raise KeyboardInterrupt\n{TWO}"},
    "module skipped": {"text": f"if LAST: pytest.skip('boom', allow_module_level=True)\n{TWO}"},
    "one test more": {"text": f"{TWO}\nif LAST:\n    def test_boom(net): pass\n"},
    "another order": {
        "text": "@pytest.mark.parametrize('boom', [1, 2] if LAST else [2, 1])\ndef test_mine(net, boom): pass\n"
    },
    "set-up": {"text": fixture("function", RAISE)},
    "set-up of the session": {"text": fixture("session", RAISE)},
    "teardown": {"text": fixture("function", after=RAISE)},
    "teardown of the module": {"text": fixture("module", after=RAISE)},
    "teardown of the session": {"text": fixture("session", after=RAISE)},
    "sys.exit": {"text": f"{TWO}\ndef test_exit(net):\n    if LAST: sys.exit(0)\n"},
    "os._exit": {"text": f"{TWO}\ndef test_exit(net):\n    if LAST: os._exit(0)\n    net.barrier()\n"},
    "pytest.exit": {"text": f"def test_exit(net):\n    if LAST: pytest.exit('boom', returncode=0)\n{TWO}"},
    "Ctrl-C": {"text": f"def test_exit(net):\n    if LAST: raise KeyboardInterrupt\n{TWO}"},
    "skip": {"text": f"def test_skip(net):\n    if LAST: pytest.skip('boom')\n    net.barrier()\n{TWO}"},
    "timeout": {"text": "import time\n@pytest.mark.timeout(5)\ndef test_sleep(net):\n    time.sleep(60 * LAST)\n"},
    "conftest": {"text": TWO, "conftest": RAISE},
    "os._exit in conftest": {"text": TWO, "conftest": "if LAST: os._exit(0)"},
    "conftest before MPI": {"text": TWO, "root": RAISE},
    "sys.exit before MPI": {"text": TWO, "root": "if LAST: sys.exit(0)"},
    "pytest_configure": {"text": TWO, "conftest": f"def pytest_configure(config):\n    {RAISE}\n"},
    "pytest_sessionstart": {"text": TWO, "conftest": f"def pytest_sessionstart(session):\n    {RAISE}\n"},
    "pytest_collection_modifyitems": {
        "text": TWO, "conftest": f"def pytest_collection_modifyitems(items):\n    {RAISE}\n"
    },
    "pytest_runtest_logreport": {"text": TWO, "conftest": f"def pytest_runtest_logreport(report):\n    {RAISE}\n"},
    "pytest_sessionfinish": {"text": TWO, "conftest": f"def pytest_sessionfinish(session):\n    {RAISE}\n"},
    "pytest_unconfigure": {"text": TWO, "conftest": f"def pytest_unconfigure(config):\n    {RAISE}\n"},
    "missing plugin": {"text": TWO, "options": ("-p", "boom")},
    "double plugin": {"text": TWO, "options": ("-p", "pytest_timeout")},
    "plugin switched off": {"text": TWO, "options": ("-p", "no:pytest_mpi")},
    "unknown option": {"text": TWO, "options": ("--boom",)},
    "other tests": {"text": TWO, "options": ("-k", "next")},
    "stops at the first": {"text": f"def test_boom(net):\n    assert False\n{TWO}", "options": ("-x",)},
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [case if case == "import" else pytest.param(case, marks=pytest.mark.slow) for case in ON_ONE_RANK]
)
def test_an_error_of_any_phase_on_one_rank_ends_the_run_and_is_told(suite, case):
    result = suite(**ON_ONE_RANK[case])
    assert result.code != 0, result.text
    assert result.seconds < 60
    assert "rank 2" in result.text, result.text
    words = ("boom", "first difference", "KeyboardInterrupt", "SystemExit", "os._exit(0)", "Timeout")
    told = [word for word in words if word in result.text]
    wordless = ("other tests", "sys.exit before MPI", "plugin switched off", "double plugin")
    assert told or case in wordless, result.text


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
