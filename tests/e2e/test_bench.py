"""The benchmark runs, agrees with its floor, and refuses nonsense. How fast it is, is not for a test to say."""

from __future__ import annotations

import json
import re

import pytest

BENCH = ("-m", "fedmpi.bench")


@pytest.mark.slow
def test_the_bench_and_its_floor_learn_alike(job, tmp_path):
    figures = tmp_path / "figures.json"
    result = job(3, *f"k1000 --pairs 1 --starts 0 --json {figures}".split(), program=BENCH)
    assert result.code == 0, result.text
    held = json.loads(figures.read_text())
    (case,) = held["cases"].values()
    mine, floor = case["accuracy"]
    assert mine > 0.6
    assert abs(mine - floor) < 0.06  # other batches, the same algorithm
    assert case["ratios"] == [pytest.approx(case["fedmpi_s"][0] / case["floor_s"][0])]
    assert len(held["pss MB"]) == 3
    assert held["machine"]["cores"] >= 1


def test_overheads_against_clients_and_vector_length(job, tmp_path):
    figures = tmp_path / "figures.json"
    result = job(3, *f"scale --largest 100000 --starts 0 --json {figures}".split(), program=BENCH)
    assert result.code == 0, result.text
    held = json.loads(figures.read_text())["scale"]
    assert [row["clients"] for row in held["rows"]] == [100, 1000, 10_000, 100_000, 1_000_000, 100]
    assert held["rows"][-1]["entries"] == 100_000
    assert all(row["round"] > 0 for row in held["rows"])
    assert held["model ms"]["1000"]["10000"] > held["model ms"]["11"]["10000"] > 0


@pytest.mark.parametrize(
    ("num_ranks", "args", "said"),
    [
        (3, "k7", "CASE must be of 2nn, cnn, k1000, k10000, scale, got k7"),
        (3, "--pairs 0", "--pairs must be 1 or more, got 0"),
        (3, "--pair 3", "unrecognized arguments"),
        (2, "2nn --starts 0", "mpirun -n 3"),
        (2, "soak", "bench soak starts its own jobs: call it without mpirun"),
    ],
)
def test_a_mistake_is_one_line(job, num_ranks, args, said):
    result = job(num_ranks, *args.split(), program=BENCH)
    assert result.code == 2, result.text
    assert len(result.errors) == 1
    assert said in result.errors[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_soak_comes_to_the_same_end(job):
    result = job(1, *"soak --rounds 600 --ranks 3 --kills 5".split(), program=BENCH, launcher=(), limit_s=1000)
    assert result.code == 0, result.text
    models = re.findall(r"model ([0-9a-f]{16})", result.out)
    assert len(models) == 2
    assert models[0] == models[1]
