"""mpirun -n 3 python -m fedmpi.bench [CASE ...]: rounds against a bare loop, and this machine's limits."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmpi.bench.parser import Parser
from fedmpi.bench.start import launched_ranks, median_difference, seconds_to_round_0
from fedmpi.data.install import install
from fedmpi.errors import EXIT_DONE, ConfigError
from fedmpi.launch import leave, start
from fedmpi.lifecycle.files import atomic_write
from fedmpi.mpi.launcher import speaks
from fedmpi.mpi.setup import agree

if TYPE_CHECKING:
    from fedmpi.mpi.comm import Comm

logger = logging.getLogger("fedmpi.bench")

TARGETS = {"2nn": 0.60, "cnn": 0.80, "k1000": 0.65, "k10000": 0.75}
"""Median of fedmpi's time over the floor's that we hold ourselves to, with two trainers."""

SCALE = "scale"
"""The case without training: what rounds cost against clients, vector length and ranks."""


def main(argv: Sequence[str]) -> int:
    """Collective. Returns the exit code."""
    parser = Parser(prog="python -m fedmpi.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(TARGETS)} (default: all of them), or {SCALE}"
    )
    parser.add_argument("--pairs", type=int, default=5, help="timed blocks of each kind (default: 5)")
    parser.add_argument("--starts", type=int, default=3, help="timed starts of each kind; 0: none (default: 3)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu", help="of both (default: cpu)")
    parser.add_argument(
        "--largest", type=int, default=10**8, help="longest vector of the case scale, in entries (default: 10^8)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures here too")

    def prepare() -> tuple[argparse.Namespace, dict[str, list[float]]]:
        options = _checked(parser.parse_args(argv))
        install("mnist", None)
        return options, seconds_to_round_0(launched_ranks(), options.starts) if options.starts and speaks() else {}

    return start(argv, prepare, _run)


def _run(net: Comm, prepared: tuple[argparse.Namespace, dict[str, list[float]]]) -> int:
    options, starts = prepared
    if net.size < 3:
        agree(net, ConfigError(f"the floor takes two trainer ranks: mpirun -n 3 or more, got {net.size}"))
    figures = _measure(net, options, starts)
    if net.is_server and options.json:
        atomic_write(Path(options.json).expanduser(), json.dumps(figures, indent=1).encode())
    return net.leave(EXIT_DONE)


def _checked(options: argparse.Namespace) -> argparse.Namespace:
    for case in options.cases:
        if case not in (*TARGETS, SCALE):
            raise ConfigError(f"CASE must be of {', '.join(TARGETS)}, {SCALE}, got {case}")
    for name, least in (("pairs", 1), ("starts", 0), ("largest", 1)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} must be {least} or more, got {getattr(options, name)}")
    return options


def _measure(net: Comm, options: argparse.Namespace, starts: dict[str, list[float]]) -> dict[str, Any]:
    """Collective. All figures, and their lines as they come, on the server."""
    from fedmpi.bench import machine
    from fedmpi.bench.cases import CASES
    from fedmpi.bench.rounds import FLOOR_RANKS, CaseBench

    pair = net.split(int(net.rank in FLOOR_RANKS))
    figures: dict[str, Any] = {"machine": machine.facts(net), "limits": machine.limits(net), "cases": {}}
    _say("machine: %s", ", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    _say("limits:  %s", ", ".join(f"{name} {value:.3g}" for name, value in figures["limits"].items()))
    if starts:
        figures["start"] = starts
        medians = {name: statistics.median(spent) for name, spent in starts.items()}
        _say(
            "start:   round 0 begins %.2f s after mpirun, a bare import torch + barrier takes %.2f s: %+.2f s",
            medians["fedmpi"], medians["bare"], median_difference(starts),
        )  # fmt: skip
    cases = [case for case in options.cases or TARGETS if case != SCALE]
    if cases:
        _say("%-8s %10s %10s %22s %7s %18s %17s %6s %9s", "case", "fedmpi s", "floor s", "ratio (min-max)", "target",
             "accuracy, floor's", "eval ms, floor's", "idle", "ms/client")  # fmt: skip
    for name in cases:
        rounds = CaseBench(net, pair, CASES[name], options.device).run(options.pairs)
        ratios = rounds.ratios
        _say(
            "%-8s %10.3f %10.3f %8.3f (%.3f-%.3f) %7.2f %8.2f %% %6.2f %% %9.0f %7.0f %4.0f %% %9.3f%s",
            name, statistics.median(rounds.fedmpi_s), statistics.median(rounds.floor_s), statistics.median(ratios),
            min(ratios), max(ratios), TARGETS[name], 100 * rounds.accuracy[0], 100 * rounds.accuracy[1],
            1e3 * rounds.evaluate_s[0], 1e3 * rounds.evaluate_s[1],
            100 * rounds.idle_share, rounds.client_ms, "   noisy" if rounds.noisy else "",
        )  # fmt: skip
        _say("         engine %s; floor %s", rounds.engine, rounds.floor)
        if rounds.grouped_s:
            _say(
                "         floor of %.3f s that takes 32 clients at a time: ratio %.3f (%.3f-%.3f)",
                statistics.median(rounds.grouped_s), statistics.median(rounds.grouped_ratios),
                min(rounds.grouped_ratios), max(rounds.grouped_ratios),
            )  # fmt: skip
        figures["cases"][name] = {**vars(rounds), "ratios": ratios, "noisy": rounds.noisy}
    if SCALE in options.cases:
        figures[SCALE] = _scale(net, figures["limits"], options.largest)
    figures["pss MB"] = machine.pss_mb(net)
    _say("memory:  %.0f MB over all ranks (PSS), by rank %s", sum(figures["pss MB"]), figures["pss MB"])
    return figures


def _scale(net: Comm, limits: dict[str, float], largest: int) -> dict[str, Any]:
    """Collective. The rows of `scale.overheads`, and what its model says of more ranks, on the server."""
    from fedmpi.bench import scale

    _say("%10s %12s %10s %10s %10s %10s", "clients", "entries", "round ms", "broadcast", "collect", "step")
    rows = []
    for row in scale.overheads(net, largest):
        if net.is_server:
            rows.append(row)
            _say("%10d %12d %10.2f %10.2f %10.2f %10.2f", *row.values())
    model = {
        str(ranks): {str(entries): round(scale.predicted_ms(limits, net.size, ranks, entries), 2)
                     for entries in scale.ENTRIES}
        for ranks in scale.RANKS
    }  # fmt: skip
    for ranks, times in model.items():
        _say("model:  %5s ranks: %s", ranks, ", ".join(f"{int(n):.0e} entries {ms} ms" for n, ms in times.items()))
    return {"rows": rows, "model ms": model}


def _say(line: str, *values: object) -> None:
    logger.info(line, *values)


def _main(argv: Sequence[str]) -> int:
    """Run what is typed: the cases, or one of the programs that start jobs of their own."""
    if argv[:1] != ["soak"]:
        return main(argv)
    from fedmpi.bench import soak

    try:
        return soak.main(argv[1:])
    except ConfigError as error:
        return leave(error)


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
