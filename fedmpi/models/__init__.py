"""Models by name. A model is a function (input_shape, num_classes) -> nn.Module, and an entry in MODELS."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from fedmpi.core.model_checks import describe_error
from fedmpi.errors import ConfigError, FedmpiError, ModelError
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
    module_name, _, function_name = name.rpartition(":")
    if module_name.startswith(".") and not module_name.endswith(".py"):
        raise ConfigError(f"--model {name}: a file of your own ends in .py: {module_name}.py:{function_name}")
    try:
        module = _module_of(name, module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, something it imports is not: the traceback says it best
        raise ConfigError(f"--model {name}: there is no module {module_name!r} here or in PYTHONPATH") from error
    if not hasattr(module, function_name):
        raise ConfigError(f"--model {name}: module {module_name!r} has no {function_name!r}")
    function = getattr(module, function_name)
    if isinstance(function, nn.Module) or not callable(function):
        raise ConfigError(
            f"--model {name}: {function_name!r} is not a function (input_shape, num_classes) -> Module but a"
            f" {type(function).__name__}"
        )
    return function  # type: ignore[no-any-return]  # checked as far as can be


def _module_of(name: str, module_name: str) -> ModuleType:
    """The module, imported by its name or from its file."""
    if not module_name.endswith(".py"):
        if str(Path.cwd()) not in sys.path and "" not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(module_name)
    path = Path(module_name).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"--model {name}: there is no file {path}")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # a .py file always has one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # for what it imports itself
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
