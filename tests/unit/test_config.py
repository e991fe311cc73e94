"""Options: defaults, YAML, flags; what is refused, and how it is said."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmpi.config import DataConfig, RunConfig, data_flags
from fedmpi.errors import ConfigError
from fedmpi.options import PROVENANCE, option, parse, result_hash, result_options, to_yaml

ROOT = Path(__file__).parents[2]

# option, default, in YAML, as a flag that wins over it
OPTIONS: list[tuple[str, Any, Any, Any]] = [
    ("dataset", "mnist", "digits", "cifar10"),
    ("data_dir", None, "/a", "/b"),
    ("num_clients", 100, 30, 40),
    ("partition", "iid", "shards", "dirichlet"),
    ("num_shards", None, 60, 80),
    ("alpha", None, 0.5, 2.0),
    ("min_samples", None, 2, 3),
    ("partition_seed", 0, 1, 2),
    ("partition_file", None, "a.pkl", "b.pkl"),
    ("model", "cnn", "2nn", "mine:net"),
    ("local_epochs", 1, 2, 3),
    ("batch_size", 10, 0, 20),
    ("engine", "auto", "eager", "fused"),
    ("client_lr", 0.1, 0.2, 0.3),
    ("client_momentum", 0.0, 0.5, 0.9),
    ("client_weight_decay", 0.0, 0.1, 1e-4),
    ("sample_ratio", None, 0.5, 1.0),
    ("cohort_size", None, 5, 6),
    ("rounds", 20, 3, 4),
    ("target_accuracy", None, 0.5, 0.99),
    ("eval_every", 1, 2, 3),
    ("eval_samples", None, 100, 1000),
    ("server_lr", 1.0, 0.5, 2.0),
    ("group_clients", 32, 1, 8),
    ("seed", 0, 7, 2**63 - 1),
    ("device", "auto", "cpu", "cuda"),
    ("threads", 1, 2, "auto"),
    ("schedule", "auto", "dynamic", "static"),
    ("ethernet", None, "eth0", "ib0"),
    ("checkpoint_every", None, 5, 10),
    ("resume", "auto", "never", "auto"),
    ("max_seconds", None, 60.0, 3600.0),
    ("leak_check", "on", "off", "on"),
    ("stall_timeout", 600.0, 0.0, 30.0),
    ("run_dir", None, "runs/a", "runs/b"),
]
SWITCHES = ["cuda_aware", "timeline", "quiet", "verbose"]
NAMES = [name for name, *_ in OPTIONS]
MACHINE = {
    "data_dir",
    "partition_file",
    "schedule",
    "cuda_aware",
    "ethernet",
    "run_dir",
    "checkpoint_every",
    "resume",
    "max_seconds",
    "leak_check",
    "stall_timeout",
    "timeline",
    "quiet",
    "verbose",
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def run_config(*argv: str) -> RunConfig:
    return parse(RunConfig, argv, "prog", "what it is")


@pytest.fixture
def config_file(tmp_path: Path) -> Any:
    """Text or a dictionary -> the arguments that make it the configuration."""

    def write(content: str | dict[str, Any]) -> list[str]:
        path = tmp_path / "config.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return ["--config", str(path)]

    return write


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run_config(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_table_below_names_every_option() -> None:
    assert [*NAMES, *SWITCHES] == [f.name for f in dataclasses.fields(RunConfig)]


@pytest.mark.parametrize(("name", "default", "in_yaml", "as_flag"), OPTIONS, ids=NAMES)
def test_default_then_yaml_then_flag(name: str, default: Any, in_yaml: Any, as_flag: Any, config_file: Any) -> None:
    config = config_file({name.replace("_", "-"): in_yaml} if len(name) % 2 else {name: in_yaml})
    assert getattr(run_config(*config), name) == in_yaml
    argv = [flag(name), str(as_flag)]
    parsed = run_config(*config, *argv) if name < "m" else run_config(*argv, *config)
    assert getattr(parsed, name) == as_flag
    assert type(getattr(parsed, name)) is type(as_flag)
    assert dataclasses.replace(parsed, **{name: default}) == RunConfig(), "no other option changes"


def test_without_arguments_every_option_has_its_default() -> None:
    assert dataclasses.asdict(run_config()) == {
        **{name: default for name, default, *_ in OPTIONS},
        "cuda_aware": False,
        "timeline": False,
        "quiet": False,
        "verbose": False,
    }


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name: str, config_file: Any) -> None:
    assert getattr(run_config(), name) is False
    assert getattr(run_config(flag(name)), name) is True
    assert getattr(run_config(*config_file(f"{name}: yes")), name) is True
    assert getattr(run_config(*config_file(f"{name}: false")), name) is False


@pytest.mark.parametrize("text", ["1e-3", "1E-3", ".001", "0.001", '"1e-3"'])
def test_numbers_as_people_write_them_in_yaml(text: str, config_file: Any) -> None:
    parsed = run_config(*config_file(f"client_lr: {text}\n"))
    assert parsed.client_lr == 0.001
    written = to_yaml(parsed, {})
    assert yaml.safe_load(written)["client_lr"] == 0.001
    assert result_hash(run_config(*config_file(written))) == result_hash(run_config("--client-lr", "1e-3"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--sample-ratio 5", "--sample-ratio must be a number in (0, 1], got 5.0"),
        ("--sample-ratio 0", "--sample-ratio must be a number in (0, 1], got 0.0"),
        ("--sample-ratio nan", "--sample-ratio must be a number in (0, 1], got nan"),
        (f"--rounds {10**30}", f"--rounds must be an integer in [1, {2**63 - 1}], got {10**30}"),
        ("--rounds -1", "--rounds must be an integer in [1, inf), got -1"),
        ("--rounds 0", "--rounds must be an integer in [1, inf), got 0"),
        ("--rounds 2.5", "--rounds must be an integer in [1, inf), got 2.5"),
        ("--rounds 010", "--rounds must be an integer in [1, inf), got 010"),
        ("--rounds 0x10", "--rounds must be an integer in [1, inf), got 0x10"),
        ("--rounds 1_000", "--rounds must be an integer in [1, inf), got 1_000"),
        ("--client-lr 00.5", "--client-lr must be a number in (0, inf), got 00.5"),
        ("--rounds true", "--rounds must be an integer in [1, inf), got True"),
        ("--batch-size -1", "--batch-size must be an integer in [0, inf), got -1"),
        ("--num-clients 0", "--num-clients must be an integer in [1, inf), got 0"),
        ("--num-shards 0", "--num-shards must be an integer in [1, inf), got 0"),
        ("--min-samples 0", "--min-samples must be an integer in [1, inf), got 0"),
        ("--local-epochs 0", "--local-epochs must be an integer in [1, inf), got 0"),
        ("--eval-every 0", "--eval-every must be an integer in [1, inf), got 0"),
        ("--cohort-size 0", "--cohort-size must be an integer in [1, inf), got 0"),
        ("--alpha 0", "--alpha must be a number in (0, inf), got 0.0"),
        ("--alpha inf", "--alpha must be a number in (0, inf), got inf"),
        ("--client-lr 0", "--client-lr must be a number in (0, inf), got 0.0"),
        ("--client-lr fast", "--client-lr must be a number in (0, inf), got fast"),
        ("--client-lr inf", "--client-lr must be a number in (0, inf), got inf"),
        ("--server-lr -1", "--server-lr must be a number in (0, inf), got -1.0"),
        ("--client-momentum 1", "--client-momentum must be a number in [0, 1), got 1.0"),
        ("--client-momentum -.1", "--client-momentum must be a number in [0, 1), got -0.1"),
        ("--client-weight-decay -1", "--client-weight-decay must be a number in [0, inf), got -1.0"),
        ("--target-accuracy 97", "--target-accuracy must be a number in (0, 1], got 97.0"),
        ("--seed 1e3", "--seed must be an integer in [0, 9223372036854775807], got 1000.0"),
        ("--seed -1", "--seed must be an integer in [0, 9223372036854775807], got -1"),
        (f"--seed {2**63}", f"--seed must be an integer in [0, 9223372036854775807], got {2**63}"),
        ("--threads 0", "--threads must be an integer in [1, 1024] or auto, got 0"),
        ("--threads many", "--threads must be an integer in [1, 1024] or auto, got many"),
        ("--dataset Mnist", "--dataset must be mnist, fashion-mnist, cifar10, digits, synthetic, got Mnist"),
        ("--partition random", "--partition must be iid, shards, dirichlet, got random"),
        ("--schedule best", "--schedule must be auto, static, dynamic, got best"),
        ("--collect sum", "unknown option --collect sum; --help lists them"),
        ("--group-clients 0", "--group-clients must be an integer in [1, 32], got 0"),
        ("--group-clients 33", "--group-clients must be an integer in [1, 32], got 33"),
        ("--leak-check maybe", "--leak-check must be on, off, got maybe"),
        ("--device gpu", "--device must be auto, cpu, cuda, got gpu"),
        ("--round 3", "unknown option --round 3; --help lists them"),
        ("--num-workers 2", "unknown option --num-workers 2; --help lists them"),
        ("--client_lr 1", "unknown option --client_lr 1; --help lists them"),
        ("mnist", "unknown option mnist; --help lists them"),
        ("--quiet 1", "unknown option 1; --help lists them"),
        ("--no-quiet", "unknown option --no-quiet; --help lists them"),
        ("--conf x", "unknown option --conf x; --help lists them"),
        ("--rounds", "argument --rounds: expected one argument"),
        ("--config", "--config wants a YAML file, got nothing"),
        ("--config /nowhere.yaml", "--config /nowhere.yaml: cannot be read (No such file or directory)"),
        ("--quiet --verbose", "--quiet and --verbose exclude each other: give one"),
        ("--cohort-size 999", "--cohort-size must be in [1, 100] (--num-clients), got 999"),
        (
            "--cohort-size 5 --sample-ratio .5",
            "--cohort-size (5) and --sample-ratio (0.5) exclude each other",
        ),
        (
            "--partition-file a.pkl --alpha 1",
            "--alpha shapes a new split, but --partition-file brings one: give one",
        ),
    ],
)
def test_what_is_refused_on_the_command_line(argv: str, message: str) -> None:
    assert refusal(*argv.split()) == message


@pytest.mark.parametrize("name", ["model", "run_dir", "data_dir", "partition_file", "ethernet"])
def test_empty_text_is_refused(name: str) -> None:
    """An unset variable of a shell script must not send the run folder into the working folder."""
    assert refusal(flag(name), "") == f"{flag(name)} must be text, got nothing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("client_lr: fast", "--client-lr must be a number in (0, inf), got fast"),
        ("client_lr: [0.1]", "--client-lr must be a number in (0, inf), got [0.1]"),
        ("client_lr: true", "--client-lr must be a number in (0, inf), got True"),
        ("rounds: 1e3", "--rounds must be an integer in [1, inf), got 1000.0"),
        ("rounds: 010", "--rounds must be an integer in [1, inf), got 010"),
        ("rounds: 0x10", "--rounds must be an integer in [1, inf), got 0x10"),
        ("rounds: 1_000", "--rounds must be an integer in [1, inf), got 1_000"),
        ("rounds: 1:30", "--rounds must be an integer in [1, inf), got 1:30"),
        ("client_lr: 010", "--client-lr must be a number in (0, inf), got 010"),
        ("client_lr: 1_0.5", "--client-lr must be a number in (0, inf), got 1_0.5"),
        ("rounds: null", "--rounds must be an integer in [1, inf), got None"),
        ("threads: null", "--threads must be an integer in [1, 1024] or auto, got None"),
        ("dataset: null", "--dataset must be mnist, fashion-mnist, cifar10, digits, synthetic, got None"),
        ("model: 3", "--model must be text, got 3"),
        ("run_dir: ''", "--run-dir must be text, got nothing"),
        ("sample_ratio: .nan", "--sample-ratio must be a number in (0, 1], got nan"),
        ("quiet: 'no'", "--quiet must be true or false, got no"),
        ("quiet: 1", "--quiet must be true or false, got 1"),
        ("quiet: null", "--quiet must be true or false, got None"),
        ("round: 3", "unknown option 'round' in --config; --help lists them"),
        ("help: true", "unknown option 'help' in --config; --help lists them"),
    ],
)
def test_what_is_refused_in_yaml(content: str, message: str, config_file: Any) -> None:
    assert refusal(*config_file(content)) == message


@pytest.mark.parametrize(
    ("content", "rest"),
    [
        ("- rounds\n- 3\n", "wanted a map of option: value, got a list"),
        ("3", "wanted a map of option: value, got a int"),
        ("1: 2", "wanted a map of option: value, got a dict"),
        ("rounds: 3\nseed: 1\nrounds: 4\n", "not YAML: rounds is given twice"),
        ("client_lr: 3\nclient-lr: 4\n", "not YAML: client_lr is given twice"),
        ("provenance: {a: 1, a: 2}\n", "not YAML: a is given twice"),
        ("config: other.yaml", "a file cannot name another one (config: other.yaml)"),
    ],
)
def test_files_that_are_no_map_of_options(content: str, rest: str, config_file: Any) -> None:
    argv = config_file(content)
    assert refusal(*argv) == f"--config {argv[1]}: {rest}"


def test_files_that_are_no_yaml(config_file: Any, tmp_path: Path) -> None:
    argv = config_file("a: {b")
    assert refusal(*argv).startswith(f"--config {argv[1]}: not YAML: ")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert refusal("--config", str(tmp_path / "binary")).startswith(f"--config {tmp_path / 'binary'}: not YAML: ")
    assert refusal("--config", str(tmp_path)) == f"--config {tmp_path}: cannot be read (Is a directory)"


NINES = "9" * 5000
LAUGHS = "\n".join(["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)])


@pytest.mark.parametrize(
    ("content", "rest"),
    [
        (f"rounds: {NINES}", "not YAML: Exceeds the limit (4300 digits)"),
        (f"rounds: {'[' * 2000}", "not YAML: "),
        (f"rounds: {'[' * 2000}{']' * 2000}", "not YAML: "),
        (f"rounds: {'{' * 2000}", "not YAML: "),
        ("? " * 2000, "not YAML: "),
        (f"rounds: [{'1, ' * 6000}]", "not YAML: more than 8 brackets deep, or more than 5,000 values"),
        (LAUGHS, "not YAML: anchors (&, *) are not read here"),
        ("\n".join(f"a{i}: &a{i} {i}" for i in range(2000)), "not YAML: anchors (&, *) are not read here"),
        ("rounds: 2001-99-99", "not YAML: month must be in 1..12"),
        ("rounds: !!int x", "not YAML: invalid literal for int()"),
        ("rounds: !!python/object/apply:os.getpid []", "not YAML: could not determine a constructor"),
        ("rounds: 3\0", "not YAML: unacceptable character"),
        ("x" * 10**5, "cannot be read (it is longer than 65,536 bytes)"),
    ],
)
def test_yaml_bombs_are_refused_in_one_line_within_a_second(content: str, rest: str, config_file: Any) -> None:
    argv = config_file(content)
    started = time.monotonic()
    message = refusal(*argv)
    assert time.monotonic() - started < 1
    assert message.startswith(f"--config {argv[1]}: {rest}")
    assert message.isprintable()
    assert len(message) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rounds: " + "1" + "0" * 2000, "--rounds must be an integer in [1, inf), got an integer of 6644 bits"),
        ("client_lr: " + "1" + "0" * 2000, "--client-lr must be a number in (0, inf), got an integer of 6644 bits"),
        ("rounds: {a: 1}", "--rounds must be an integer in [1, inf), got a dict"),
        ("rounds: !!set {a}", "--rounds must be an integer in [1, inf), got a set"),
        ("rounds: 2001-01-01", "--rounds must be an integer in [1, inf), got a date"),
        (r'model: "\e[31m\n"', r"--model must be at most 4096 printable characters, got \x1b[31m"),
        (r'"\e[31m\n": 3', r"unknown option '\x1b[31m' in --config; --help lists them"),
        (r'config: "\e[31m\n"', None),
    ],
)
def test_odd_values_in_yaml_are_told_in_one_printable_line(content: str, message: str | None, config_file: Any) -> None:
    said = refusal(*config_file(content))
    assert said.isprintable()
    assert said == message or message is None


@pytest.mark.parametrize("value", ["\x1b[31m", "a\nb", "x" * 5000, "\0"])
def test_odd_words_on_the_command_line_are_told_in_one_printable_line(value: str) -> None:
    for argv in (["--model", value], [f"--model={value}"]):
        said = refusal(*argv)
        assert said.startswith("--model must be at most 4096 printable characters, got ")
        assert said.isprintable()
        assert len(said) < 200


def test_a_config_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(200 * 10**9)
    for path in (str(tmp_path / "pipe"), str(tmp_path / "sparse"), "/dev/zero", "/dev/tty"):
        assert refusal("--config", path).startswith(f"--config {path}: cannot be read (it is ")


def test_empty_files_and_null_for_what_may_be_missing(config_file: Any) -> None:
    assert run_config(*config_file("")) == RunConfig()
    assert run_config(*config_file("alpha: null\nrun_dir: ~\n")) == RunConfig()


def test_later_files_win_over_earlier_ones(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("rounds: 3\nseed: 5\n")
    two.write_text("rounds: 4\n")
    assert run_config("--config", str(one), f"--config={two}") == RunConfig(rounds=4, seed=5)
    assert run_config(f"--config={two}", "--config", str(one)) == RunConfig(rounds=3, seed=5)


def test_the_environment_gives_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROUNDS", "PROG_ROUNDS", "FEDMPI_ROUNDS"):
        monkeypatch.setenv(name, "3")
    assert run_config() == RunConfig()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", 10), ("--num-clients 4", 1), ("--num-clients 14", 1), ("--num-clients 15", 2), ("--sample-ratio 1", 100),
        ("--sample-ratio 0.001 --num-clients 20", 1), ("--sample-ratio 0.07 --num-clients 20", 1),
        ("--sample-ratio 0.25 --num-clients 10", 3), ("--cohort-size 7", 7), ("--cohort-size 3 --num-clients 3", 3),
    ],
)  # fmt: skip
def test_clients_per_round(argv: str, expected: int) -> None:
    assert run_config(*argv.split()).clients_per_round == expected


def other_than_default() -> RunConfig:
    chosen = {name: as_flag for name, _, _, as_flag in OPTIONS if name not in ("sample_ratio", "partition_file")}
    return RunConfig(**chosen, verbose=True)


@pytest.mark.parametrize("text", ["010", "0x10", "1e-3", "1e3", "1_000", "true", "null", "~", "3", "1:30", "&a", "*a"])
def test_text_that_looks_like_something_else_is_written_as_text(text: str, config_file: Any) -> None:
    config = RunConfig(model=text)
    assert run_config(*config_file(to_yaml(config, {}))) == config
    assert run_config("--model", text) == config


@pytest.mark.parametrize("config", [RunConfig(), other_than_default(), RunConfig(client_lr=1e-300, seed=2**63 - 1)])
def test_what_is_written_reads_back_equal(config: RunConfig, config_file: Any) -> None:
    provenance = {"torch": "2.4", "ranks": 3, "capability": ["AVX2"], "note": "Grüße"}
    text = to_yaml(config, provenance)
    assert yaml.safe_load(text)[PROVENANCE] == provenance
    assert "Grüße" in text
    assert run_config(*config_file(text)) == config
    assert result_hash(run_config(*config_file(text))) == result_hash(config)


@pytest.mark.parametrize(("name", "default", "value", "_"), [*OPTIONS, *((s, False, True, "") for s in SWITCHES)])
def test_the_hash_holds_what_decides_the_model_and_nothing_else(name: str, default: Any, value: Any, _: Any) -> None:
    assert default != value
    changed = dataclasses.replace(RunConfig(), **{name: value})
    assert (result_hash(changed) == result_hash(RunConfig())) is (name in MACHINE)
    assert (name in result_options(changed)) is (name not in MACHINE)


def test_the_flags_of_the_data_part_read_back_equal() -> None:
    for argv in ("", "--partition dirichlet --alpha 0.3 --min-samples 2 --num-clients 7 --partition-seed 3"):
        config = parse(DataConfig, argv.split(), "prog", "")
        said = data_flags(config)
        assert parse(DataConfig, said.split(), "prog", "") == config
        assert said.startswith("--dataset mnist --num-clients ")
    assert data_flags(RunConfig(rounds=7)) == "--dataset mnist --num-clients 100 --partition iid"


@dataclasses.dataclass(frozen=True)
class Extended(RunConfig):
    """An algorithm with one knob more."""

    mu: float = option(0.01, "weight of the proximal term", "Algorithm", "[0, inf)")


def test_an_algorithm_with_more_knobs_extends_the_options() -> None:
    assert parse(Extended, ["--mu", "1", "--rounds", "2"], "prog", "") == Extended(rounds=2, mu=1.0)
    with pytest.raises(ConfigError, match=r"^--mu must be a number in \[0, inf\), got -1.0$"):
        parse(Extended, ["--mu", "-1"], "prog", "")
    with pytest.raises(ConfigError, match="exclude each other"):
        parse(Extended, ["--quiet", "--verbose"], "prog", "")
    assert result_hash(Extended()) != result_hash(RunConfig())


def test_help_lists_every_option_in_groups_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_config("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: prog [OPTION ...]\n\nwhat it is\n")
    assert [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")] == [
        "options:", "Data:", "Local training:", "Federation:", "Machine:", "Survival:", "Output:",
    ]  # fmt: skip
    squeezed = " ".join(text.split())
    for f in dataclasses.fields(RunConfig):
        assert squeezed.count(f" {flag(f.name)} ") >= 1, f.name
        assert f.metadata["help"] in squeezed, f.name
        if f.default is not None and f.default is not False:
            assert f"{f.metadata['help']} (default: {f.default})" in squeezed
    assert "--config FILE YAML file of options; flags win over it" in squeezed
    assert max(map(len, text.splitlines())) <= 110


LOADED = """
import json, runpy, sys
sys.argv = ["fedavg", *sys.argv[1:]]
try:
    runpy.run_module("fedmpi.fedavg", run_name="__main__")
except SystemExit as end:
    names = ("torch", "torchvision", "mpi4py", "numpy", "yaml")
    loaded = [name for name in names if name in sys.modules]
    sys.stderr.write(json.dumps([end.code, loaded]))
"""


def test_help_loads_neither_torch_nor_mpi() -> None:
    """What makes it quick, whatever the machine."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI_COMM", "SLURM"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOADED, "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True, env=alone,
    )  # fmt: skip
    code, loaded = json.loads(done.stderr)
    assert code == 0
    assert set(loaded) & {"torch", "torchvision", "mpi4py"} == set()
    assert "Local training:" in done.stdout


def test_import_of_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, fedmpi, fedmpi.config\n"
        "heavy = {'torch', 'numpy', 'mpi4py', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)


PATHS = ["data_dir", "partition_file", "run_dir"]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("how", ["--{}=~/x", "--{} ~/x", "yaml"])
def test_a_tilde_is_the_home_folder_in_every_option_that_names_a_path(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells leave `--run-dir=~/x` as it is, and no shell reads YAML."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text(f"{name}: ~/x\n")
    words = ["--config=~/a.yaml"] if how == "yaml" else how.format(name.replace("_", "-")).split()
    assert getattr(parse(RunConfig, words, "prog", ""), name) == str(tmp_path / "x")


def test_every_option_that_names_a_path_is_known_as_one() -> None:
    for f in dataclasses.fields(RunConfig):
        assert f.metadata["path"] == (f.name in PATHS), f.name


def test_a_home_folder_that_nobody_knows_is_left_as_it_is() -> None:
    assert parse(RunConfig, ["--run-dir=~nobody-here/x"], "prog", "").run_dir == "~nobody-here/x"
