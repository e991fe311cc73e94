"""Models by name. A model is a function (input_shape, num_classes) -> nn.Module, and an entry in MODELS."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from fedmpi.core.errors import ConfigError, ModelError
from fedmpi.models.cnn import cnn, cnn_fedlab
from fedmpi.models.mlp import logistic, two_nn

ModelFunction = Callable[[tuple[int, ...], int], nn.Module]

MODELS: dict[str, ModelFunction] = {"2nn": two_nn, "cnn": cnn, "cnn_fedlab": cnn_fedlab, "logistic": logistic}


def build_model(name: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The model `name` for inputs of `input_shape`.

    Args:
        name: a key of MODELS, or "module:function" with the module found as `python -m` would find it.
        input_shape: shape of one sample, (C, H, W) or (D,).
        num_classes: size of the output.

    Raises:
        ConfigError: there is no such model.
        ModelError: the model does not fit the input.
    """
    module = _function(name)(input_shape, num_classes)
    if not isinstance(module, nn.Module):
        raise ModelError(f"--model {name} must return a torch.nn.Module, got a {type(module).__name__}")
    return module


def check_model_name(name: str) -> None:
    """Refuse what can be refused without importing anything.

    Raises:
        ConfigError: `name` is neither in MODELS nor of the form module:function.
    """
    if name not in MODELS and not all(name.partition(":")):
        raise ConfigError(f"--model must be {', '.join(MODELS)} or module:function, got {name}")


def _function(name: str) -> ModelFunction:
    check_model_name(name)
    if name in MODELS:
        return MODELS[name]
    module_name, _, function_name = name.partition(":")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, something it imports is not: the traceback says it best
        raise ConfigError(f"--model {name}: there is no module {module_name!r} here or in PYTHONPATH") from error
    except AttributeError as error:
        raise ConfigError(f"--model {name}: module {module_name!r} has no {function_name!r}") from error
    if not callable(function):
        raise ConfigError(f"--model {name}: {function_name!r} is not a function (input_shape, num_classes) -> Module")
    return function  # type: ignore[no-any-return]  # checked as far as can be
