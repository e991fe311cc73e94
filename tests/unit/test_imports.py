"""The rooms of the house: imports go down only, MPI has one door, and torch is loaded where it is used."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fedmpi"

ALLOWED = {
    # top floor: what is run
    "__main__": {"launch", "core"},
    "bench": {"launch", "fedavg", "job", "machine", "config", "data", "logs", "core"},
    "fedavg": {"launch", "job", "config", "data", "engines", "core"},
    # the wiring
    "embedded": {"launch", "job", "outcome", "config", "options", "logs", "core"},
    "launch": {"job", "config", "options", "data", "logs", "core"},
    "job": {"config", "options", "data", "models", "report", "logs", "machine", "core", "outcome", "version"},
    "outcome": {"core"},
    "machine": {"config", "core"},
    # rooms beside each other
    "report": {"config", "options", "data", "core"},
    "data": {"config", "options", "logs", "core"},
    "engines": {"core"},
    "models": {"core"},
    "logs": {"config", "core"},
    "config": {"options", "core"},
    "options": {"core"},
    # the machine
    "core": set(),
    "version": set(),
    # FedLab's names, and the door: loads any of these when first asked for
    "fedlab": {"__init__"},
    "__init__": {"core", "data", "embedded", "version"},
}

MPI = {"core.comm"}
MEETS_MPI = {
    "bench.machine",
    "bench.rounds",
    "bench.scale",
    "core.client_manager",
    "core.clock",
    "core.manager",
    "core.server_manager",
    "job",
    "launch",
    "machine",
}
TORCH = {
    "bench.floor", "bench.machine", "bench.rounds", "bench.scale", "bench.soak",
    "core.aggregate", "core.attributes", "core.checkpoint", "core.client_manager", "core.contents", "core.evaluate",
    "core.exactsum", "core.handler", "core.layout", "core.manager", "core.model_checks", "core.server_manager",
    "core.trainer", "core.untouched", "core.vector", "core.views", "core.visits", "data.client_data",
    "engines.choose", "engines.eager", "engines.fused", "engines.graph", "engines.proof",
    "engines.put_back", "engines.rehearsal", "engines.single_step",
    "fedavg", "job", "machine", "models", "models.cnn", "models.mlp", "report.identity",
    "report.run_folder",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Import:
    """One import of `name` in `module`: "top" with the module, "late" inside a function, "types" for checkers only."""

    module: str
    name: str
    when: str


def module_name(path: Path) -> str:
    """The name: "core.comm" for core/comm.py, "models" for models/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str) -> Iterator[Import]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    yield from _walk(module, tree, "top")


def _walk(module: str, node: ast.AST, when: str) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _imported(module, alias.name, when)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module}: relative import"
        assert node.module is not None
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            is_module = inner.removeprefix("fedmpi.") in MODULES and inner.startswith("fedmpi.")
            yield from _imported(module, inner if is_module else node.module, when)
    for child in ast.iter_child_nodes(node):
        later = when
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            later = "late" if when == "top" else when
        elif isinstance(node, ast.If) and child in node.body:
            test = ast.unparse(node.test)
            later = {"TYPE_CHECKING": "types", "__name__ == '__main__'": "late"}.get(test, when)
        yield from _walk(module, child, later)


def _imported(module: str, name: str, when: str) -> Iterator[Import]:
    if name == "fedmpi":
        yield Import(module, "__init__", when)
    elif name.startswith("fedmpi."):
        yield Import(module, name.removeprefix("fedmpi."), when)
    else:
        yield Import(module, f"/{name.partition('.')[0]}", when)


IMPORTS = [each for module in MODULES for each in imports_of(module)]


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_a_rule() -> None:
    assert {room(module) for module in MODULES} == set(ALLOWED)


def test_the_rules_have_a_direction() -> None:
    tuple(TopologicalSorter(ALLOWED).static_order())  # raises CycleError


def test_imports_go_down_only() -> None:
    inside = [each for each in IMPORTS if not each.name.startswith("/")]
    assert len(inside) > 100
    for each in inside:
        assert each.name in MODULES, each
        assert room(each.name) == room(each.module) or room(each.name) in ALLOWED[room(each.module)], each


def test_no_rule_allows_what_nobody_does() -> None:
    used = {(room(each.module), room(each.name)) for each in IMPORTS if not each.name.startswith("/")}
    assert {(above, below) for above, allowed in ALLOWED.items() for below in allowed} <= used


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for each in IMPORTS:
        if each.when == "top" and not each.name.startswith("/"):
            graph[each.module].add(each.name)
    tuple(TopologicalSorter(graph).static_order())


def importers(name: str, *when: str) -> set[str]:
    return {each.module for each in IMPORTS if each.name == name and each.when in when}


def test_mpi_has_one_door() -> None:
    assert importers("/mpi4py", "top", "late", "types") == MPI


def test_only_the_round_loop_and_the_wiring_go_through_it() -> None:
    assert importers("core.comm", "top", "late") == MEETS_MPI


def test_mpi_and_torch_do_not_meet_below_the_managers() -> None:
    assert "core.comm" not in TORCH
    assert {
        "core.client_manager",
        "core.manager",
        "core.server_manager",
        "job",
        "machine",
        "bench.machine",
        "bench.rounds",
        "bench.scale",
    } == MEETS_MPI & TORCH


def test_torch_is_loaded_with_these_modules_only() -> None:
    assert importers("/torch", "top") == TORCH
    assert importers("/torch", "late") == {"core.device", "core.pulse", "core.seeding", "embedded"}


@pytest.mark.parametrize("module", ["__init__", "__main__", "config", "launch", "logs", "data.sources", "data.prepare"])
def test_what_comes_before_training_loads_no_torch_and_no_mpi(module: str) -> None:
    """Everything that loading `module` loads, followed to the end: `--help` and `data.prepare` need neither."""
    seen, todo = set(), [module]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        todo += [each.name for each in IMPORTS if each.module == current and each.when == "top"]
        if "." in current and not current.startswith("/"):
            todo.append(room(current))  # a package's __init__ comes first
    assert seen.isdisjoint({"/torch", "/torchvision", "/mpi4py"})


def test_heavy_libraries_are_loaded_late() -> None:
    for name in ("/torchvision", "/sklearn", "/jsonargparse", "/matplotlib"):
        assert importers(name, "top") == set(), name


def test_nothing_prints_in_the_library() -> None:
    """Output goes through logging, or through one write where logging is not set up yet."""
    for module, path in MODULES.items():
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert not [call for call in calls if ast.unparse(call.func) == "print"], module
