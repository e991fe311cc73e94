"""Frozen dataclasses <-> command-line flags <-> YAML.

A field of a dataclass is an option: `client_lr` is `--client-lr` on the command line and `client_lr:` in YAML. What the
field may hold is written once, in `option(...)`, and used for the help, the check and the error message. Nothing here
needs torch or MPI, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from fedmpi.core.errors import ConfigError

C = TypeVar("C")

PROVENANCE = "provenance"
"""The one YAML key that is no option: `config.yaml` records there what the run was made with; loading skips it."""


def option(default: object, text: str, group: str, bounds: str = "", result: bool = True) -> Any:
    """A dataclass field that is an option.

    Args:
        default: the value when neither a flag nor the YAML file gives one.
        text: one line of help.
        group: heading under which `--help` lists it.
        bounds: the legal interval of a number, e.g. "(0, 1]" or "[1, inf)"; empty: any.
        result: whether the option can change the trained model. Equal `result` options: same bits.
    """
    return dataclasses.field(
        default=default, metadata={"help": text, "group": group, "bounds": bounds, "result": result}
    )


def parse(cls: type[C], argv: Sequence[str], prog: str, description: str) -> C:
    """`argv` (without the program's name) as a `cls`; flags win over `--config FILE.yaml`, which wins over defaults.

    Raises:
        ConfigError: one line that names option, value and what is wanted.
        SystemExit: after `--help`, with code 0.
    """
    from jsonargparse import Namespace  # here: `import fedmpi.config` alone stays instant

    parser = _parser(cls, prog, description)
    argv = list(argv)
    config = {name: value for path in _pop_config(argv) for name, value in _read_yaml(path).items()}
    try:
        values: Namespace = parser.parse_object(config) if config else parser.get_defaults()
        values = parser.parse_args(argv, namespace=values)
    except (TypeError, ValueError) as error:  # jsonargparse's own, from parse_object
        raise ConfigError(_one_line(str(error))) from error
    fields = {f.name: getattr(values, f.name) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # C is one
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]  # as above
        _check_value(f.name, get_type_hints(cls)[f.name], f.metadata["bounds"], fields[f.name])
    parsed = cls(**fields)
    check = getattr(parsed, "check", None)
    if check is not None:
        check()
    return parsed


def to_yaml(config: object, provenance: Mapping[str, object]) -> str:
    """The YAML text that `--config` reads back to an equal `config`; `provenance` is kept beside it for the reader."""
    import yaml

    values = dataclasses.asdict(config)  # type: ignore[call-overload]  # any of our dataclasses
    return str(yaml.safe_dump({**values, PROVENANCE: dict(provenance)}, sort_keys=False, allow_unicode=True))


def result_options(config: object) -> dict[str, object]:
    """The options that decide the trained model, by name."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata["result"]}  # type: ignore[arg-type]  # any of our dataclasses


def result_hash(config: object) -> str:
    """SHA-256 (hex) of `result_options`: equal hashes and equal data give equal bits."""
    return hashlib.sha256(json.dumps(result_options(config), sort_keys=True).encode()).hexdigest()


def _parser(cls: type[Any], prog: str, description: str) -> Any:
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):  # type: ignore[misc,unused-ignore]  # jsonargparse's class is untyped for mypy
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ConfigError(_explain(message, wanted)) from ex

    class Help(argparse.HelpFormatter):
        def __init__(self, prog: str) -> None:
            super().__init__(prog, max_help_position=34, width=110)

    parser = Parser(
        prog=prog, description=description, usage=f"{prog} [OPTION ...]", formatter_class=Help, allow_abbrev=False,
        print_config=None, add_help=True, default_env=False,
    )  # fmt: skip
    groups: dict[str, Any] = {}
    hints = get_type_hints(cls)
    wanted = {f.name: _wanted(hints[f.name], f.metadata["bounds"]) for f in dataclasses.fields(cls)}
    for f in dataclasses.fields(cls):
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        text = f.metadata["help"]
        if f.default is not None and f.default is not False:
            text = f"{text} (default: {f.default})"
        if f.default is False:
            groups[group].add_argument(flag_of(f.name), action="store_true", help=text)
        else:
            groups[group].add_argument(
                flag_of(f.name), type=hints[f.name], default=f.default, help=text, metavar=_metavar(hints[f.name])
            )
    groups["Output"] = groups.get("Output") or parser.add_argument_group("Output")
    groups["Output"].add_argument("--config", type=str, metavar="FILE", help="YAML file of options; flags win over it")
    return parser


def _pop_config(argv: list[str]) -> list[str]:
    """Take `--config FILE` and `--config=FILE` out of `argv`; the files in order."""
    files = []
    i = 0
    while i < len(argv):
        if argv[i] == "--config":
            if i + 1 == len(argv):
                raise ConfigError("--config wants a YAML file, got nothing")
            files.append(argv[i + 1])
            del argv[i : i + 2]
        elif argv[i].startswith("--config="):
            files.append(argv[i].removeprefix("--config="))
            del argv[i]
        else:
            i += 1
    return files


def _read_yaml(path: str) -> dict[str, object]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: not YAML: {_one_line(str(error))}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"--config {path}: wanted a map of option: value, got a {type(values).__name__}")
    if "config" in values:
        raise ConfigError(f"--config {path}: a file cannot name another one (config: {values['config']})")
    values.pop(PROVENANCE, None)
    return {key.replace("-", "_"): value for key, value in values.items()}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kinds(hint: Any) -> list[Any]:
    """The alternatives of a type hint, None left out."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for kind in get_args(hint) if kind is not type(None)]
    return [hint]


def _wanted(hint: Any, bounds: str) -> str:
    """What an option may hold, in words."""
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


def _explain(message: str, wanted: Mapping[str, str]) -> str:
    """The parser's message in our form: option, what it must be, value found."""
    key = re.search(r'[Kk]ey "(\w+)"', message)
    value = re.search(r"Given value: (.*)", message) or re.search(r"[Gg]ot value: (.*)", message)
    if key and value and key[1] in wanted:
        return f"{flag_of(key[1])} must be {wanted[key[1]]}, got {value[1].strip()}"
    unknown = re.search(r"[Uu]nrecognized arguments: (.*)", message)
    if unknown:
        return f"unknown option {_one_line(unknown[1])}; --help lists them"
    extra = re.search(r"Option '([^']*)' is not accepted", message)
    if extra:
        return f"unknown option {extra[1]!r} in --config; --help lists them"
    return _one_line(message)


def _check_value(name: str, hint: Any, bounds: str, value: object) -> None:
    """What the parser lets pass: numbers out of bounds, empty text, and in YAML any null and any value for a switch."""
    kinds = _kinds(hint)
    if value is None and type(None) in get_args(hint):
        return
    wrong = value is None or value == "" or (kinds == [bool] and not isinstance(value, bool))
    if bounds and isinstance(value, int | float):
        low, high = (int(text) if text.isdecimal() else float(text) for text in bounds[1:-1].split(", "))
        above = value > low if bounds[0] == "(" else value >= low
        below = value < high if bounds[-1] == ")" else value <= high
        wrong = not (above and below)
    if wrong:
        raise ConfigError(f"{flag_of(name)} must be {_wanted(hint, bounds)}, got {'nothing' if value == '' else value}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
