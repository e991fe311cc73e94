"""Fixtures of tests that all ranks run together."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmpi.mpi.comm import PackageProcessor


@pytest.fixture
def tmp_path(net: PackageProcessor, tmp_path: Path) -> Path:
    """Collective. One temporary folder for all ranks: rank 0's."""
    return net.on_root(lambda: tmp_path)
