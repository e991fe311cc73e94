"""Frozen dataclasses <-> command-line flags <-> YAML.

A field of a dataclass is an option: `client_lr` is `--client-lr` on the command line and `client_lr:` in YAML. Its
legal values are written once, in `option(...)`, and used for the help, the check and the error message. Nothing here
needs torch or MPI, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import types
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from fedmpi.errors import ConfigError, shown

C = TypeVar("C")

_MOST_CHARACTERS = 4096
_LONG = 2**63  # integers from here on fit into no buffer
_MOST_SHOWN = 2**512

PROVENANCE = "provenance"
"""The one YAML key that is no option: `config.yaml` records there what the run was made with; loading skips it."""


def option(default: object, text: str, group: str, bounds: str = "", result: bool = True, path: bool = False) -> Any:
    """Return a dataclass field that is an option.

    Args:
        default: the value when neither a flag nor the YAML file gives one.
        text: one line of help.
        group: heading under which `--help` lists it.
        bounds: the legal interval of a number, e.g. "(0, 1]" or "[1, inf)"; empty: any.
        result: whether the option can change the trained model. Equal `result` options: same bits.
        path: the value names a file or folder: a `~` at its beginning is the home folder, wherever it is written.
    """
    metadata = {"help": text, "group": group, "bounds": bounds, "result": result, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


def parse(
    cls: type[C], argv: Sequence[str], prog: str, description: str, options: Mapping[str, object] | None = None
) -> C:
    """Return the options as a `cls`; flags win over `--config FILE.yaml`, which wins over defaults.

    Args:
        cls: dataclass of `option` fields.
        argv: arguments without the program's name.
        prog: the program's name, for the help.
        description: of the program, for the help.
        options: values by name, of a caller in Python; they win over the file.

    Raises:
        ConfigError: one line that names option, value and range.
        SystemExit: after `--help`, with code 0.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # C is one
    defaults = {name: f.default for name, f in fields.items()}
    hints = get_type_hints(cls)
    flags = vars(_parser(fields, hints, prog, description).parse_args(argv))
    values: dict[str, object] = {}
    given = {*flags, *(options or {})} - {"config"}
    for path in flags.pop("config", []):
        content, is_record = _read_options(path)
        values.update(content)
        # a record of ours lists every option, also those that nobody gave
        given |= {name for name, value in content.items() if not is_record or value != defaults.get(name)}
    values |= {**(options or {}), **flags}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"unknown option '{shown(name)}' in --config; --help lists them")
        values[name] = _checked(fields[name], hints[name], value)
    parsed = cls(**values)
    for check, arguments in (("check", ()), ("check_given", (frozenset(given),))):
        if hasattr(parsed, check):
            getattr(parsed, check)(*arguments)
    return parsed


def to_yaml(config: object, provenance: Mapping[str, object], leave_out: Collection[str] = ()) -> str:
    """Return the YAML text that `--config` reads back to an equal `config`; `provenance` is kept beside it.

    Args:
        config: the options.
        provenance: plain values.
        leave_out: names of options that have no effect beside the others.
    """
    import yaml

    from fedmpi.lifecycle.yaml_file import Dumper

    values = dataclasses.asdict(config)  # type: ignore[call-overload]  # any of our dataclasses
    used = {name: value for name, value in values.items() if name not in leave_out}
    content = {**used, PROVENANCE: dict(provenance)}
    return str(yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def result_options(config: object) -> dict[str, object]:
    """Return the options that decide the trained model, by name."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata["result"]}  # type: ignore[arg-type]  # any of our dataclasses


def result_hash(config: object) -> str:
    """Return the SHA-256 (hex) of `result_options`: equal hashes and equal data give equal bits."""
    return hashlib.sha256(json.dumps(result_options(config), sort_keys=True).encode()).hexdigest()


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message == "argument --config: expected one argument":
            raise ConfigError("--config wants a YAML file, got nothing")
        found = message.removeprefix("unrecognized arguments: ")
        raise ConfigError(
            shown(message, 300) if found == message else f"unknown option {shown(found)}; --help lists them"
        )


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def _parser(
    fields: Mapping[str, dataclasses.Field[Any]], hints: Mapping[str, Any], prog: str, description: str
) -> argparse.ArgumentParser:
    """Return a parser of flags to text; a flag that is not given is not in its namespace."""
    parser = _Parser(
        prog=prog, description=description, usage=f"{prog} [OPTION ...]", formatter_class=_Help, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    groups: dict[str, Any] = {}
    for group in (*(f.metadata["group"] for f in fields.values()), "Output"):
        groups[group] = groups.get(group) or parser.add_argument_group(group)
    for name, f in fields.items():
        text = f.metadata["help"]
        if f.default is False:
            groups[f.metadata["group"]].add_argument(flag_of(name), action="store_true", help=text)
            continue
        default = "" if f.default is None else f" (default: {f.default})"
        groups[f.metadata["group"]].add_argument(flag_of(name), metavar=_metavar(hints[name]), help=text + default)
    groups["Output"].add_argument(
        "--config", action="append", metavar="FILE", help="YAML file of options; flags win over it"
    )
    return parser


def _read_options(path: str) -> tuple[dict[str, object], bool]:
    """Return the options in a YAML file, and whether it is a `config.yaml` that fedmpi wrote.

    Raises:
        ConfigError: it is no file of options.
    """
    from fedmpi.lifecycle.yaml_file import read_yaml  # here: `import fedmpi.config` alone stays instant

    _check_text("config", path)
    content = read_yaml(os.path.expanduser(path))  # noqa: PTH111  # leaves what it does not know
    if "config" in content:
        raise ConfigError(f"--config {path}: a file cannot name another one (config: {shown(content['config'])})")
    is_record = content.pop(PROVENANCE, None) is not None
    values: dict[str, object] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in values:
            raise ConfigError(f"--config {path}: not YAML: {shown(name)} is given twice")
        values[name] = value
    return values, is_record


def _checked(field: dataclasses.Field[Any], hint: Any, value: Any) -> object:
    """Return the value of an option as its type.

    Raises:
        ConfigError: names the option, its legal values, and `value`.
    """
    kinds, bounds = _kinds(hint), field.metadata["bounds"]
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    classes = tuple(kind for kind in kinds if isinstance(kind, type))
    if value is None and type(None) in get_args(hint):
        return None
    if isinstance(value, str):
        _check_text(field.name, value)
        if value in words:
            return value
        if int in classes or float in classes:
            from fedmpi.lifecycle.yaml_file import number_of

            value = number_of(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST_SHOWN:
        if float in classes:
            value = float(value)
        elif abs(value) >= _LONG:
            bounds = bounds.replace("inf)", f"{_LONG - 1}]")
    fits = isinstance(value, classes) and (bool in classes or not isinstance(value, bool))
    if not fits or not _in_bounds(value, bounds):
        found = "nothing" if value == "" else shown(value)
        raise ConfigError(f"{flag_of(field.name)} must be {_wanted(hint, bounds)}, got {found}")
    return os.path.expanduser(value) if field.metadata["path"] else value  # noqa: PTH111  # as above


def _check_text(name: str, text: str) -> None:
    """Refuse text that no file name, host or option has a use for."""
    if len(text) > _MOST_CHARACTERS or any(unicodedata.category(char) == "Cc" for char in text):
        raise ConfigError(f"{flag_of(name)} must be at most {_MOST_CHARACTERS} printable characters, got {shown(text)}")


def _in_bounds(value: Any, bounds: str) -> bool:
    if value == "" or (isinstance(value, int) and abs(value) >= _LONG):
        return False
    if not bounds:
        return True
    low, high = (int(text) if text.isdecimal() else float(text) for text in bounds[1:-1].split(", "))
    return bool(low <= value <= high and (value != low or bounds[0] == "[") and (value != high or bounds[-1] == "]"))


def _kinds(hint: Any) -> list[Any]:
    """Return the alternatives of a type hint, None left out."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for kind in get_args(hint) if kind is not type(None)]
    return [hint]


def _wanted(hint: Any, bounds: str) -> str:
    """Return the legal values in words."""
    number = f" in {bounds}" if bounds else ""
    words = {int: f"an integer{number}", float: f"a number{number}", str: "text", bool: "true or false"}
    return " or ".join(
        ", ".join(get_args(kind)) if get_origin(kind) is Literal else words[kind] for kind in _kinds(hint)
    )


def _metavar(hint: Any) -> str:
    names = {int: "N", float: "X", str: "TEXT"}
    return "|".join(
        "{" + ",".join(get_args(kind)) + "}" if get_origin(kind) is Literal else names[kind] for kind in _kinds(hint)
    )
