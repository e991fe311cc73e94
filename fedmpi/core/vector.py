"""The model as one flat vector: the module's tensors are views into it, so MPI reads and writes the model in place.

Layout of the (P,) float32 vector: trainable parameters in `model.parameters()` order (tied ones once), then float
buffers (BatchNorm statistics) in `model.buffers()` order. Parameters with `requires_grad=False` are not in it: they are
the same on every rank and never travel. Integer and bool buffers travel apart, as (B,) int64 (`integer_state`): a
client starts from the server's, and the server keeps the largest value any client of the cohort came to, so that
BatchNorm's `num_batches_tracked` stays an int64 that counts the most steps taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmpi.core.model_checks import bytes_of, check_model, check_state, is_entry, named_tensors
from fedmpi.core.segments import Extra, Layout
from fedmpi.core.views import remember_views
from fedmpi.errors import ModelError


class SerializationTool:
    """FedLab's name for moving a model into and out of one vector."""

    @staticmethod
    def serialize_model(model: nn.Module) -> Tensor:
        """A copy of the model as a (P,) float32 vector, trainable parameters first, then float buffers."""
        return torch.cat([t.detach().reshape(-1) for _, t in _entries(model)])

    @staticmethod
    def serialize_model_gradients(model: nn.Module) -> Tensor:
        """A copy of the trainable parameters' gradients, in the order of the vector; zeros where there is none."""
        grads = ((p, p.grad) for _, p in _trainable(model))
        return torch.cat([(torch.zeros_like(p) if g is None else g).detach().reshape(-1) for p, g in grads])

    @staticmethod
    def deserialize_model(
        model: nn.Module, serialized_parameters: Tensor, mode: Literal["copy", "add", "sub"] = "copy"
    ) -> None:
        """Write a (P,) vector into the model, in place.

        Args:
            model: the module.
            serialized_parameters: (P,), of any dtype; values are rounded to float32 as they are written.
            mode: overwrite, add to the model, or subtract from it.

        Raises:
            ValueError: there is no such mode.
            ModelError: the vector has another length than the model.
        """
        if mode not in ("copy", "add", "sub"):
            raise ValueError(f"mode must be 'copy', 'add' or 'sub', got {mode!r}")
        entries = list(_entries(model))
        want = sum(t.numel() for _, t in entries)
        if serialized_parameters.numel() != want:
            raise ModelError(f"the model has {want} vector entries, the vector {serialized_parameters.numel()}")
        pieces = torch.split(serialized_parameters, [t.numel() for _, t in entries])
        with torch.no_grad():
            for (_, tensor), piece in zip(entries, pieces, strict=True):
                value = piece.view_as(tensor)
                if mode == "copy":
                    tensor.copy_(value)
                else:
                    tensor.add_(value, alpha=1 if mode == "add" else -1)


def layout_of(model: nn.Module, extra: Extra | None = None) -> Layout:
    """Return the layout of a model's flat vector.

    Raises:
        ConfigError: a segment of `extra` cannot be.
    """
    num_entries = sum(tensor.numel() for _, tensor in _entries(model))
    return Layout(num_trainable(model), num_entries - num_trainable(model), extra)


def flatten(model: nn.Module, layout: Layout | None = None) -> Tensor:
    """Make the model's trainable parameters and float buffers views into one float32 vector; return it.

    It is (P,), or (V,) with `layout`, zero outside the model's range.

    The parameters stay the same objects, so an optimizer made before still holds them. Flattening twice is harmless.

    Raises:
        ModelError: names what cannot be a view or cannot be saved, or says that nothing is trainable.
    """
    check_model(model)
    entries = list(_entries(model))
    for name, tensor in entries:
        if tensor.dtype != torch.float32:
            dtype = str(tensor.dtype).removeprefix("torch.")
            mend = "keep its real and imaginary parts in two" if tensor.is_complex() else "return model.float()"
            raise ModelError(f"{name!r} is {dtype}; fedmpi trains float32: {mend}")
    if num_trainable(model) == 0:
        raise ModelError("the model has no trainable parameter (requires_grad=True)")
    vector = SerializationTool.serialize_model(model)
    flat = vector
    if layout is not None and layout.size != len(vector):
        flat = vector.new_zeros(layout.size)
        flat[layout.vector] = vector
        vector = flat[layout.vector]
    offset = 0
    for _, tensor in entries:
        tensor.data = vector[offset : offset + tensor.numel()].view(tensor.shape)
        offset += tensor.numel()
    remember_views(model, vector)
    return flat


def num_trainable(model: nn.Module) -> int:
    """T, the entries at the front of the vector that training may change by a gradient."""
    return sum(p.numel() for _, p in _trainable(model))


def integer_state(model: nn.Module) -> NDArray[np.int64]:
    """(B,) int64: all integer and bool buffers, one after the other."""
    tensors = [t.detach().reshape(-1).to("cpu", torch.int64) for t in _integer_buffers(model)]
    return torch.cat(tensors).numpy() if tensors else np.empty(0, np.int64)


def load_integer_state(model: nn.Module, state: NDArray[np.int64]) -> None:
    """Write a (B,) `integer_state` back; each buffer keeps its dtype."""
    offset = 0
    for tensor in _integer_buffers(model):
        piece = torch.from_numpy(np.ascontiguousarray(state[offset : offset + tensor.numel()]))
        tensor.copy_(piece.view(tensor.shape))
        offset += tensor.numel()


def model_facts(model: nn.Module) -> dict[str, object]:
    """Return what must be alike on all ranks before a vector is sent: names, shapes, dtypes, and the frozen values."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if isinstance(tensor, nn.Parameter) and not is_entry(tensor):  # integer buffers come with every order
            digest.update(bytes_of(tensor))
    return {"parameter count": sum(t.numel() for _, t in _entries(model)), "model layout": digest.hexdigest()[:16]}


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as plain tensors on CPU, in memory of their own: what model.pt holds.

    Raises:
        ModelError: names what cannot be saved; `flatten` has then said so at the start.
    """
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in check_state(model).items()}


def vector_hash(state: dict[str, Tensor]) -> str:
    """The first 16 hex digits of SHA-256 over a state dict's values in key order: two runs with equal bits share it."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(bytes_of(state[key]))
    return digest.hexdigest()[:16]


def _trainable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _entries(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in named_tensors(model) if is_entry(tensor))


def _integer_buffers(model: nn.Module) -> Iterable[Tensor]:
    return (b for b in model.buffers() if not is_entry(b))
