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
import os
import re
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from fedmpi.errors import ConfigError, shown
from fedmpi.lifecycle.yaml_file import has_control_characters, read_yaml

C = TypeVar("C")

_MOST_CHARACTERS = 4096

PROVENANCE = "provenance"
"""The one YAML key that is no option: `config.yaml` records there what the run was made with; loading skips it."""


def option(default: object, text: str, group: str, bounds: str = "", result: bool = True, path: bool = False) -> Any:
    """A dataclass field that is an option.

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
    """`argv` (without the program's name) as a `cls`; flags win over `--config FILE.yaml`, which wins over defaults.

    `options`: values by name, of a caller in Python; they win over the file.

    Raises:
        ConfigError: one line that names option, value and what is wanted.
        SystemExit: after `--help`, with code 0.
    """
    from jsonargparse import Namespace  # here: `import fedmpi.config` alone stays instant

    parser = _parser(cls, prog, description)
    _check_words(argv)
    argv = list(argv)
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # C is one
    config, given = {}, set()
    for path in _pop_config(argv):
        content, is_record = _read_options(path)
        config.update(content)
        # a record of ours lists every option, also those that nobody gave
        given |= {name for name, value in content.items() if not is_record or value != defaults.get(name)}
    config.update(options or {})
    given |= set(options or {})
    given |= {name for name in defaults for word in argv if f"{word}=".startswith(f"{flag_of(name)}=")}
    hints = get_type_hints(cls)
    bounds = {f.name: f.metadata["bounds"] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # as above
    _check_plain(config, {name: _wanted(hints[name], bounds[name]) for name in defaults})
    try:
        values: Namespace = parser.parse_object(config) if config else parser.get_defaults()
        values = parser.parse_args(argv, namespace=values)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:  # jsonargparse's own, and YAML's
        raise ConfigError(shown(str(error), 300)) from error
    fields = {name: getattr(values, name) for name in defaults}
    for name, value in fields.items():
        _check_value(name, hints[name], bounds[name], value)
    paths = [f.name for f in dataclasses.fields(cls) if f.metadata["path"]]  # type: ignore[arg-type]  # C is one
    for name in paths:
        if fields[name] is not None:
            fields[name] = os.path.expanduser(fields[name])  # noqa: PTH111  # leaves what it does not know
    parsed = cls(**fields)
    for check, arguments in (("check", ()), ("check_given", (frozenset(given),))):
        if hasattr(parsed, check):
            getattr(parsed, check)(*arguments)
    return parsed


def to_yaml(config: object, provenance: Mapping[str, object], leave_out: Collection[str] = ()) -> str:
    """The YAML text that `--config` reads back to an equal `config`; `provenance` is kept beside it for the reader.

    Args:
        config: the options.
        provenance: plain values.
        leave_out: names of options that have no effect beside the others.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    values = dataclasses.asdict(config)  # type: ignore[call-overload]  # any of our dataclasses
    used = {name: value for name, value in values.items() if name not in leave_out}
    content = {**used, PROVENANCE: dict(provenance)}
    return str(yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True))


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


def _check_plain(config: Mapping[str, object], wanted: Mapping[str, str]) -> None:
    """Refuse in YAML, or of a caller, what no option can hold, before the parser looks at it.

    Raises:
        ConfigError: names the option.
    """
    for name, value in config.items():
        if name not in wanted:
            raise ConfigError(f"unknown option '{shown(name)}' in --config; --help lists them")
        if isinstance(value, str) and (len(value) > _MOST_CHARACTERS or has_control_characters(value)):
            raise ConfigError(
                f"{flag_of(name)} must be at most {_MOST_CHARACTERS} printable characters, got {shown(value)}"
            )
        if not isinstance(value, str | int | float | None) or (isinstance(value, int) and abs(value) > 2**512):
            raise ConfigError(f"{flag_of(name)} must be {wanted[name]}, got {shown(value)}")


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


def _read_options(path: str) -> tuple[dict[str, object], bool]:
    """The options in a YAML file, and whether it is a `config.yaml` that fedmpi wrote.

    Raises:
        ConfigError: it is no file of options; a value is no plain one.
    """
    values = read_yaml(os.path.expanduser(path))  # noqa: PTH111  # as above
    if "config" in values:
        raise ConfigError(f"--config {path}: a file cannot name another one (config: {shown(values['config'])})")
    is_record = values.pop(PROVENANCE, None) is not None
    return {key.replace("-", "_"): value for key, value in values.items()}, is_record


def _check_words(argv: Sequence[str]) -> None:
    """Refuse what no option can hold, before the parser looks at it.

    Raises:
        ConfigError: names the option.
    """
    before = "the command line"
    for word in argv:
        flag, equals, value = word.partition("=")
        if len(word) > _MOST_CHARACTERS or has_control_characters(word):
            where = flag if equals and flag.startswith("--") else before
            raise ConfigError(
                f"{shown(where)} must be at most {_MOST_CHARACTERS} printable characters, got {shown(value or word)}"
            )
        before = word if word.startswith("--") else before


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
        return f"{flag_of(key[1])} must be {wanted[key[1]]}, got {shown(value[1])}"
    unknown = re.search(r"[Uu]nrecognized arguments: (.*)", message)
    if unknown:
        return f"unknown option {shown(unknown[1])}; --help lists them"
    return shown(message, 300)


def _check_value(name: str, hint: Any, bounds: str, value: object) -> None:
    """What the parser lets pass: numbers out of bounds, empty text, and in YAML any null and any value for a switch."""
    kinds = _kinds(hint)
    if value is None and type(None) in get_args(hint):
        return
    wrong = value is None or value == "" or (kinds == [bool] and not isinstance(value, bool))
    if isinstance(value, int) and abs(value) >= 2**63:
        bounds, wrong = bounds.replace("inf)", f"{2**63 - 1}]"), True
    elif bounds and isinstance(value, int | float):
        low, high = (int(text) if text.isdecimal() else float(text) for text in bounds[1:-1].split(", "))
        above = value > low if bounds[0] == "(" else value >= low
        below = value < high if bounds[-1] == ")" else value <= high
        wrong = not (above and below)
    if wrong:
        found = "nothing" if value == "" else shown(value)
        raise ConfigError(f"{flag_of(name)} must be {_wanted(hint, bounds)}, got {found}")
