"""Declarations of pyproject.toml: bounds that can be installed as versions, and types for users' checkers."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def requirements() -> list[str]:
    """Return all requirements, the extras' too."""
    project = DECLARED["project"]
    return project["dependencies"] + [text for extra in project["optional-dependencies"].values() for text in extra]


def test_every_requirement_is_one_lower_bound() -> None:
    """The slow test of the lowest versions installs them as `==`."""
    assert [text for text in requirements() if not re.fullmatch(r"[\w-]+>=\d+(\.\d+)*", text)] == []


def test_no_requirement_has_two_bounds() -> None:
    bounds = {text.lower().split(">=")[0]: text for text in requirements()}
    assert len(bounds) == len(requirements())


def test_the_python_of_pyproject_the_linter_and_the_readme_is_one() -> None:
    lowest = DECLARED["project"]["requires-python"].removeprefix(">=")
    assert DECLARED["tool"]["ruff"]["target-version"] == f"py{lowest.replace('.', '')}"
    assert f"Python >= {lowest} " in README


def test_types_go_with_the_package() -> None:
    """PEP 561; the slow test looks into the wheel and has mypy check a user's script."""
    assert (ROOT / "fedmpi" / "py.typed").read_bytes() == b""
    assert "py.typed" in DECLARED["tool"]["setuptools"]["package-data"]["fedmpi"]
