"""A YAML file of options, whoever wrote it: read within a bound of time and memory, or refused in a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fedmpi.errors import ConfigError, shown
from fedmpi.lifecycle.files import os_errors, read_regular

_INTEGER = r"[-+]?(?:0|[1-9]\d*)"  # YAML 1.1 and 1.2 disagree about 010: it is text, as are 0x1f, 1_000 and 1:30
_REAL = r"[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_TAGS = {
    f"tag:yaml.org,2002:{name}": re.compile(rf"(?:{pattern})\Z", re.ASCII)
    for name, pattern in (("int", _INTEGER), ("float", rf"{_REAL}|[-+]?\.inf|\.nan"))
}
_FIRST = list("-+.0123456789")

_MOST_BYTES = 2**16
_MOST_NODES = 5000
_MOST_DEPTH = 8


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Loader(_SafeLoader):  # type: ignore[misc]  # one of the two
    """Reads plain values, lists and maps; refuses keys that are given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as PyYAML declares it
        first: [(tag, pattern) for tag, pattern in pairs if tag not in _TAGS]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{shown(name)} is given twice")
        return dict(super().construct_mapping(node, deep))


class Dumper(yaml.SafeDumper):
    """Writes without anchors, and quotes text that `Loader` would take for a number."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _tag, _pattern in _TAGS.items():
    Loader.add_implicit_resolver(_tag, _pattern, _FIRST)
    Dumper.add_implicit_resolver(_tag, _pattern, _FIRST)


def number_of(text: str) -> object:
    """Return the number, or the truth value, that `text` stands for on a command line; else the text."""
    if re.fullmatch(_INTEGER, text, re.ASCII):
        return int(text)
    if re.fullmatch(rf"{_REAL}|[-+]?(?:inf|nan)", text, re.ASCII):
        return float(text)
    return {"true": True, "false": False}.get(text, text)


def read_yaml(path: str) -> dict[str, Any]:
    """Return the map in a YAML file, empty for an empty file.

    Args:
        path: the file; `--config` names it.

    Raises:
        ConfigError: it cannot be read, is no YAML, no map with text keys, too long or too deep, or has anchors.
    """
    try:
        with os_errors(ConfigError, f"--config {path}: cannot be read", "{} ({})"):
            text = read_regular(Path(path), _MOST_BYTES, follow=True).decode()
        _check_size(text)
        values = yaml.load(text, Loader)
    except (ValueError, yaml.YAMLError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        raise ConfigError(f"--config {path}: not YAML: {shown(str(error), 160)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"--config {path}: wanted a map of option: value, got a {type(values).__name__}")
    return values


def _check_size(text: str) -> None:
    """See that the text is small once it is taken apart.

    Raises:
        ValueError: it is not.
    """
    depth = 0
    for i, event in enumerate(yaml.parse(text, Loader=_SafeLoader)):
        if getattr(event, "anchor", None) is not None:  # an anchor, or an alias of one
            raise ValueError("anchors (&, *) are not read here")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_DEPTH or i > _MOST_NODES:
            raise ValueError(f"more than {_MOST_DEPTH} brackets deep, or more than {_MOST_NODES:,} values")
