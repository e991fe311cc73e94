"""Proofs, read off the module tree, that a model is a stack of layers whose steps can be taken by hand."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from fedmpi.core.hooks import module_reason, process_reason, tensor_reason

_PARAMETERS = {nn.Linear: ["weight", "bias"], nn.Conv2d: ["weight", "bias"]}
_KNOWN = (nn.Linear, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten)


def why_not(model: nn.Module) -> str | None:
    """Return why `model` is not known to be the plain stack of its layers; None: it is, for any input.

    Known is a Sequential, nested or not, of exactly the layers that `FusedEngine` has, each in one place, all of whose
    parameters are trained, with nothing in the tree or in the process that could change what they do.
    """
    return cannot(model) or _unproven(model)


def cannot(model: nn.Module) -> str | None:
    """Return why steps of the layers of `model` cannot be taken by hand, in whatever forward(); None: they can."""
    leaves = leaves_of(model)
    if not any(isinstance(layer, nn.Linear | nn.Conv2d) for layer in leaves):
        return "it has no Linear or Conv2d"
    for layer in leaves:
        if type(layer) not in _KNOWN:
            return f"it has a {type(layer).__name__}"
    if next(model.buffers(), None) is not None:
        return "it has buffers"
    params = [param for layer in leaves for param in layer._parameters.values() if param is not None]
    if len({id(param) for param in params}) != len(params):
        return "it has tied parameters"
    if {id(param) for param in params} != {id(param) for param in model.parameters()}:
        return "it has parameters outside its layers"
    if not all(param.requires_grad for param in params):
        return "it has frozen parameters"
    return next((reason for layer in leaves if (reason := _odd_layer(layer)) is not None), None)


def leaves_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers in the order of registration, which is that of a Sequential's forward()."""
    return [layer for layer in model.modules() if not list(layer.children())]


def _odd_layer(layer: nn.Module) -> str | None:
    """Return a setting that the fused engine does not know, or that contradicts the weights."""
    name = type(layer).__name__
    if list(layer._parameters) != _PARAMETERS.get(type(layer), []):
        return f"its {name} has other parameters than weight and bias, or in another order"
    if isinstance(layer, nn.Linear):
        return _odd_weights(layer, (layer.out_features, layer.in_features), layer.out_features)
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            return f"it has a Conv2d with padding {layer.padding!r}, {layer.padding_mode!r}"
        if not all(_is_pair(size) for size in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)):
            return "it has a Conv2d whose sizes are not pairs of integers"
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        return _odd_weights(layer, shape, layer.out_channels)
    if isinstance(layer, nn.MaxPool2d):
        if layer.return_indices:
            return "it has a MaxPool2d that returns indices"
        sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        if not all(type(size) is int or _is_pair(size) for size in sizes):
            return "it has a MaxPool2d whose sizes are not integers"
    if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) != (1, -1):
        return "it has a Flatten of other dimensions than all but the first"
    return None


def _odd_weights(layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...], num_outputs: int) -> str | None:
    bias = layer._parameters["bias"]
    fits = isinstance(layer._parameters["weight"], Tensor) and layer.weight.shape == shape
    if not fits or (bias is not None and bias.shape != (num_outputs,)):
        return f"it has a {type(layer).__name__} whose weights have another shape than its attributes say"
    return None


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(size) is int for size in value)


def _unproven(model: nn.Module) -> str | None:
    nodes = list(_walk("the model", model))
    for name, module in nodes:
        kind = type(module)
        if kind is not nn.Sequential and kind not in _KNOWN:
            return f"{kind.__name__} is a class of its own"
        reason = module_reason(name, module)
        if reason is not None:
            return reason
        if any(callable(value) or key in ("weight", "bias") for key, value in vars(module).items()):
            return f"{name} has an attribute that stands in for one of its class"
        if kind is nn.Sequential and (module._parameters or None in module._modules.values()):
            return f"{name} is a Sequential of more than modules"
        if kind is not nn.Sequential and module._modules:
            return f"{name} is a layer with modules inside"
    if len({id(module) for _, module in nodes}) != len(nodes):
        return "one of its modules is used twice"
    reasons = (tensor_reason(name, param) for name, param in model.named_parameters())
    return next((reason for reason in reasons if reason is not None), None) or process_reason()


def _walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every place in the tree, also of a module that has two."""
    yield name, module
    if type(module) is nn.Sequential:
        for key, child in module._modules.items():
            if child is not None:
                yield from _walk(f"{name}.{key}".removeprefix("the model."), child)
