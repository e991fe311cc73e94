"""The attributes of an object as they were at one moment: the names of those that differ now, and putting them back.

A model that counts its calls, or a trainer that keeps something by client, hands it from one client to the next: what a
client comes to then depends on those trained before it, and so on the number of ranks. Attributes are all that can be
seen of this: numbers, text, tensors, arrays, random generators, containers and objects of these. What is in globals,
closures, iterators, files and objects of other people's libraries is out of sight.
"""

from __future__ import annotations

import argparse
import functools
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Callable, Iterator, MutableMapping
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmpi.core.contents import MUTABLE, ClassFields, SlotFields, equal

_DEEPEST = 100
"""Levels of objects within objects; further down only their identity counts."""

_PLAIN = (int, float, complex, str, bytes, np.generic, frozenset)
_TORCHS_OWN = frozenset(
    {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"}
)  # hooks of a module are attributes like others: one that a forward pass adds would be there for the next client
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_OPENED = (
    nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, SimpleNamespace, argparse.Namespace,
    UserDict, UserList, ChainMap, functools.partial, FunctionType, MethodType,
)  # fmt: skip


class Attributes:
    """The attributes of a model, or of another object, as they were when this was made."""

    def __init__(self, model: nn.Module, owner: object | None = None, apart: frozenset[str] = frozenset()) -> None:
        """Look through the attributes of `model`, or through those of `owner`.

        Args:
            model: the module; its parameters and buffers do not count.
            owner: an object that holds the model; None: the model and its sub-modules.
            apart: names of attributes of `owner` that do not count.
        """
        modules = dict(model.named_modules())
        parts = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        walk = _Walk({id(part) for part in (*modules.values(), *parts.values())}, owner is None)
        if owner is not None:
            walk.package = _package(owner)
            self._kept = list(walk.fields("", owner, apart))
        else:
            walk.package = _package(model)
            self._kept = [pair for name, module in modules.items() for pair in walk.fields(name, module, _TORCHS_OWN)]
        for name, part in parts.items():
            self._kept.append((name, _Fields(_dict_of(part), frozenset(), walk)))
            self._kept.append((name, _TensorHooks(part)))

    def changed(self) -> list[str]:
        """Names of the attributes that differ now; a tensor where there was none is a kept activation and not named."""
        return [name for prefix, kept in self._kept for name in kept.names(prefix)]

    def put_back(self, seed: int | None = None) -> None:
        """Make all attributes what they were; with `seed`, random generators are seeded instead."""
        for _, kept in self._kept:
            kept.put_back(seed)


class _Walk:
    """Objects met on the way through the attributes."""

    def __init__(self, known: set[int], activations: bool) -> None:
        self.known, self.package, self.depth = known, "", 0
        self.activations = activations  # a tensor where there was none is no change

    def fields(self, name: str, value: object, apart: frozenset[str] = frozenset()) -> Iterator[tuple[str, _Kept]]:
        """`value`'s attributes under its name: its own, those in slots, and those of its user's classes."""
        if hasattr(value, "__dict__"):
            yield name, _Fields(_dict_of(value), apart, self)
        if isinstance(value, functools.partial):
            inside = {"func": value.func, "args": value.args, "keywords": value.keywords}
            yield name, _Fields(inside, frozenset(), self)
        if isinstance(value, MethodType):
            yield name, _Fields({"self": value.__self__}, frozenset(), self)
        for cls in filter(self._is_users, type(value).__mro__):
            yield name, _Fields(SlotFields(value, cls), apart, self)
            if id(cls) not in self.known:
                self.known.add(id(cls))
                yield name, _Fields(ClassFields(cls), apart, self)
                methods = [item for item in vars(cls).values() if isinstance(item, FunctionType)]
                defaults = {method.__name__: (method.__defaults__, method.__kwdefaults__) for method in methods}
                yield name, _Fields(defaults, frozenset(), self)

    def keep(self, value: Any) -> _Kept:
        """`value` as it is now. What was met before counts by identity, so that circles end."""
        if isinstance(value, _PLAIN) or id(value) in self.known or self.depth > _DEEPEST:
            return _Same(value)
        for kind, read, write in MUTABLE:
            if isinstance(value, kind) and read(value) is not None:
                self.known.add(id(value))
                return _Copied(value, read, write)
        if not (isinstance(value, list | tuple | dict | deque) or self._opens(value)):
            return _Same(value)
        self.known.add(id(value))
        self.depth += 1
        try:
            if isinstance(value, list | tuple | dict | deque):
                return _Container(value, self)
            return _Object(value, self)
        finally:
            self.depth -= 1

    def _opens(self, value: Any) -> bool:
        """Return True for an object of the user's own class, or of a class of torch's that has state."""
        return isinstance(value, _OPENED) or (not isinstance(value, type) and self._is_users(type(value)))

    def _is_users(self, cls: type) -> bool:
        name = cls.__module__
        if name.partition(".")[0] == self.package:
            return True
        file = getattr(sys.modules.get(name), "__file__", None)
        return file is not None and not file.startswith(_LIBRARIES) and not name.startswith("fedmpi.")


class _Kept(ABC):
    """A value as it was."""

    value: Any

    def names(self, prefix: str) -> Iterator[str]:
        """Names of what differs; `prefix` is the value's own."""
        if self.differs(self.value):
            yield prefix

    @abstractmethod
    def differs(self, now: Any) -> bool:
        """Return True if `now` is something else than the value was."""

    @abstractmethod
    def put_back(self, seed: int | None) -> Any:
        """Make the value what it was; returns it."""


class _Same(_Kept):
    """An immutable value, or an object that is not looked into."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def differs(self, now: Any) -> bool:
        if now is self.value:
            return False
        alike = type(now) is type(self.value) and isinstance(now, _PLAIN)
        return not (alike and (now == self.value or (now != now and self.value != self.value)))  # NaN is NaN

    def put_back(self, seed: int | None) -> Any:
        return self.value


class _Copied(_Kept):
    """A mutable value and a copy of its content."""

    def __init__(self, value: Any, read: Callable[[Any], Any], write: Callable[[Any, Any, int | None], Any]) -> None:
        self.value, self._read, self._write = value, read, write
        self._content = read(value)

    def differs(self, now: Any) -> bool:
        return type(now) is not type(self.value) or not equal(self._read(now), self._content)

    def put_back(self, seed: int | None) -> Any:
        if seed is not None or self.differs(self.value):
            self._write(self.value, self._content, seed)
        return self.value


class _Container(_Kept):
    """A list, tuple, deque or dict."""

    def __init__(self, value: Any, walk: _Walk) -> None:
        self.value = value
        self._items = {key: walk.keep(item) for key, item in _items(value)}

    def differs(self, now: Any) -> bool:
        if type(now) is not type(self.value):
            return True
        items = dict(_items(now))
        return list(items) != list(self._items) or any(kept.differs(items[key]) for key, kept in self._items.items())

    def put_back(self, seed: int | None) -> Any:
        before = {key: kept.put_back(seed) for key, kept in self._items.items()}
        now = dict(_items(self.value))
        if list(now) != list(before) or any(now[key] is not item for key, item in before.items()):
            self.value.clear()
            self.value.update(before) if isinstance(self.value, dict) else self.value.extend(before.values())
        return self.value


class _Fields(_Kept):
    """Attributes by name."""

    def __init__(self, value: MutableMapping[str, Any], apart: frozenset[str], walk: _Walk) -> None:
        self.value, self._apart, self._activations = value, apart, walk.activations
        self._items = {name: walk.keep(item) for name, item in value.items() if name not in apart}

    def names(self, prefix: str) -> Iterator[str]:
        dot = f"{prefix}." if prefix else ""
        for name, kept in self._items.items():
            now = self.value.get(name)
            activation = self._activations and isinstance(now, Tensor) and kept.value is None
            if (name not in self.value or kept.differs(now)) and not activation:
                yield dot + name
        for name in self._new():
            if not (self._activations and isinstance(self.value[name], Tensor)):
                yield dot + name

    def differs(self, now: Any) -> bool:
        return any(True for _ in self.names(""))

    def put_back(self, seed: int | None) -> Any:
        for name in self._new():
            del self.value[name]
        for name, kept in self._items.items():
            before = kept.put_back(seed)
            if self.value.get(name, self) is not before:
                self.value[name] = before
        return self.value

    def _new(self) -> list[str]:
        return [name for name in self.value if name not in self._items and name not in self._apart]


class _TensorHooks(_Kept):
    """The hooks of a parameter or buffer."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._before = self._hooks()

    def _hooks(self) -> list[dict[int, Any]]:
        return [
            dict(getattr(self.value, name, None) or {}) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
        ]

    def names(self, prefix: str) -> Iterator[str]:
        if self.differs(self.value):
            yield f"hooks of {prefix}"

    def differs(self, now: Any) -> bool:
        return self._hooks() != self._before

    def put_back(self, seed: int | None) -> Any:
        if self.differs(self.value):
            for name, before in zip(("_backward_hooks", "_post_accumulate_grad_hooks"), self._before, strict=True):
                held = getattr(self.value, name, None)
                if held is not None:
                    held.clear()
                    held.update(before)
        return self.value


class _Object(_Kept):
    """An object with attributes of its own."""

    def __init__(self, value: Any, walk: _Walk) -> None:
        self.value = value
        self._inside = [kept for _, kept in walk.fields("", value)]

    def differs(self, now: Any) -> bool:
        return now is not self.value or any(kept.differs(now) for kept in self._inside)

    def put_back(self, seed: int | None) -> Any:
        for kept in self._inside:
            kept.put_back(seed)
        return self.value


def _items(container: Any) -> Iterator[tuple[Any, Any]]:
    return iter(container.items()) if isinstance(container, dict) else enumerate(container)


def _dict_of(value: object) -> dict[str, Any]:
    held: dict[str, Any] = getattr(value, "__dict__")  # noqa: B009  # by its name mypy takes it for a read-only view
    return held


def _package(value: object) -> str:
    """The user's own top-level package or module; empty for a class of torch's."""
    name = type(value).__module__.partition(".")[0]
    return "" if name == "torch" else name
