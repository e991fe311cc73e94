"""What a user types wrong costs one line and exit code 2, on any number of ranks; what is right takes effect."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import SMALL


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ("--round 3", "--round"),
        ("--sample-ratio 5", "--sample-ratio must be a number in (0, 1], got 5"),
        pytest.param("--sample-ratio 0", "--sample-ratio", marks=pytest.mark.slow),
        pytest.param("--sample-ratio nan", "--sample-ratio", marks=pytest.mark.slow),
        pytest.param("--rounds -1", "--rounds must be an integer in [1, inf), got -1", marks=pytest.mark.slow),
        ("--cohort-size 999", "--cohort-size must be in [1, 20] (--num-clients), got 999"),
        pytest.param("--num-clients 0", "--num-clients", marks=pytest.mark.slow),
        pytest.param("--seed 1e3", "--seed", marks=pytest.mark.slow),
        ("--model nope", "--model must be 2nn, cnn, cnn_fedlab, logistic or module:function, got nope"),
        pytest.param("--model no_such_module:f", "no_such_module", marks=pytest.mark.slow),
        ("--dataset digits --model cnn_fedlab", "at least 16x16"),
        pytest.param("--partition iid --alpha 0.1", "--alpha", marks=pytest.mark.slow),
        ("--partition-file nowhere.pkl", "python -m fedmpi.data.prepare --dataset synthetic --num-clients 20"),
        ("--num-clients 5000 --cohort-size 7", "2000 samples cannot give 5000 clients one each"),
        pytest.param("--device cuda", "--device cuda", marks=pytest.mark.slow),
        ("--ethernet bogus0", "--ethernet"),
        pytest.param("--num-workers 2", "--num-workers", marks=pytest.mark.slow),
        pytest.param("--config nowhere.yaml", "nowhere.yaml", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_is_one_line_and_code_2(job, args, wanted):
    result = job(3, *SMALL, *args.split(), env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.code == 2, result.text
    assert len(result.errors) == 1, result.text
    assert wanted in result.errors[0]
    assert "Traceback" not in result.text
    assert not (result.run_dir / "history.jsonl").exists()


def test_target_accuracy_stops_there(job):
    result = job(2, *"--dataset digits --model 2nn --num-clients 10 --rounds 60 --target-accuracy 0.7".split())
    accuracies = [row["accuracy"] for row in result.history()]
    assert result.code == 0, result.text
    assert accuracies[-1] >= 0.7
    assert max(accuracies[:-1], default=0) < 0.7


def test_eval_every_also_evaluates_the_last_round(job):
    result = job(2, *SMALL, "--rounds", "5", "--eval-every", "2")
    assert [row["accuracy"] is not None for row in result.history()] == [False, True, False, True, True]


@pytest.mark.slow
def test_cohorts_are_uniform_and_depend_on_the_seed_alone(job):
    args = "--dataset synthetic --num-clients 100 --sample-ratio 0.1 --rounds 50 --eval-every 50".split()
    variants = [(2, "--model 2nn"), (3, "--model logistic --client-lr 0.01"), (2, "--model 2nn --seed 3")]
    cohorts = [
        [row["cohort"] for row in job(n, *args, *more.split(), name=f"c{i}").history()]
        for i, (n, more) in enumerate(variants)
    ]
    first = cohorts[0]
    assert all(len(set(cohort)) == 10 for cohort in first)
    assert len(set().union(*first)) >= 95
    assert len({tuple(cohort) for cohort in first}) == 50
    assert cohorts[1] == first != cohorts[2]


def test_quiet_shows_the_summary_only_and_verbose_shows_clients(job):
    quiet = job(2, *SMALL, "--quiet", name="quiet")
    assert len(quiet.out.splitlines()) == 1
    assert quiet.out.startswith("done: 3 rounds")
    verbose = job(2, *SMALL, "--verbose", name="verbose")
    assert "client" in verbose.out
    assert len(verbose.out.splitlines()) > 3 + 7


def test_a_model_of_ones_own(job, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 16), nn.Tanh(), nn.Linear(16, classes))\n"
    )
    result = job(3, *SMALL, "--model", "mine:net")
    assert result.code == 0, result.text
    assert "12,730 vector entries" in result.out


@pytest.mark.parametrize(
    "dtype", ["half", *(pytest.param(each, marks=pytest.mark.slow) for each in ("bfloat16", "double"))]
)
def test_a_model_that_is_not_float32_is_refused_by_name(job, tmp_path, dtype):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n"
        f"    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).{dtype}()\n"
    )
    result = job(3, *SMALL, "--model", "mine:net")
    assert result.code == 2
    assert "'1.weight' is" in result.errors[0]


@pytest.mark.parametrize(
    "kind", ["shards", *(pytest.param(each, marks=pytest.mark.slow) for each in ("iid", "dirichlet"))]
)
def test_prepare_then_train_on_the_file(job, tmp_path, kind):
    common = ["--dataset", "digits", "--num-clients", "12"]
    prepared = job(
        0, *common, "--partition", kind, "--out", str(tmp_path / "splits"),
        program=("-m", "fedmpi.data.prepare"), launcher=(),
    )  # fmt: skip
    assert prepared.code == 0, prepared.text
    (pickle,) = (tmp_path / "splits").glob("*.pkl")
    result = job(1, *common, "--model", "2nn", "--rounds", "2", "--cohort-size", "4", "--partition-file", str(pickle))
    assert result.code == 0, result.text
    wrong = job(1, "--dataset", "synthetic", "--num-clients", "12", "--partition-file", str(pickle), name="wrong")
    assert wrong.code == 2
    assert "digits" in wrong.errors[0]
    other = job(1, "--dataset", "digits", "--num-clients", "13", "--partition-file", str(pickle), name="other")
    assert other.code == 2
    assert "12" in other.errors[0]


def test_help_is_grouped_and_prints_once(job):
    result = job(3, "--help")
    assert result.code == 0
    assert result.out.count("usage:") == 1
    for group in ("Data:", "Local training:", "Federation:", "Machine:", "Output:"):
        assert group in result.out


def test_history_is_plain_json_with_what_a_round_took(job):
    result = job(3, *SMALL)
    row = json.loads((result.run_dir / "history.jsonl").read_text().splitlines()[0])
    assert set(row) == {
        "round_idx", "cohort", "num_samples", "train_loss", "accuracy", "loss", "bytes_down", "bytes_up", "timings",
    }  # fmt: skip
    assert row["bytes_down"] == row["bytes_up"] == 7 * 199_210 * 4
    parts = {"broadcast_s", "train_s", "collect_s", "step_s", "evaluate_s", "round_s", "idle_share"}
    assert parts <= set(row["timings"])
