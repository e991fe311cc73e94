"""A run is itself: another algorithm, model, split or option is refused by name; other sources are a line."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from fedmpi.config import RunConfig
from fedmpi.data.datasets import DATASETS, load_dataset
from fedmpi.data.split import PartitionIndex
from fedmpi.data.split_file import Manifest, write_partition
from fedmpi.errors import ConfigError
from fedmpi.fedavg import FedAvg
from fedmpi.halves.algorithm_server import AlgorithmServer
from fedmpi.options import option, parse
from fedmpi.report.history import flat_rows
from fedmpi.report.identity import identity, model_parts, sources
from fedmpi.report.progress import Progress
from fedmpi.report.provenance import input_record, split_record
from fedmpi.report.run_folder import RunFolder
from tests.unit.test_report import DATA, MADE_WITH, RECORD


@dataclasses.dataclass(frozen=True)
class Prox(RunConfig):
    mu: float = option(0.1, "weight of the proximal term", "Federation", "[0, inf)")


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Callable[..., RunFolder]]:
    """`life(config, algorithm, model)` is a job that begins, or goes on with, the run in one folder."""
    opened: list[RunFolder] = []

    def job(
        config: RunConfig | None = None,
        algorithm: str = "a:FEDAVG",
        model: nn.Module | None = None,
        made_with: dict[str, Any] = MADE_WITH,
        version: str = "0.1",
    ) -> RunFolder:
        config = dataclasses.replace(config or RunConfig(), run_dir=str(tmp_path / "run"))
        model = model or nn.Linear(2, 2)
        folder = RunFolder(config, DATA, identity(algorithm, model), version)
        opened.append(folder)
        folder.begin(config, made_with)
        if folder.stored is None:
            folder.write(0, {"half": AlgorithmServer(FedAvg(config), nn.Linear(2, 2), config).state_dict()})
            folder.checkpoints.finish()
        folder.close()
        return folder

    yield job
    for folder in opened:
        folder.close()


def refusal(job: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        job()
    text = str(caught.value)
    assert text.isprintable()
    return text.partition(" holds a run with ")[2].partition(": name another")[0]


def test_the_run_of_another_algorithm_is_refused(life: Any) -> None:
    life(Prox(), "b:FEDPROX")
    assert refusal(lambda: life(RunConfig())) == "algorithm b:FEDPROX, this one has a:FEDAVG"


def test_options_that_only_one_of_both_jobs_knows_are_compared(life: Any, tmp_path: Path) -> None:
    life(Prox())
    assert refusal(lambda: life(RunConfig())) == "--mu 0.1, this one has nothing of that name"
    assert refusal(lambda: life(RunConfig(), version="0.2")) == "--mu 0.1, this one has nothing of that name"
    life(dataclasses.replace(RunConfig(), resume="never"))
    assert refusal(lambda: life(Prox())) == "--mu nothing of that name, this one has 0.1"


def test_an_option_that_a_newer_fedmpi_added_may_be_missing_if_it_has_its_default(
    life: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmpi.report import same_run

    real = same_run.result_options

    def without(config: object) -> dict[str, object]:
        return {name: value for name, value in real(config).items() if name != "server_lr"}

    with monkeypatch.context() as older:
        older.setattr(same_run, "result_options", without)
        life()
    assert refusal(life) == "--server-lr nothing of that name, this one has 1.0", "the same version knows it"
    assert refusal(lambda: life(RunConfig(server_lr=0.5), version="0.2")).startswith("--server-lr nothing of that name")
    life(version="0.2")


def test_threads_may_change_and_are_told(life: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What README says: another thread count is said in a line."""
    life()
    with caplog.at_level(logging.WARNING, logger="fedmpi"):
        life(RunConfig(threads=2), made_with={**MADE_WITH, "threads": 2})
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "this run began with threads 1, now 2"
    ]


# the model


class Scaled(nn.Module):
    def __init__(self, scale: Any = 1.0, act: Any = nn.functional.relu) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.scale, self.act = scale, act
        self._note = object()


def frozen(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.constant_(model[0].weight, value)
    model[0].weight.requires_grad_(False)
    return model


PLAIN = nn.Sequential(nn.Linear(2, 2), nn.ReLU())


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (PLAIN, nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "1 torch.nn.modules.activation.ReLU()"),
        (PLAIN, nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), "0 torch.nn.modules.linear.Linear("),
        (PLAIN, nn.Sequential(PLAIN), "0 torch.nn.modules.linear.Linear("),
        (nn.Sequential(PLAIN), PLAIN, "0 torch.nn.modules.container.Sequential("),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), "negative_slope=0.1"),
        (nn.Dropout(0.1), nn.Dropout(0.2), "p=0.1"),
        (nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False), "in_features=2"),
        (nn.BatchNorm1d(2), nn.BatchNorm1d(2, momentum=0.2), "momentum=0.1"),
        (frozen(1.0), frozen(2.0), "0 weight float32 (2, 2) frozen "),
        (frozen(1.0), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "frozen"),
        (Scaled(1.0), Scaled(2.0), "scale=1.0"),
        (Scaled((1, "a")), Scaled((1, "b")), "scale=[1, 'a']"),
        (Scaled(act=nn.functional.relu), Scaled(act=torch.tanh), "act=torch.nn.functional.relu"),
    ],
)
def test_another_model_of_the_same_length_is_refused(life: Any, before: nn.Module, now: nn.Module, said: str) -> None:
    life(model=before)
    text = refusal(lambda: life(model=now))
    assert text.startswith("model part ")
    assert said in text.partition(", this one has ")[0]


def test_the_same_model_with_other_weights_is_the_same_run(life: Any) -> None:
    life(model=Scaled())
    life(model=Scaled())
    assert model_parts(frozen(1.0)) == model_parts(frozen(1.0))


def test_a_model_of_thousands_of_parts_is_one_hash() -> None:
    parts = model_parts(nn.Sequential(*(nn.ReLU() for _ in range(3000))))
    other = model_parts(nn.Sequential(*(nn.ReLU() for _ in range(2999)), nn.Tanh()))
    assert len(parts) == len(other) == 1
    assert parts != other


# sources


def test_edited_source_files_are_one_line_and_no_refusal(
    life: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_base.py").write_text("class Base: pass\n")
    (tmp_path / "own_model.py").write_text(
        "from own_base import Base\nclass Net(Base): pass\nnet = lambda s, c: None\n"
    )
    import own_model  # type: ignore[import-not-found]  # written above

    def found() -> dict[str, dict[str, str]]:
        return sources({"model": [own_model.net, own_model.Net, nn.Linear], "trainer": [json.dumps, 3, RunFolder]})

    before = found()
    assert [(role, Path(where["file"]).name) for role, where in before.items()][:2] == [
        ("model", "own_model.py"),
        ("model 2", "own_base.py"),
    ]
    life(made_with={**MADE_WITH, "sources": before})
    (tmp_path / "own_base.py").write_text("class Base: x = 1\n")
    with caplog.at_level(logging.WARNING, logger="fedmpi"):
        life(made_with={**MADE_WITH, "sources": found()})
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("this run began with other source files: model 2 in ")
    assert "own_base.py" in line
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["provenance"]
    assert record["changes"] == [f"after round 0: {line.partition(': ')[2]}"]


# the split


@pytest.mark.parametrize("extra", ["--partition iid", "--partition=shards", "--partition-seed 0", "--min-samples 1"])
def test_a_new_split_beside_a_partition_file_is_refused(extra: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{extra.split('=')[0].split()[0]} shapes a new split, but --partition-file"
    ):
        parse(RunConfig, ["--partition-file", "a.pkl", *extra.split()], "", "")
    assert parse(RunConfig, ["--partition-file", "a.pkl"], "", "").partition == "iid"


def test_a_partition_in_yaml_counts_as_given_unless_the_file_is_a_record(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("partition_file: a.pkl\npartition: iid\n")
    with pytest.raises(ConfigError, match="--partition shapes a new split"):
        parse(RunConfig, ["--config", str(path)], "", "")
    path.write_text("partition_file: a.pkl\npartition: iid\nprovenance: {torch: '2'}\n")
    assert parse(RunConfig, ["--config", str(path)], "", "").partition_file == "a.pkl"


def test_the_record_says_that_the_split_came_from_a_file(life: Any, tmp_path: Path) -> None:
    index = PartitionIndex(np.array([0, 1000, 2000]), np.arange(2000))
    dataset, config = load_dataset("synthetic"), RunConfig(dataset="synthetic", num_clients=2)
    write_partition(tmp_path / "split.pkl", index, Manifest.of(index, dataset, config))
    config = RunConfig(dataset="synthetic", num_clients=2, partition_file=str(tmp_path / "split.pkl"))
    record = split_record(config, index.sha256())
    life(config, made_with={**MADE_WITH, **record})
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert "partition" not in written
    assert written["provenance"]["partition_file"]["file"] == str(tmp_path / "split.pkl")
    assert written["provenance"]["partition_file"]["partition_sha256"] == index.sha256()
    assert written["provenance"]["partition_file"]["manifest"]["dataset_sha256"] == dataset.sha256
    again = parse(RunConfig, ["--config", str(tmp_path / "run" / "config.yaml")], "", "")
    assert again == dataclasses.replace(config, run_dir=None)
    assert split_record(RunConfig(), "") == {}


# records


def test_what_model_pt_needs_elsewhere_is_recorded() -> None:
    record = input_record(load_dataset("synthetic"))
    assert record == {"input_shape": [1, 28, 28], "mean": [0.4988], "std": [0.2529], "classes": [*"0123456789"]}
    for name, entry in DATASETS.items():
        assert len(set(entry.classes)) == entry.num_classes, name


def test_history_rows_are_flat_for_a_data_frame(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps(dataclasses.asdict(RECORD)) + "\n")
    (row,) = flat_rows(path)
    assert (row["round_idx"], row["accuracy"], row["round_s"]) == (0, 0.9125, 2.0)
    assert not [name for name, value in row.items() if isinstance(value, dict)]
    told = dataclasses.replace(RECORD, reported={"tau": 1.5, "loss": 7.0})
    path.write_text(json.dumps(dataclasses.asdict(told)) + "\n")
    (row,) = flat_rows(path)
    assert (row["tau"], row["loss"], row["reported_loss"]) == (1.5, RECORD.loss, 7.0)


def test_the_summary_of_a_resumed_run_says_what_the_run_took_in_all(tmp_path: Path) -> None:
    progress = Progress(5, elapsed_s=100.0)
    progress.on_round(dataclasses.replace(RECORD, round_idx=4))
    assert "done: 1 rounds in 0.0 s (5 in 100.0 s in all), accuracy" in progress.summary("", tmp_path)
