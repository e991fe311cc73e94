"""Imports of a user's own code: "module:name", with the module found as `python -m` would find it, or a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fedmpi.errors import ConfigError


def import_name(what: str, spec: str) -> Any:
    """Return what "module:name" or "./file.py:name" stands for.

    Args:
        what: the option it was given for, as messages begin: "--model zoo:net".
        spec: the text.

    Raises:
        ConfigError: there is no such module or name.
    """
    module_name, _, name = spec.rpartition(":")
    if module_name.startswith(".") and not module_name.endswith(".py"):
        raise ConfigError(f"{what}: a file of your own ends in .py: {module_name}.py:{name}")
    try:
        module = _module_of(what, module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, something it imports is not: the traceback says it best
        raise ConfigError(f"{what}: there is no module {module_name!r} here or in PYTHONPATH") from error
    except SystemExit as error:
        raise ConfigError(
            f"{what}: module {module_name!r} calls sys.exit when it is imported: put that under if __name__ =="
            ' "__main__"'
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"{what}: module {module_name!r} has no {name!r}")
    return getattr(module, name)


def _module_of(what: str, module_name: str) -> ModuleType:
    """Return the module, imported by its name or from its file."""
    if not module_name.endswith(".py"):
        if str(Path.cwd()) not in sys.path and "" not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(module_name)
    path = Path(module_name).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"{what}: there is no file {path}")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # a .py file always has one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # for what it imports itself
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
