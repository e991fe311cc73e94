"""Copies of what mutable values hold (tensors, arrays, sets, random generators), and writing them back."""

from __future__ import annotations

import array
import random
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ClassFields(MutableMapping[str, Any]):
    """The attributes of a class that are no methods, properties or names with two underscores."""

    def __init__(self, cls: type) -> None:
        """Of `cls` itself, without those of its bases."""
        self._cls = cls

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, item in vars(self._cls).items() if not (name[:2] == "__" or _is_method(item))])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Any:
        return vars(self._cls)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._cls, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._cls, name)


class SlotFields(MutableMapping[str, Any]):
    """The attributes of an object that one of its classes keeps in slots."""

    def __init__(self, owner: object, cls: type) -> None:
        """Of `owner`, in the slots that `cls` itself names."""
        slots = vars(cls).get("__slots__", ())
        names = [slots] if isinstance(slots, str) else list(slots)
        self._owner, self._names = owner, [_mangled(name, cls) for name in names]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name[-2:] != "__" and hasattr(self._owner, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self._owner, name)
        except AttributeError as error:
            raise KeyError(name) from error

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._owner, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._owner, name)


def _mangled(name: str, cls: type) -> str:
    private = name[:2] == "__" and name[-2:] != "__"
    return f"_{cls.__name__.lstrip('_')}{name}" if private else name


def _is_method(item: object) -> bool:
    return isinstance(item, type) or hasattr(type(item), "__get__")


def equal(one: Any, other: Any) -> bool:
    """Return True for equal contents; of tensors and arrays the bits are compared."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.dtype, one.shape, one.device, one.layout) == (other.dtype, other.shape, other.device, other.layout)
        if alike and one.layout != torch.strided:
            one, other = one.to_dense(), other.to_dense()
        if alike and one.is_quantized:
            one, other = one.int_repr(), other.int_repr()
        return alike and torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, other)))
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()
    if isinstance(one, dict) and isinstance(other, dict):  # the state of a generator
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(equal(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


def _read_tensor(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return tensor.detach().clone()
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _set_tensor(tensor: Tensor, content: Tensor, _seed: int | None) -> None:
    alike = tensor.shape == content.shape and tensor.dtype == content.dtype
    if alike and tensor.layout == torch.strided and tensor.is_contiguous():
        tensor.data.copy_(content)
    else:
        tensor.data = content.clone()


def _read_array(values: Any) -> Any:
    """None for what cannot change: a read-only array, among them a mapped file."""
    return values.copy() if values.flags.writeable else None


def _set_array(values: Any, content: Any, _seed: int | None) -> None:
    if values.shape != content.shape:
        values.resize(content.shape, refcheck=False)
    values[...] = content


def _set_items(container: Any, content: Any, _seed: int | None) -> None:
    if isinstance(container, set):
        container.clear()
        container.update(content)
    else:
        container[:] = content


def _set_torch_generator(generator: torch.Generator, state: Tensor, seed: int | None) -> None:
    if seed is None:
        generator.set_state(state)
    else:
        generator.manual_seed(seed)


def _set_numpy_generator(generator: np.random.Generator, state: Any, seed: int | None) -> None:
    bits = generator.bit_generator
    bits.state = state if seed is None else type(bits)(seed).state


def _set_random_state(generator: np.random.RandomState, state: Any, seed: int | None) -> None:
    if seed is None:
        generator.set_state(state)
    else:
        generator.seed(seed % 2**32)


def _set_random(generator: random.Random, state: Any, seed: int | None) -> None:
    if seed is None:
        generator.setstate(state)
    else:
        generator.seed(seed)


MUTABLE: tuple[tuple[type, Callable[[Any], Any], Callable[[Any, Any, int | None], Any]], ...] = (
    (Tensor, _read_tensor, _set_tensor),
    (np.ndarray, _read_array, _set_array),
    (set, set, _set_items),
    (bytearray, bytes, _set_items),
    (array.array, lambda numbers: numbers[:], _set_items),
    (torch.Generator, torch.Generator.get_state, _set_torch_generator),
    (np.random.Generator, lambda generator: generator.bit_generator.state, _set_numpy_generator),
    (np.random.RandomState, np.random.RandomState.get_state, _set_random_state),
    (random.Random, random.Random.getstate, _set_random),
)
"""By type: a function that reads a copy of the content, and one that writes it back or seeds the generator."""
