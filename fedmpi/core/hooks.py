"""Proofs that torch runs its own modules as they are written: nothing hooks into them, here or anywhere in the process.

Each function returns None, or the first reason against it, as the end of a sentence.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._device import DeviceContext

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip

_USED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (nn.Module, ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")),
    (nn.Sequential, ("__call__", "forward", "__iter__")),
    *((layer, ("__call__", "forward")) for layer in (nn.Linear, nn.ReLU, nn.MaxPool2d, nn.Flatten)),
    (nn.Conv2d, ("__call__", "forward", "_conv_forward")),
    (functional, ("linear", "conv2d", "relu", "relu_", "max_pool2d", "cross_entropy")),
    (torch, ("relu", "relu_", "conv2d", "max_pool2d", "flatten")),
    (Tensor, ("flatten", "relu", "relu_")),
)
"""What a stack of layers under cross-entropy calls."""


def process_reason() -> str | None:
    """Something in this process that changes what torch's functions or modules do."""
    module = torch.nn.modules.module
    if any(getattr(module, f"_global{name}", None) for name in _HOOKS):
        return "a hook on all modules is registered"
    for owner, names in _USED:
        for name in names:
            if not _is_torchs(getattr(owner, name, None)):
                return f"{owner.__name__}.{name} is not torch's own"
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]  # torch leaves it so
    if any(type(mode) is not DeviceContext for mode in modes):
        return "a torch function mode is active"
    if torch._C._len_torch_dispatch_stack():
        return "a torch dispatch mode is active"
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        return "autocast is on"
    if _saves_through_hooks():
        return "hooks on saved tensors are active"
    return None


def module_reason(name: str, module: nn.Module) -> str | None:
    """A hook, or an attribute of this very object that stands in for one of its class."""
    own = vars(module)
    if any(own.get(hooks) for hooks in _HOOKS):
        return f"{name} has a hook"
    for key in own:
        if hasattr(type(module), key):
            return f"{name} has a {key} of its own"
    return None


def tensor_reason(name: str, tensor: Tensor) -> str | None:
    """A hook on a parameter, or a parameter of another class than torch's."""
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        return f"{name} has a hook"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"{name} is a {type(tensor).__name__}"
    return None


def _is_torchs(function: object) -> bool:
    """Return True for a builtin, or a Python function defined in torch; a wrapper around one is neither."""
    if isinstance(function, types.FunctionType):
        return str(function.__globals__.get("__name__")).partition(".")[0] == "torch"
    return isinstance(function, types.BuiltinFunctionType | types.MethodDescriptorType)


def _saves_through_hooks() -> bool:
    """By a trial: a saved tensor takes no hooks when it has been saved through some."""
    with torch.enable_grad():
        probe = torch.ones(1, dtype=torch.float32, device="cpu", requires_grad=True).exp()
    saved: Any = probe.grad_fn
    try:
        saved._raw_saved_result.register_hooks(lambda tensor: tensor, lambda tensor: tensor)
    except RuntimeError:
        return True
    return False
