"""Models by name. A model is a function (input_shape, num_classes) -> nn.Module, and an entry in MODELS."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import nn

from fedmpi.core.model_checks import describe_error
from fedmpi.errors import ConfigError, FedmpiError, ModelError
from fedmpi.imports import import_name
from fedmpi.models.cnn import cnn, cnn_fedlab
from fedmpi.models.mlp import logistic, two_nn

ModelFunction = Callable[[tuple[int, ...], int], nn.Module]

MODELS: dict[str, ModelFunction] = {"2nn": two_nn, "cnn": cnn, "cnn_fedlab": cnn_fedlab, "logistic": logistic}


def build_model(name: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The model `name` for inputs of `input_shape`.

    Args:
        name: a key of MODELS, or "module:function" with the module found as `python -m` would find it, or a file.
        input_shape: shape of one sample, (C, H, W) or (D,).
        num_classes: size of the output.

    Raises:
        ConfigError: there is no such model.
        ModelError: the model does not fit the input, or its function fails.
    """
    function = model_function(name)
    call = f"{name.rpartition(':')[2]}({input_shape}, {num_classes})"
    try:
        inspect.signature(function).bind(input_shape, num_classes)
    except TypeError as error:
        raise ConfigError(
            f"--model {name} must take (input_shape, num_classes): {call} does not fit it ({error})"
        ) from error
    except ValueError:  # a builtin that does not tell
        pass
    try:
        with _plain_defaults() if name in MODELS else contextlib.nullcontext():
            module = function(input_shape, num_classes)
    except FedmpiError:
        raise
    except Exception as error:
        raise ModelError(f"--model {name}: {call} fails: {describe_error(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"--model {name} must return a torch.nn.Module, got a {type(module).__name__}")
    return module


@contextlib.contextmanager
def _plain_defaults() -> Iterator[None]:
    """Around models of our own: float32 on CPU, whatever a user's module has set for its own."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(default)


def check_model_name(name: str) -> None:
    """Refuse what can be refused without importing anything.

    Raises:
        ConfigError: `name` is neither in MODELS nor of the form module:function.
    """
    if name not in MODELS and not all(name.rpartition(":")):
        raise ConfigError(f"--model must be {', '.join(MODELS)} or module:function, got {name}")


def model_function(name: str) -> ModelFunction:
    """The function behind `--model`.

    Raises:
        ConfigError: there is none.
    """
    check_model_name(name)
    if name in MODELS:
        return MODELS[name]
    function_name = name.rpartition(":")[2]
    function = import_name(f"--model {name}", name)
    if isinstance(function, nn.Module) or not callable(function):
        raise ConfigError(
            f"--model {name}: {function_name!r} is not a function (input_shape, num_classes) -> Module but a"
            f" {type(function).__name__}"
        )
    return function  # type: ignore[no-any-return]  # checked as far as can be
