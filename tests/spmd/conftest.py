"""Fixtures of tests that all ranks run together."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmpi.mpi.comm import Comm
from fedmpi.mpi.setup import on_root


@pytest.fixture
def tmp_path(net: Comm, tmp_path: Path) -> Path:
    """Collective. One temporary folder for all ranks: rank 0's."""
    return on_root(net, lambda: tmp_path)
