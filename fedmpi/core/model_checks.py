"""Refusals of models whose tensors cannot become views of one vector, or cannot be saved; each names the part."""

from __future__ import annotations

import dataclasses
import sysconfig
import traceback
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fedmpi.errors import ModelError

LIBRARIES = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
"""Folders of installed packages, torch's among them."""


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be trained as one vector; call it before the model is moved or flattened.

    Raises:
        ModelError: names the tensor or the module, and says what to do.
    """
    for name, tensor in named_tensors(model):
        _check_tensor(name, tensor)
    _check_memory(model)
    check_state(model)


def check_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, of tensors only; nothing is copied.

    Raises:
        ModelError: names the entry that is no plain tensor.
    """
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ModelError(
                f"module {name!r} ({type(module).__name__}) has get_extra_state(), which fedmpi neither sends nor saves"
                ": keep it in buffers"
            )
    try:
        state: dict[str, object] = model.state_dict()
    except Exception as error:  # a user's hook may raise anything
        raise ModelError(f"the model's state_dict() fails: {describe_error(error)}") from error
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(f"the model's state_dict() has {name!r}, a {type(value).__name__}: only tensors are saved")
        _check_tensor(name, value)
    return state  # type: ignore[return-value]  # tensors only, as just checked


def is_entry(tensor: Tensor) -> bool:
    """Return True for what the vector holds: trainable parameters and float buffers."""
    if isinstance(tensor, nn.Parameter):
        return tensor.requires_grad
    return tensor.is_floating_point() or tensor.is_complex()


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, each object once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's values as bytes, in the order of its indices, for any dtype."""
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return dense.view(torch.uint8).numpy().data


def describe_error(error: Exception) -> str:
    """The error in one line, with the last place in the user's own code."""
    text = "".join(char if char.isprintable() else " " for char in str(error))
    text = " ".join(text.split())
    text = text if len(text) <= 300 else text[:297] + "..."
    ours = str(Path(__file__).parents[1])
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((ours, *LIBRARIES, "<"))
    ]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {text}{place}"


def _check_tensor(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise ModelError(f"{name!r} has no shape yet (a lazy module): run one forward pass in the model's function")
    kind = _odd_kind(tensor)
    if kind is not None:
        raise ModelError(f"{name!r} is {kind}: fedmpi sends and saves plain dense tensors only")


def _odd_kind(tensor: Tensor) -> str | None:
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}"
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.").replace("_", " ")
    if tensor.device.type == "meta":
        return "on the meta device, without values"
    return None


def _check_memory(model: nn.Module) -> None:
    """Refuse memory shared in another way than by one parameter object: as views of the vector it would come apart."""
    tensors = list(named_tensors(model))
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        if tensor.numel():
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    for group in by_storage.values():
        if any(is_entry(tensor) for _, tensor in group):
            _check_overlap(group)
    known = {id(tensor) for _, tensor in tensors}
    for name, value in _tensor_attributes(model):
        if id(value) not in known and value.layout is torch.strided and value.numel():
            for other, tensor in by_storage.get(value.untyped_storage().data_ptr(), ()):
                if is_entry(tensor) and _overlap(value, tensor):
                    raise ModelError(
                        f"attribute {name!r} shares memory with {other!r}, which fedmpi moves into one vector: compute"
                        " it in forward()"
                    )


def _check_overlap(group: list[tuple[str, Tensor]]) -> None:
    ordered = sorted(group, key=lambda pair: pair[1].data_ptr())
    for i, (name, tensor) in enumerate(ordered):
        if is_entry(tensor) and _span(tensor) < tensor.numel():
            raise ModelError(f"{name!r} repeats its own memory (expand): use .contiguous(), or expand it in forward()")
        for other, later in ordered[i + 1 :]:
            if later.data_ptr() >= tensor.data_ptr() + _span(tensor) * tensor.element_size():
                break
            if (is_entry(tensor) or is_entry(later)) and _overlap(tensor, later):
                raise ModelError(
                    f"{name!r} and {other!r} share memory but are two tensors (a transpose, a view): tie them by one"
                    " parameter object, or compute one of them in forward()"
                )


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last in memory, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return True if an element of one, in the same storage, is also one of the other."""
    ranges = sorted((t.data_ptr(), t.data_ptr() + _span(t) * t.element_size()) for t in (one, other))
    if ranges[1][0] >= ranges[0][1]:
        return False
    if one.element_size() != other.element_size():
        return True
    start = int(min(one.storage_offset(), other.storage_offset()))
    stop = int(max(t.storage_offset() + _span(t) for t in (one, other)))
    marks = torch.zeros(stop - start, dtype=torch.bool, device="cpu")
    _view(marks, one, start).fill_(True)
    return bool(_view(marks, other, start).any())


def _view(marks: Tensor, tensor: Tensor, start: int) -> Tensor:
    size = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return marks.as_strided(size, tensor.stride(), tensor.storage_offset() - start)


def _tensor_attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors among the plain attributes, also in containers, and in objects that hold nothing but attributes."""
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                for tensor in _tensors_in(value):
                    yield f"{prefix}.{key}".lstrip("."), tensor


def _tensors_in(value: object) -> Iterator[Tensor]:
    todo, seen = [value], set[int]()
    while todo:
        item: Any = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if not nn.parameter.is_lazy(item):
                yield item
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple | set | deque):
            todo += item
        elif isinstance(item, SimpleNamespace) or dataclasses.is_dataclass(item):
            todo += getattr(item, "__dict__", {}).values()
