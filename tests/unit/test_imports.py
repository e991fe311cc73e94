"""The rooms of the house: imports go down only, MPI has one door, and torch is loaded where it is used."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fedmpi"

FLOORS = """
__main__ bench
embedded fedlab
algorithms
fedavg
launch
job
algorithm
halves
outcome
report
data
logs
config
options
engines models
core
lifecycle
machine
mpi
imports
errors
interrupt version
""".split("\n")[1:-1]
"""From the top down; rooms on one line do not know each other."""

DOOR = "__init__"
"""Loads any of the others when it is first asked for."""


LIGHT = {
    "mpi", "imports", "errors", "interrupt", "version", "options", "config", "logs", "launch", "__main__", "__init__",
}  # fmt: skip
"""Rooms without torch: `--help` and a wrong option need none, and what travels is memory."""


@dataclasses.dataclass(frozen=True)
class Import:
    """One import of `name` in `module`: "top" with the module, "late" inside a function, "types" for checkers only."""

    module: str
    name: str
    when: str


def module_name(path: Path) -> str:
    """The name: "mpi.comm" for core/comm.py, "models" for models/__init__.py."""
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


def floor(name: str) -> int:
    return next(i for i, line in enumerate(FLOORS) if name in line.split())


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES} - {DOOR} == {name for line in FLOORS for name in line.split()}


def test_imports_go_down_only() -> None:
    inside = [each for each in IMPORTS if not each.name.startswith("/") and DOOR not in (each.module, each.name)]
    assert len(inside) > 100
    for each in inside:
        above, below = room(each.module), room(each.name)
        assert each.name in MODULES, each
        assert above == below or floor(above) < floor(below), each


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for each in IMPORTS:
        if each.when == "top" and not each.name.startswith("/"):
            graph[each.module].add(each.name)
    tuple(TopologicalSorter(graph).static_order())


def importers(name: str, *when: str) -> set[str]:
    return {each.module for each in IMPORTS if each.name == name and each.when in when}


def test_mpi_has_one_door() -> None:
    assert importers("/mpi4py", "top", "late", "types") == {"mpi.comm"}


def test_torch_is_loaded_where_tensors_are_worked_on() -> None:
    assert {room(module) for module in importers("/torch", "top")}.isdisjoint(LIGHT)
    assert not [module for module in importers("/torch", "top", "late") if room(module) == "mpi"]


@pytest.mark.parametrize(
    "module",
    ["__init__", "__main__", "algorithms", "config", "imports", "launch", "logs", "data.install", "data.prepare"],
)
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
    for name in ("/torchvision", "/sklearn", "/matplotlib"):
        assert importers(name, "top") == set(), name


def test_nothing_prints_in_the_library() -> None:
    """Output goes through logging, or through one write where logging is not set up yet."""
    for module, path in MODULES.items():
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert not [call for call in calls if ast.unparse(call.func) == "print"], module
