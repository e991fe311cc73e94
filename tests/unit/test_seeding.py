"""Seeds are functions of (seed, stream, round, client) and of nothing else."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmpi.core.seeding import Stream, derive_seed, seed_everything

seeds = st.integers(0, 2**63 - 1)


@pytest.fixture
def restored_generators() -> Iterator[None]:
    """The global generators as they were, after the test."""
    python, legacy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(python)
    np.random.set_state(legacy)  # noqa: NPY002  # as above
    torch.set_rng_state(pytorch)


def drawn() -> tuple[float, float, float]:
    """A number of each global generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002  # users' code may still draw from it


@given(seeds, st.sampled_from(Stream), st.integers(0, 10**6), st.integers(0, 10**6))
def test_seeds_fit_every_generator_and_repeat(seed: int, stream: Stream, round_idx: int, client_id: int) -> None:
    derived = derive_seed(seed, stream, round_idx, client_id)
    assert 0 <= derived < 2**63
    assert derived == derive_seed(seed, stream, round_idx, client_id)
    torch.Generator().manual_seed(derived)


def test_no_two_purposes_share_a_seed() -> None:
    purposes = list(itertools.product((0, 1, 2**32, 2**32 + 1), Stream, range(8), range(8)))
    assert len({derive_seed(*purpose) for purpose in purposes}) == len(purposes)


def test_round_and_client_do_not_trade_places() -> None:
    assert derive_seed(0, Stream.CLIENT, 1, 2) != derive_seed(0, Stream.CLIENT, 2, 1)


def test_the_hash_seed_of_a_process_does_not_matter() -> None:
    code = "from fedmpi.core.seeding import *; print(derive_seed(3, Stream.BATCHES, 4, 5))"
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert told == {f"{derive_seed(3, Stream.BATCHES, 4, 5)}\n"}


@pytest.mark.usefixtures("restored_generators")
@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**63 - 1])
def test_global_generators_are_seeded(seed: int) -> None:
    seed_everything(seed)
    first, second = drawn(), drawn()
    assert all(now != then for now, then in zip(first, second, strict=True))
    seed_everything(seed)
    assert drawn() == first
    seed_everything(seed ^ 1)
    assert all(now != then for now, then in zip(drawn(), first, strict=True))
