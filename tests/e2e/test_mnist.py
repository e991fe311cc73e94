"""Real MNIST, from wherever this machine gets it."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest

from fedmpi import load_dict
from fedmpi.data.datasets import load_dataset

REAL = {"FEDMPI_DATA": os.environ.get("FEDMPI_DATA", "")}
ENV = {key: value for key, value in REAL.items() if value}


@pytest.fixture
def mnist_env(data_dir):
    return ENV or {"FEDMPI_DATA": str(data_dir)}


def test_2nn_learns_mnist_in_seconds(job, mnist_env):
    result = job(3, *"--dataset mnist --model 2nn --rounds 10".split(), env=mnist_env, limit_s=300)
    assert result.code == 0, result.text
    assert result.history()[-1]["accuracy"] >= 0.94


def test_2nn_learns_mnist_from_shards(job, mnist_env):
    args = "--dataset mnist --model 2nn --partition shards --rounds 20 --client-lr 0.05 --eval-every 20".split()
    result = job(3, *args, env=mnist_env, limit_s=300)
    assert result.code == 0, result.text
    assert result.history()[-1]["accuracy"] >= 0.70


def test_how_many_digits_a_client_holds_under_shards(job, mnist_env, tmp_path):
    """As README says; shards that straddle two digits make it one or three."""
    args = f"--dataset mnist --partition shards --num-clients 100 --out {tmp_path}".split()
    prepared = job(1, *args, program=("-m", "fedmpi.data.prepare"), launcher=(), env=mnist_env)
    assert prepared.code == 0, prepared.text
    labels = load_dataset("mnist", mnist_env["FEDMPI_DATA"]).train.y
    (pickle,) = tmp_path.glob("*.pkl")
    digits = Counter(len(np.unique(labels[indices])) for indices in load_dict(str(pickle)).values())
    assert digits == {1: 5, 2: 89, 3: 6}


@pytest.mark.slow
def test_the_main_command(job, mnist_env):
    result = job(11, "--dataset", "mnist", env=mnist_env, limit_s=600)
    assert result.code == 0, result.text
    assert result.history()[-1]["accuracy"] >= 0.98
    assert "1,663,370" in result.out
