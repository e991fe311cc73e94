"""One trial of a model's training step before the first round: what would fail in mid-run is said at the start.

Shapes: n samples of a batch, C classes.
"""

from __future__ import annotations

import dis

from torch import Tensor, nn

from fedmpi.core.memory_format import laid_out, memory_format_of
from fedmpi.core.model_checks import LIBRARIES, describe_error
from fedmpi.core.views import check_views
from fedmpi.engines.eager import EagerEngine
from fedmpi.engines.put_back import put_back
from fedmpi.errors import ModelError


def rehearse(
    model: nn.Module, inputs: Tensor, labels: Tensor, num_classes: int, name: str, sgd: tuple[float, float, float]
) -> tuple[int, list[str]]:
    """Take a training step and put the model back.

    Args:
        model: the flattened module.
        inputs: (n, ...), a batch as large as they come, of real samples.
        labels: (n,).
        num_classes: C.
        name: of the model, for messages.
        sgd: step size, momentum and weight decay.

    Returns:
        The samples that training needs, 1, or 2 for a model that cannot train on one (BatchNorm); and the names of the
        model's attributes that a step changes.

    Raises:
        ModelError: no step succeeds, the outputs are not (n, C), or a tensor leaves the model's vector.
    """
    inputs = laid_out(inputs, memory_format_of(model))
    changed: list[str] = []

    def failure(size: int) -> Exception | None:
        """Return the error of a step on the first `size` samples; None: it succeeds."""
        with put_back(model) as before:
            model.train()
            try:
                _check_outputs(model(inputs[:size]), size, num_classes)
                EagerEngine(model, *sgd).epoch(inputs[:size], labels[:size], size)
            except Exception as error:  # noqa: BLE001 - a user's forward may raise anything
                return error
            finally:
                changed.extend(attribute for attribute in before.changed() if attribute not in changed)
            check_views(model)  # before it is put back
        return None

    sizes = sorted({min(2, len(labels)), len(labels)})
    errors = []
    for size in sizes:
        error = failure(size)
        if error is None:
            return (1 if len(labels) < 2 or failure(1) is None else 2), changed
        errors.append(error)
    if _is_deliberate(errors[0]):
        return 1, changed  # a crash of the user's own, which training tells with client, round and traceback
    samples = f"{sizes[0]} samples of shape {tuple(inputs.shape[1:])}"
    raise ModelError(f"--model {name} cannot train on {samples}: {describe_error(errors[0])}") from errors[0]


def _check_outputs(outputs: object, n: int, num_classes: int) -> None:
    if not isinstance(outputs, Tensor):
        raise TypeError(f"its output is a {type(outputs).__name__}, wanted is a tensor of shape ({n}, {num_classes})")
    if outputs.shape != (n, num_classes):
        raise ValueError(f"its output has shape {tuple(outputs.shape)}, wanted is ({n}, {num_classes})")


def _is_deliberate(error: Exception) -> bool:
    """Return True if a `raise` statement of the user's own code raised it; an `assert` tells of unfit input."""
    last = error.__traceback__
    assert last is not None
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    raised = dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    own = code.co_filename != __file__ and not code.co_filename.startswith(LIBRARIES)
    return raised and own and not isinstance(error, AssertionError)
