"""The final model's hash and the history do not depend on ranks, on placement, or on the environment."""

from __future__ import annotations

import pytest
import yaml

from tests.e2e.conftest import SMALL, mpiexec


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Filled by the first job of this module: the hash and the history that all others must repeat."""
    return {}


@pytest.mark.parametrize(
    ("num_ranks", "args", "env"),
    [
        (2, (), {}),
        (1, (), {}),
        (3, (), {}),
        (5, (), {}),
        (11, (), {}),
        (3, ("--group-clients", "1"), {}),
        (5, ("--schedule", "static", "--cuda-aware"), {}),
        (3, ("--schedule", "dynamic", "--timeline"), {}),
        (2, (), {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}),
    ],
    ids=str,
)
def test_same_bits_and_history(job, reference, num_ranks, args, env):
    result = job(num_ranks, *SMALL, *args, env=env)
    assert result.code == 0, result.text
    reference.setdefault("bits", result.bits())
    reference.setdefault("history", result.history())
    assert result.bits() == reference["bits"]
    assert result.history() == reference["history"]
    assert f"model {reference['bits']}" in result.out


@pytest.mark.parametrize(
    "client_lr", ["0.1", pytest.param("100", marks=pytest.mark.slow)]
)  # 100: from the second round on no client fits into bin 0
def test_same_bits_where_clients_take_one_step(job, client_lr):
    one_step = ("--batch-size", "0", "--num-clients", "50", "--cohort-size", "40", "--client-lr", client_lr)
    ranks = [(1, ()), (3, ("--schedule", "static")), (5, ("--schedule", "dynamic"))]  # other clients together
    results = [job(n, *SMALL, *one_step, *args, name=f"on{n}") for n, args in ranks]
    assert [result.code for result in results] == [0] * 3, "".join(result.text for result in results)
    assert len({result.bits() for result in results}) == 1
    assert results[0].history() == results[1].history() == results[2].history()


def test_same_bits_under_hash_seeds_that_differ_per_rank(job, reference, tmp_path):
    import sys

    program = [sys.executable, "-m", "fedmpi.fedavg", *SMALL, "--run-dir", str(tmp_path / "run")]
    parts = [["-n", "1", "env", f"PYTHONHASHSEED={seed}", *program] for seed in (1, 2, 3)]
    launcher = (mpiexec(), *parts[0], ":", *parts[1], ":", *parts[2][: -len(program)])
    result = job(0, *program[3:], launcher=launcher, python=sys.executable)
    assert result.code == 0, result.text
    assert result.bits() == reference.setdefault("bits", result.bits())


def test_config_yaml_starts_the_same_run_again(job):
    first = job(2, *SMALL, "--client-lr", "1e-2", "--client-momentum", "0.9", name="first")
    again = job(3, "--config", str(first.run_dir / "config.yaml"), name="again")
    assert (first.code, again.code) == (0, 0), first.text + again.text
    assert again.bits() == first.bits()
    stored = yaml.safe_load((first.run_dir / "config.yaml").read_text())
    assert stored["client_lr"] == 0.01
    assert len(stored["provenance"]["partition_sha256"]) == 64


def test_momentum_does_not_go_from_client_to_client(job):
    """One trainer for all three clients, one client each, and ranks left over."""
    args = (*SMALL, *"--cohort-size 3 --client-momentum 0.9 --client-weight-decay 0.001 --local-epochs 2".split())
    results = [job(n, *args, name=f"n{n}") for n in (1, 4, 5)]
    assert [result.code for result in results] == [0, 0, 0], [result.text for result in results]
    assert len({result.bits() for result in results}) == 1


@pytest.mark.slow
def test_every_knob_of_training_changes_the_result(job):
    """An option that is silently ignored would give equal bits."""
    base = job(1, *SMALL, name="base")
    knobs = ["--client-lr 0.05", "--client-momentum 0.5", "--client-weight-decay 0.1", "--local-epochs 2", "--seed 1"]
    knobs += ["--batch-size 0", "--server-lr 0.5", "--partition shards", "--partition-seed 1", "--cohort-size 8"]
    bits = {base.bits()}
    for i, knob in enumerate(knobs):
        result = job(1, *SMALL, *knob.split(), name=f"knob{i}")
        assert result.code == 0, result.text
        bits.add(result.bits())
    assert len(bits) == 1 + len(knobs)


def test_the_training_seed_leaves_the_split_alone(job):
    hashes = set()
    for seed in ("0", "1"):
        result = job(1, *SMALL, "--seed", seed, name=f"seed{seed}")
        hashes.add(yaml.safe_load((result.run_dir / "config.yaml").read_text())["provenance"]["partition_sha256"])
    assert len(hashes) == 1
