"""A check that a model's tensors still are the views of one vector that `flatten` made them."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

from torch import Tensor, nn

from fedmpi.core.model_checks import bytes_of, is_entry
from fedmpi.errors import ModelError

Registry = dict[str, Any]
"""A module's dict of parameters, buffers or modules."""


def remember_views(model: nn.Module, vector: Tensor) -> None:
    """Note where every tensor of a flattened model is registered and lies, for `check_views`.

    Raises:
        ModelError: one is also part of another flattened model, which it has just left.
    """
    views = _Views(model, vector)
    for other, others in _views.items():
        shared = [name for part, name in views.entries.items() if part in others.entries]
        if other is not model and shared:
            raise ModelError(
                f"{shared[0]!r} is part of two models: the model's function must make new modules at each call"
            )
    _views[model] = views


def check_views(model: nn.Module, vector: Tensor | None = None) -> None:
    """Make sure that the model's tensors still are those that `flatten` made views, each at its place.

    A forward pass may replace them: `self.scale = ...`, `weight.data = ...`, a new `nn.Parameter`. From then on what is
    sent is not what is trained. Costs a few comparisons per tensor.

    Args:
        model: the module.
        vector: what `flatten` returned for it, to see that it was not flattened again since; None: not asked.

    Raises:
        ModelError: names the tensor, and says what to do; or `flatten` has never seen this model.
    """
    views = _views.get(model)
    if views is None:
        raise ModelError(f"the trainer's model is now another {type(model).__name__} than the one it was made with")
    if vector is not None and views.start != vector.data_ptr():
        raise ModelError(f"the {type(model).__name__} was given to a second trainer or server: make a model for each")
    views.check()


class _Views:
    def __init__(self, model: nn.Module, vector: Tensor) -> None:
        self.start = vector.data_ptr()
        self.entries: dict[int, str] = {}  # names by id; the tensors live as long as this does
        self._modules: list[tuple[Registry, str, Any, str]] = []  # also what is None
        self._tensors: list[tuple[Registry, str, Tensor, int, tuple[int, ...], bool, str]] = []
        self._frozen: list[tuple[str, Tensor, bytes]] = []
        self._others: list[tuple[Registry, str, Tensor, str]] = []  # integer buffers, which are copied in and out
        self._lengths: list[tuple[Registry, int, str]] = []
        for prefix, module in model.named_modules():
            for registry in (module._modules, module._parameters, module._buffers):
                self._lengths.append((registry, len(registry), prefix))
                for key, part in registry.items():
                    self._note(registry, key, part, f"{prefix}.{key}".lstrip("."))

    def _note(self, registry: Registry, key: str, part: Any, name: str) -> None:
        if not isinstance(part, Tensor):
            self._modules.append((registry, key, part, name))
        elif is_entry(part) or isinstance(part, nn.Parameter):
            self._tensors.append((registry, key, part, part.data_ptr(), part.stride(), part.requires_grad, name))
            if is_entry(part):
                self.entries[id(part)] = name
            else:
                self._frozen.append((name, part, _digest(part)))
        else:
            self._others.append((registry, key, part, name))

    def check(self) -> None:
        for registry, key, tensor, address, stride, trained, name in self._tensors:
            current = registry.get(key)
            if current is not tensor:
                if not isinstance(current, Tensor) or isinstance(tensor, nn.Parameter):
                    raise _replaced(name)
                if (current.dtype, current.shape) != (tensor.dtype, tensor.shape):
                    raise _replaced(name)
                tensor = current
            if tensor.data_ptr() != address or tensor.stride() != stride:
                raise _replaced(name)
            if tensor.requires_grad != trained:
                raise ModelError(f"training set {name}.requires_grad to {not trained}: leave it as it was at the start")
        for registry, key, module, name in self._modules:
            if registry.get(key) is not module:
                raise _replaced(name)
        for registry, key, tensor, name in self._others:
            current = registry.get(key)
            if not isinstance(current, Tensor) or (current.shape, current.dtype) != (tensor.shape, tensor.dtype):
                raise _replaced(name)
        for registry, length, prefix in self._lengths:
            if len(registry) != length:
                name = f"{prefix}.{next(reversed(registry), '')}".lstrip(".")
                raise ModelError(
                    f"training added or removed a part of the model ({name!r}): register all of them in the model's"
                    " function"
                )
        self._check_frozen()

    def _check_frozen(self) -> None:
        """By value: a write through `.data` leaves no other trace."""
        for name, tensor, before in self._frozen:
            if _digest(tensor) != before:
                raise ModelError(
                    f"training changed {name!r}, which has requires_grad=False and so is never sent: register it as"
                    " a buffer"
                )


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(bytes_of(tensor)).digest()


def _replaced(name: str) -> ModelError:
    return ModelError(
        f"training replaced {name!r} by another object, which fedmpi neither trains nor sends: write into the one there"
        " is (with torch.no_grad(): old.copy_(new)), or keep what is no state in a plain attribute"
    )


_views: weakref.WeakKeyDictionary[nn.Module, _Views] = weakref.WeakKeyDictionary()
