"""A YAML file of options, whoever wrote it: read within a bound of time and memory, or refused in a line."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from fedmpi.errors import ConfigError, shown
from fedmpi.lifecycle.files import os_errors, read_regular

MOST_BYTES = 2**16
_MOST_NODES = 5000
_MOST_DEPTH = 8


def read_yaml(path: str) -> dict[str, Any]:
    """The map in a YAML file, empty for an empty file.

    Args:
        path: the file; `--config` names it.

    Raises:
        ConfigError: it cannot be read, is no YAML, no map with text keys, too long or too deep, or has anchors.
    """
    import yaml  # here: `import fedmpi.config` alone stays instant

    try:
        with os_errors(ConfigError, f"--config {path}: cannot be read", "{} ({})"):
            text = read_regular(Path(path), MOST_BYTES, follow=True).decode()
        _refuse_bombs(text)
        values = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        raise ConfigError(f"--config {path}: not YAML: {shown(str(error), 160)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"--config {path}: wanted a map of option: value, got a {type(values).__name__}")
    return values


def _refuse_bombs(text: str) -> None:
    """See that the text is small once it is taken apart.

    Raises:
        ValueError: it is not.
    """
    import yaml

    depth = 0
    for i, event in enumerate(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))):
        if getattr(event, "anchor", None) is not None:  # an anchor, or an alias of one
            raise ValueError("anchors (&, *) are not read here")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_DEPTH or i > _MOST_NODES:
            raise ValueError(f"more than {_MOST_DEPTH} brackets deep, or more than {_MOST_NODES:,} values")


def has_control_characters(text: str) -> bool:
    """Return True for text that no file name, host or option has a use for."""
    return any(unicodedata.category(char) == "Cc" for char in text)
