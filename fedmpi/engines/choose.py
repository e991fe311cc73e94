"""Which engine takes a model's steps."""

from __future__ import annotations

import copy
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from fedmpi.core.errors import ModelError
from fedmpi.core.layout import laid_out, memory_format_of
from fedmpi.core.vector import SerializationTool
from fedmpi.engines import fused
from fedmpi.engines.eager import EagerEngine
from fedmpi.engines.fused import FusedEngine
from fedmpi.engines.graph import GraphEngine
from fedmpi.engines.single_step import SingleStepEngine

_TOLERANCE = 1e-3
"""Largest difference of two engines' steps, relative to the largest entry of the step."""


class Engine(Protocol):
    """Takes the steps of one client's SGD with mean cross-entropy on the model it was made for.

    Attributes:
        runs_model: whether it calls the model, which may then draw random numbers and tell training from evaluation.
        single_steps: takes one step each for many clients at once; None: cannot.
    """

    runs_model: bool
    single_steps: SingleStepEngine | None

    def reset(self) -> None:
        """The next step is a client's first."""

    def epoch(self, inputs: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """One pass over (N, ...) inputs and (N,) labels in that order, a step each `batch_size` samples and the rest.

        Returns:
            The batches' mean losses, each before its step.
        """


def choose_engine(
    wanted: Literal["auto", "eager", "fused", "graph"],
    model: nn.Module,
    input_shape: tuple[int, ...],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> tuple[Engine, str]:
    """An engine for a flattened model, and the sentence that tells which and why.

    Args:
        wanted: --engine.
        model: the module.
        input_shape: shape of one sample.
        lr: step size.
        momentum: in [0, 1).
        weight_decay: >= 0.

    Raises:
        ModelError: fused or graph is wanted and does not fit.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    if wanted == "graph" and not on_gpu:
        raise ModelError("--engine graph records steps on a GPU, and this trainer computes on CPU: use fused")
    reason = None if wanted == "eager" else fused.why_not(model) or _trial(model, input_shape)
    if wanted in ("fused", "graph") and reason is not None:
        raise ModelError(f"--engine {wanted} does not fit this model: {reason}; --engine auto falls back to eager")
    if wanted == "eager" or reason is not None:
        why = "as asked" if wanted == "eager" else f"not fused, because {reason}"
        return EagerEngine(model, lr, momentum, weight_decay), f"eager ({why})"
    if on_gpu and wanted != "fused":
        return GraphEngine(model, lr, momentum, weight_decay), "graph"
    return FusedEngine(model, lr, momentum, weight_decay), "fused"


def _trial(model: nn.Module, input_shape: tuple[int, ...]) -> str | None:
    """Four steps of both engines on copies; why they differ, or None."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    inputs = torch.randn(5, *input_shape, generator=generator).to(device)
    inputs = laid_out(inputs, memory_format_of(model))
    copies = copy.deepcopy(model), copy.deepcopy(model)
    engines = EagerEngine(copies[0], 0.05, 0.5, 0.01), FusedEngine(copies[1], 0.05, 0.5, 0.01)
    try:
        with torch.no_grad():
            outputs = copies[0](inputs)
        if outputs.dim() != 2:
            return f"its output has {outputs.dim()} dimensions"
        labels = torch.randint(outputs.shape[1], (5,), generator=generator).to(device)
        for engine in engines:
            for _ in range(2):
                engine.epoch(inputs, labels, batch_size=3)
    except Exception as error:  # noqa: BLE001 - a user's forward: training says it again, with client and round
        return f"its forward is not the plain stack of its layers ({type(error).__name__} in a trial step)"
    start = SerializationTool.serialize_model(model)
    moved = [SerializationTool.serialize_model(each) - start for each in copies]
    if not bool((moved[0] - moved[1]).abs().max() <= _TOLERANCE * moved[0].abs().max()):
        return "its forward is not the plain stack of its layers"
    return None
