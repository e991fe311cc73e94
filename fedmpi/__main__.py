"""`python -m fedmpi`: lists the algorithms; `python -m fedmpi fedavg ...` runs one, `... mine:Own ...` one of yours."""

from __future__ import annotations

import sys

from fedmpi.algorithms import ALGORITHMS
from fedmpi.errors import EXIT_DONE, ConfigError, shown
from fedmpi.launch import leave, main
from fedmpi.mpi.launcher import speaks
from fedmpi.mpi.streams import show


def _main(argv: list[str]) -> int:
    if argv and argv[0] in ALGORITHMS:
        return main(ALGORITHMS[argv[0]].spec, argv=argv[1:])
    if argv and not argv[0].startswith("-") and all(argv[0].rpartition(":")):
        return main(argv[0], argv=argv[1:])
    lines = [f"  {name:16} {entry.paper}" for name, entry in ALGORITHMS.items()]
    usage = ["usage: mpirun -n 11 python -m fedmpi ALGORITHM [OPTION ...]", "", *lines, "  module:Class     your own"]
    if argv and argv[0] not in ("-h", "--help"):
        names = f"{', '.join(ALGORITHMS)}, and your own as module:Class"
        return leave(ConfigError(f"no algorithm {shown(argv[0])!r}; there are: {names}"))
    if speaks():
        show(sys.stdout, "\n".join([*usage, "", "python -m fedmpi ALGORITHM --help lists its options.", ""]))
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
