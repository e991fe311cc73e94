"""README's commands run as they stand, and what it says of launchers and placement is so."""

from __future__ import annotations

import json
import os
import pickle
import pkgutil
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fedmpi
from fedmpi.algorithms import ALGORITHMS
from tests.e2e.conftest import SMALL, clean_environment, under_open_mpi
from tests.unit.test_package import README

BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [line.split("#")[0].split("&&")[-1].strip() for block in BLOCKS for line in block.splitlines()]
INLINE = re.findall(r"`((?:mpirun|python) [^`]*)`", README)
COMMANDS = [
    text
    for text in LINES + INLINE
    if re.match(r"(mpirun -n \d+ )?python -m fedmpi(\.fedavg|\.data\.prepare| \w+ )", text)
]
(LOOP,) = [line for line in LINES if line.startswith("while")]


def bash(script: str, cwd: Path, data_dir: Path, limit_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `script` with this Python's programs first on the PATH."""
    env = clean_environment({"FEDMPI_DATA": os.environ.get("FEDMPI_DATA", str(data_dir))})
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, env=env, capture_output=True, text=True, timeout=limit_s, check=False
    )


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 10
    assert sum(text.startswith("mpirun") for text in COMMANDS) >= 7


def test_every_name_of_fedmpi_in_the_readme_exists():
    text = re.sub(r"python -m \S+", "", README)
    names = set(re.findall(r"\bfedmpi((?:\.[A-Za-z]\w*)+)", text))
    assert len(names) >= 8
    for name in names:
        pkgutil.resolve_name(f"fedmpi:{name[1:]}" if name[1:] in fedmpi.__all__ else f"fedmpi{name}")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(tmp_path, data_dir, command):
    """Each one trains for one round."""
    split = {k: np.arange(k * 1200, (k + 1) * 1200) for k in range(50)}
    (tmp_path / "split.pkl").write_bytes(pickle.dumps(split))
    done = bash(command if "prepare" in command else f"{command} --rounds 1", tmp_path, data_dir)
    assert done.returncode == 0, done.stdout + done.stderr


def own_algorithm() -> tuple[str, str]:
    """README's algorithm of one's own, and the command that runs it."""
    _, _, rest = README.partition("### Write your own algorithm\n")
    section = re.split("^#+ ", rest, flags=re.MULTILINE)[0]
    assert len(section.splitlines()) < 40
    (source,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (command,) = re.findall(r"```bash\n(.*?)\n```", section, re.DOTALL)
    return source, command


def test_the_readmes_own_algorithm_runs(job, tmp_path):
    """On one rank and on three, to the same bits; without momentum it is FedAvg."""
    source, command = own_algorithm()
    (tmp_path / "mine.py").write_text(source)
    num_ranks, spec, *options = re.fullmatch(r"mpirun -n (\d+) python -m fedmpi (\S+) (.*)", command).groups()
    options = [*options[0].split(), *SMALL, "--client-lr", "0.05"]
    runs = []
    for n, more in ((1, ()), (int(num_ranks), ()), (2, ("--beta", "0"))):
        folder = tmp_path / f"own-{n}"
        words = [*options, *more, "--run-dir", str(folder)]
        runs.append(job(n, *words, program=("-m", "fedmpi", spec), name=folder.name))
    assert [run.code for run in runs] == [0, 0, 0], "".join(run.text for run in runs)
    assert runs[0].bits() == runs[1].bits()
    assert runs[0].history() == runs[1].history()
    assert all(row["reported"]["moved"] > 0 for row in runs[0].rows())
    plain = job(2, *SMALL, "--client-lr", "0.05", name="plain")
    assert runs[2].bits() == plain.bits() != runs[0].bits()
    told = job(1, "--help", program=("-m", "fedmpi", spec))
    assert re.search(r"--beta X\s+momentum of the server \(default: 0\.9\)", told.out), told.text


def test_the_readme_lists_the_algorithms():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", README.partition("## Algorithms")[2], re.MULTILINE)
    assert dict(rows[: len(ALGORITHMS)]) == {name: paper_of(entry.paper) for name, entry in ALGORITHMS.items()}


def paper_of(text: str) -> str:
    """Authors and year, which an entry ends with."""
    return text.rpartition(", ")[2]


@pytest.mark.slow
def test_a_loop_over_lines_needs_dev_null(tmp_path, data_dir):
    """mpirun reads standard input, and with it the lines that the loop has not come to yet."""
    (tmp_path / "grid.txt").write_text("".join(f"{' '.join(SMALL)} --quiet --seed {seed}\n" for seed in (1, 2)))
    done = bash(LOOP, tmp_path, data_dir)
    assert done.stdout.count("done: 3 rounds") == 2, done.stdout + done.stderr
    assert len(list((tmp_path / "runs").glob("*/model.pt"))) == 2
    without = bash(LOOP.replace("</dev/null", ""), tmp_path, data_dir)
    assert without.stdout.count("done: 3 rounds") == 1, without.stdout + without.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target", "mpich", "open_mpi"),
    [("SIGKILL", "rank", 9, 137), ("SIGTERM", "launcher", 75, 1), ("SIGINT", "launcher", 75, 1)],
)
def test_the_launchers_codes(start, name, target, mpich, open_mpi):
    running = start(3, *SMALL, "--rounds", "100000")
    running.wait_for_round(2)
    os.kill(running.process.pid if target == "launcher" else running.ranks()[1], signal.Signals[name])
    result = running.end(30)
    assert result.code == (open_mpi if under_open_mpi() else mpich), result.text
    assert ("signal 9" in result.text) == (name == "SIGKILL"), result.text
    assert not (running.run_dir / "model.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("output", ["| head -1", ">&-"])
def test_one_process_goes_on_when_nobody_reads_its_output(tmp_path, data_dir, output):
    command = f"python -m fedmpi.fedavg {' '.join(SMALL)} --run-dir run {output}; exit ${{PIPESTATUS[0]}}"
    done = bash(command, tmp_path, data_dir)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.pt").exists()


def trained_by(run_dir: Path) -> dict[int, int]:
    """Client -> the rank that trained it, of a run of one round with --timeline."""
    events = json.loads((run_dir / "timeline.json").read_text())["traceEvents"]
    return {int(event["name"].split()[1]): event["tid"] for event in events if event["name"].startswith("client ")}


@pytest.mark.slow
@pytest.mark.skipif(under_open_mpi(), reason="MPICH can deal one machine's ranks out to nodes that share no memory")
def test_clients_are_placed_by_cost_between_two_nodes(job):
    options = [*SMALL, *"--rounds 1 --cohort-size 9 --partition dirichlet --alpha 0.3 --timeline".split()]
    nodes = job(5, *options, env={"MPIR_CVAR_NUM_CLIQUES": "2"}, name="nodes")
    static = job(5, *options, "--schedule", "static", name="static")
    assert (nodes.code, static.code) == (0, 0), nodes.text + static.text
    assert len(trained_by(static.run_dir)) == 9
    assert trained_by(nodes.run_dir) == trained_by(static.run_dir)
    assert nodes.bits() == static.bits()


@pytest.mark.slow
def test_with_as_many_clients_as_trainers_client_k_trains_on_rank_k_plus_1(job):
    everybody = "--num-clients 3 --cohort-size 3 --rounds 2 --timeline".split()
    done = job(4, *SMALL, *everybody)
    assert done.code == 0, done.text
    assert trained_by(done.run_dir) == {0: 1, 1: 2, 2: 3}
