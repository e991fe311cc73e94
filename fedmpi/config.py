"""The options of a job, and of `data.prepare`. See `options` for how a field becomes a flag."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import Literal

from fedmpi.errors import ConfigError
from fedmpi.options import flag_of, option

SPLIT_OPTIONS = ("partition", "num_shards", "alpha", "min_samples", "partition_seed")
"""Options that shape a new split: beside `partition_file` they mean nothing."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set, its split, and the number of clients."""

    dataset: Literal["mnist", "fashion-mnist", "cifar10", "digits", "synthetic"] = option(
        "mnist", "data set; digits and synthetic need no network", "Data"
    )
    data_dir: str | None = option(
        None,
        "folder that holds the data sets (default: $FEDMPI_DATA, else ~/.cache/fedmpi)",
        "Data",
        result=False,
        path=True,
    )
    num_clients: int = option(100, "simulated participants the training data is split over", "Data", "[1, inf)")
    partition: Literal["iid", "shards", "dirichlet"] = option(
        "iid", "how: random equal parts; label-sorted shards (McMahan); label proportions ~ Dir(alpha)", "Data"
    )
    num_shards: int | None = option(
        None, "shards: number of label-sorted shards (default: 2 per client)", "Data", "[1, inf)"
    )
    alpha: float | None = option(None, "dirichlet: concentration, small = skewed (default: 0.5)", "Data", "(0, inf)")
    min_samples: int | None = option(
        None, "dirichlet: fewest samples a client may hold (default: 1)", "Data", "[1, inf)"
    )
    partition_seed: int = option(
        0, "seed of the split; --seed leaves the split alone", "Data", "[0, 9223372036854775807]"
    )


@dataclasses.dataclass(frozen=True)
class RunConfig(DataConfig):
    """Every option of a training job. An algorithm with more knobs extends it."""

    partition_file: str | None = option(
        None, "pickle {client_id: indices} to use instead of --partition", "Data", result=False, path=True
    )

    model: str = option("cnn", "2nn, cnn, cnn_fedlab, logistic, or module:function", "Local training")
    local_epochs: int = option(1, "passes over a client's samples each round", "Local training", "[1, inf)")
    batch_size: int = option(10, "samples per step; 0 = all the client has", "Local training", "[0, inf)")
    engine: Literal["auto", "eager", "fused", "graph"] = option(
        "auto", "how SGD steps are taken: by autograd, by hand (plain stacks of layers), recorded by hand (on a GPU)",
        "Local training",
    )  # fmt: skip
    client_lr: float = option(0.1, "step size of the clients' SGD", "Local training", "(0, inf)")
    client_momentum: float = option(0.0, "momentum of the clients' SGD", "Local training", "[0, 1)")
    client_weight_decay: float = option(0.0, "weight decay of the clients' SGD", "Local training", "[0, inf)")

    sample_ratio: float | None = option(
        None, "share of the clients in each round, rounded to the nearest count, at least 1 (default: 0.1)",
        "Federation", "(0, 1]",
    )  # fmt: skip
    cohort_size: int | None = option(None, "clients in each round, instead of --sample-ratio", "Federation", "[1, inf)")
    rounds: int = option(20, "rounds to train", "Federation", "[1, inf)")
    target_accuracy: float | None = option(None, "stop once the test accuracy reaches it", "Federation", "(0, 1]")
    eval_every: int = option(1, "evaluate after every Nth round, and after the last", "Federation", "[1, inf)")
    eval_samples: int | None = option(
        None, "test samples to evaluate on, spread evenly over the test set (default: all)", "Federation", "[1, inf)"
    )
    server_lr: float = option(1.0, "step size of the server along the mean update", "Federation", "(0, inf)")
    group_clients: int = option(
        32,
        "most clients of one step that are trained together, as one product; 1: each by itself",
        "Federation",
        "[1, 32]",
    )
    seed: int = option(0, "seed of initial weights, cohorts and batches", "Federation", "[0, 9223372036854775807]")

    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "where trainers compute (auto: a GPU if visible)", "Machine"
    )
    threads: int | Literal["auto"] = option(
        1,
        "CPU threads per trainer; the last bits depend on it (auto: cores of this job / ranks)",
        "Machine",
        "[1, 1024]",
    )
    schedule: Literal["auto", "static", "dynamic"] = option(
        "auto", "static: clients are placed by expected cost; dynamic: idle trainers draw the next; same bits (auto:"
        " dynamic within one node)", "Machine", result=False,
    )  # fmt: skip
    ethernet: str | None = option(None, "network interface MPI uses between nodes, e.g. eth0", "Machine", result=False)
    checkpoint_every: int | None = option(
        None, "write a checkpoint after every Nth round, and at the end (default: about once a minute)", "Survival",
        "[1, inf)", result=False,
    )  # fmt: skip
    resume: Literal["auto", "never", "must"] = option(
        "auto", "auto: go on with the run that --run-dir holds, if any; never: start over; must: go on or refuse",
        "Survival", result=False,
    )  # fmt: skip
    max_seconds: float | None = option(
        None, "stop with code 75 before a round that would end later than this after the start (under Slurm also"
        " before the job's time limit)", "Survival", "(0, inf)", result=False,
    )  # fmt: skip
    leak_check: Literal["on", "off"] = option(
        "on", "refuse an algorithm of your own that changes itself, which other ranks would not know", "Survival",
        result=False,
    )  # fmt: skip
    stall_timeout: float = option(
        600.0, "seconds a rank may do nothing before the job ends with code 1; at least three times the longest step"
        " seen; 0: never", "Survival", "[0, inf)", result=False,
    )  # fmt: skip
    run_dir: str | None = option(
        None, "folder for what comes out (default: runs/NAME-DATE-TIME)", "Output", result=False, path=True
    )
    cuda_aware: bool = option(
        False, "MPI writes the model straight to a trainer's GPU (only where the MPI library can)", "Machine",
        result=False,
    )  # fmt: skip
    timeline: bool = option(
        False, "write timeline.json, who did what when, for Perfetto or chrome://tracing", "Output", result=False
    )
    quiet: bool = option(False, "only errors and the closing summary", "Output", result=False)
    verbose: bool = option(False, "also what each client did", "Output", result=False)

    @property
    def clients_per_round(self) -> int:
        """`cohort_size`, else `sample_ratio` x `num_clients` to the nearest integer (half up), at least 1."""
        from fedmpi.core.cohort import cohort_size  # here: `import fedmpi.config` alone stays instant

        if self.cohort_size is not None:
            return self.cohort_size
        return cohort_size(self.num_clients, 0.1 if self.sample_ratio is None else self.sample_ratio)

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            ConfigError: names the options and their values.
        """
        if self.cohort_size is not None and self.sample_ratio is not None:
            raise ConfigError(
                f"--cohort-size ({self.cohort_size}) and --sample-ratio ({self.sample_ratio}) exclude each other"
            )
        if self.clients_per_round > self.num_clients:
            raise ConfigError(
                f"--cohort-size must be in [1, {self.num_clients}] (--num-clients), got {self.cohort_size}"
            )
        if self.resume == "must" and self.run_dir is None:
            raise ConfigError("--resume must goes on with the run in --run-dir: name it")
        if self.quiet and self.verbose:
            raise ConfigError("--quiet and --verbose exclude each other: give one")
        self.check_given({name for name in ("num_shards", "alpha", "min_samples") if getattr(self, name) is not None})

    def check_given(self, given: Set[str]) -> None:
        """Refuse options that contradict each other even where one of them has its default.

        Args:
            given: the names of the options that the user gave.

        Raises:
            ConfigError: names the options.
        """
        extra = [flag_of(name) for name in SPLIT_OPTIONS if name in given]
        if self.partition_file is not None and extra:
            raise ConfigError(f"{extra[0]} shapes a new split, but --partition-file brings one: give one")


def data_flags(config: DataConfig) -> str:
    """The flags that say the data part of `config` again: what to paste behind `python -m fedmpi.data.prepare`."""
    always = ("dataset", "num_clients", "partition")
    fields = dataclasses.fields(DataConfig)
    said = [f.name for f in fields if f.name in always or getattr(config, f.name) != f.default]
    return " ".join(f"{flag_of(name)} {getattr(config, name)}" for name in said)
