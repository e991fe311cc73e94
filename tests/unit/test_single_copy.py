"""Reading another rank's memory is switched off where it is forbidden, and only there."""

from __future__ import annotations

import pytest

from fedmpi.mpi import single_copy
from fedmpi.mpi.single_copy import SWITCHES, avoid_single_copy, reads_memory

HOST = "user:[4026531837]"


@pytest.fixture
def proc(tmp_path):
    """`proc(namespace)` is a process table whose own entry is in that user namespace."""

    def proc(namespace):
        (tmp_path / "self" / "ns").mkdir(parents=True)
        if namespace:
            (tmp_path / "self" / "ns" / "user").symlink_to(namespace)
        return tmp_path

    return proc


def test_the_call_is_tried_on_this_process():
    assert isinstance(reads_memory(), bool)


@pytest.mark.parametrize(
    ("works", "namespace", "off"),
    [(True, HOST, False), (False, HOST, True), (True, "user:[4026532000]", True), (True, None, True)],
)
def test_it_is_off_unless_it_works_for_all_ranks(proc, monkeypatch, works, namespace, off):
    monkeypatch.setattr(single_copy, "reads_memory", lambda: works)
    environ = {"OMPI_MCA_smsc": "xpmem"}
    assert avoid_single_copy(environ, proc(namespace)) is off
    assert environ == ({**SWITCHES, "OMPI_MCA_smsc": "xpmem"} if off else {"OMPI_MCA_smsc": "xpmem"})
