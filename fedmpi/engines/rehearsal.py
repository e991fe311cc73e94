"""One trial of a model's training step before the first round: what would fail in mid-run is said at the start.

Shapes: n samples of a batch, C classes.
"""

from __future__ import annotations

import dataclasses
import dis
from collections.abc import Sequence

from torch import Tensor, nn

from fedmpi.core.errors import ModelError
from fedmpi.core.layout import laid_out, memory_format_of
from fedmpi.core.model_checks import LIBRARIES, describe_error
from fedmpi.core.views import check_views
from fedmpi.engines.eager import EagerEngine
from fedmpi.engines.put_back import put_back


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What a trial of a model has shown.

    Attributes:
        smallest_batch: samples that its forward() needs in training: 1, or 2 (BatchNorm).
        changed_attributes: names of its attributes that a step changes.
    """

    smallest_batch: int = 1
    changed_attributes: Sequence[str] = ()


def rehearse(
    model: nn.Module, inputs: Tensor, labels: Tensor, num_classes: int, name: str, sgd: tuple[float, float, float]
) -> Rehearsal:
    """Take a training step on the batch, and one on a single sample; the model is left as it was.

    Args:
        model: the flattened module.
        inputs: (n, ...), a batch as large as they come, of real samples.
        labels: (n,).
        num_classes: C.
        name: of the model, for messages.
        sgd: step size, momentum and weight decay.

    Raises:
        ModelError: no step succeeds, the outputs are not (n, C), or a tensor leaves the model's vector.
    """
    inputs = laid_out(inputs, memory_format_of(model))
    sizes = sorted({min(2, len(labels)), len(labels)})
    errors = []
    changed: list[str] = []
    for size in sizes:
        error, changed = _failure(model, inputs[:size], labels[:size], num_classes, sgd)
        if error is None:
            break
        errors.append(error)
    else:
        error = errors[0]
        if _is_deliberate(error):
            return Rehearsal()  # a crash of the user's own, which training tells with client, round and traceback
        samples = f"{sizes[0]} samples of shape {tuple(inputs.shape[1:])}"
        raise ModelError(f"--model {name} cannot train on {samples}: {describe_error(error)}") from error
    single = len(labels) < 2 or _failure(model, inputs[:1], labels[:1], num_classes, sgd)[0] is None
    return Rehearsal(1 if single else 2, changed)


def _failure(
    model: nn.Module, inputs: Tensor, labels: Tensor, num_classes: int, sgd: tuple[float, float, float]
) -> tuple[Exception | None, list[str]]:
    """The error of a training step on this batch, if there is one, and the attributes of the model that it changes."""
    with put_back(model) as attributes:
        model.train()
        try:
            _check_outputs(model(inputs), len(labels), num_classes)
            EagerEngine(model, *sgd).epoch(inputs, labels, len(labels))
        except Exception as error:  # noqa: BLE001 - a user's forward may raise anything
            return error, []
        check_views(model)  # before it is put back
        return None, attributes.changed()


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
