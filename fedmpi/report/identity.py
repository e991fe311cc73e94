"""Identity of what a user brings to a run: the model, part by part, and the source files of the user's functions."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedmpi.core.model_checks import bytes_of
from fedmpi.lifecycle.files import sha256_of

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_MOST_PARTS = 2000
_MOST_SOURCE_BYTES = 2**24
_NOT_THE_USERS = ("fedmpi.", "torch.", "torchvision.", "numpy.", "builtins.", "abc.", "typing.", "functools.")


def identity(algorithm: str, model: nn.Module) -> dict[str, dict[str, object]]:
    """What makes a run this one beside options and data: the algorithm ("module:NAME") and the server's fresh model."""
    return {"algorithm": {"algorithm": algorithm}, "model": {**model_parts(model)}}


def model_parts(model: nn.Module) -> dict[str, str]:
    """What the model is, by part: two models of equal parts are built alike, but for weights that train.

    A part is a module: its type, its settings (`extra_repr`, and public attributes that are numbers, text, functions or
    tuples and lists of such), shape and dtype of its tensors, and the beginning of the SHA-256 of
    parameters that do not train.
    """
    parts = {name or "(whole)": _part(module) for name, module in model.named_modules(remove_duplicate=False)}
    if len(parts) <= _MOST_PARTS:
        return parts
    digest = hashlib.sha256("\n".join(f"{name}: {text}" for name, text in parts.items()).encode())
    return {f"all {len(parts)}": digest.hexdigest()}


def _part(module: nn.Module) -> str:
    settings = [f"{name}={text}" for name, value in sorted(vars(module).items()) if (text := _setting(name, value))]
    tensors = [
        f"{name} {_kind(param)}" + ("" if param.requires_grad else f" frozen {_sha256(param)}")
        for name, param in module.named_parameters(recurse=False)
    ]
    tensors += [f"{name} {_kind(buffer)}" for name, buffer in module.named_buffers(recurse=False)]
    text = f"{_name(type(module))}({_ADDRESS.sub('0x', module.extra_repr())})"
    return "; ".join([text, *settings, *tensors])


def _setting(name: str, value: object) -> str:
    """The value of a setting as text; empty: it is none."""
    return "" if name.startswith("_") or name == "training" else _plain(value)


def _plain(value: object, depth: int = 0) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return repr(value)
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.requires_grad:
        return f"{_kind(value)} {_sha256(value)}"
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
        return _name(value)
    if isinstance(value, set | frozenset):
        value = sorted(value, key=repr)
    if isinstance(value, dict):
        value = [pair for items in value.items() for pair in items]
    if isinstance(value, list | tuple) and depth < 3:
        items = [_plain(item, depth + 1) for item in value]
        return f"[{', '.join(items)}]" if all(items) else ""
    return ""


def _name(thing: object) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _kind(tensor: object) -> str:
    shape, dtype = getattr(tensor, "shape", ()), getattr(tensor, "dtype", "")
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _sha256(param: torch.Tensor) -> str:
    return hashlib.sha256(bytes_of(param)).hexdigest()[:16]


def functions_of(function: object | None, model: nn.Module) -> list[object]:
    """A user's function behind `--model`, if there is one, and the classes of the parts of the model it made."""
    return [*([function] if function else []), *dict.fromkeys(type(part) for part in model.modules())]


def sources(functions: Mapping[str, Iterable[object]]) -> dict[str, dict[str, str]]:
    """Source file and SHA-256 of what is the user's among `functions` (role -> functions and classes), by role.

    A class stands for those it is derived from too. A role with several files gets a number behind its name.
    """
    found: dict[str, dict[str, str]] = {}
    for role, things in functions.items():
        files: list[Path] = []
        for thing in things:
            files += [path for path in _files(thing) if path not in files]
        for i, path in enumerate(files):
            found[role if i == 0 else f"{role} {i + 1}"] = {"file": str(path), "sha256": _file_sha256(path)}
    return found


def _files(thing: object) -> list[Path]:
    while isinstance(thing, functools.partial):
        thing = thing.func
    thing = inspect.unwrap(thing) if callable(thing) else thing
    files = []
    for part in thing.__mro__ if isinstance(thing, type) else (thing,):
        module = part.__name__ if isinstance(part, types.ModuleType) else getattr(part, "__module__", None)
        if f"{module}.".startswith(_NOT_THE_USERS):
            continue
        try:
            path = inspect.getsourcefile(part)  # type: ignore[arg-type]  # of any object: a TypeError says that it has none
        except TypeError:
            continue
        if path:
            files.append(Path(path).absolute())
    return files


def _file_sha256(path: Path) -> str:
    try:
        return sha256_of(path, _MOST_SOURCE_BYTES)
    except OSError:
        return "unreadable"
