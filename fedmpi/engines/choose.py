"""A choice of the engine that takes a model's steps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from fedmpi.core.memory_format import laid_out, memory_format_of
from fedmpi.core.vector import SerializationTool
from fedmpi.engines.eager import EagerEngine
from fedmpi.engines.fused import FusedEngine
from fedmpi.engines.graph import GraphEngine
from fedmpi.engines.proof import cannot, leaves_of, why_not
from fedmpi.engines.put_back import put_back
from fedmpi.engines.steps import Engine
from fedmpi.errors import ModelError

_TOLERANCE = 1e-3
"""Largest difference of two engines' steps, relative to the largest entry of the step."""


def choose_engine(
    wanted: Literal["auto", "eager", "fused", "graph"],
    model: nn.Module,
    input_shape: tuple[int, ...],
    lr: float,
    momentum: float,
    weight_decay: float,
    smallest_batch: int = 1,
) -> tuple[Engine, str]:
    """Return an engine for a flattened model, and the sentence that tells which and why.

    Auto takes steps by hand only for a model that is known to be the plain stack of its layers; fused, also for one
    whose layers can be taken by hand, if four trial steps agree.

    Args:
        wanted: --engine.
        model: the module.
        input_shape: shape of one sample.
        lr: step size.
        momentum: in [0, 1).
        weight_decay: >= 0.
        smallest_batch: samples that the model's forward() needs in training.

    Raises:
        ModelError: fused or graph is wanted and does not fit.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    if wanted == "graph" and not on_gpu:
        raise ModelError("--engine graph records steps on a GPU, and this trainer computes on CPU: use fused")
    reason = None
    if wanted != "eager":
        reason = (why_not(model) if wanted == "auto" else cannot(model)) or _trial(model, input_shape)
    if wanted in ("fused", "graph") and reason is not None:
        raise ModelError(f"--engine {wanted} does not fit this model: {reason}; --engine auto falls back to eager")
    if wanted == "eager" or reason is not None:
        why = "as asked" if wanted == "eager" else f"not fused, because {reason}{_way_out(model)}"
        if smallest_batch > 1:
            why += "; a last batch of one sample joins the one before it, as the model cannot train on one"
        return EagerEngine(model, lr, momentum, weight_decay, smallest_batch), f"eager ({why})"
    if on_gpu and wanted != "fused":
        return GraphEngine(model, lr, momentum, weight_decay), "graph"
    return FusedEngine(model, lr, momentum, weight_decay), "fused"


def _way_out(model: nn.Module) -> str:
    """Return the advice for a model whose layers, but not whose forward(), are known."""
    own = any(type(module).__module__.partition(".")[0] != "torch" for module in model.modules())
    if not own or cannot(model) is not None:
        return ""
    layers = [type(layer).__name__ for layer in leaves_of(model)]
    layers = [*layers[:2], "...", layers[-1]] if len(layers) > 6 else layers
    stack = f"nn.Sequential({', '.join(layers)})"
    return f"; if forward() only applies its layers, return {stack} or take --engine fused: that is faster"


def _trial(model: nn.Module, input_shape: tuple[int, ...]) -> str | None:
    """Return why four steps of both engines on the model, which is put back, differ; None: they agree."""
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = torch.randn(5, *input_shape, generator=generator, dtype=torch.float32, device="cpu")
    moved = []
    start = SerializationTool.serialize_model(model)
    try:
        inputs = laid_out(inputs.to(start.device), memory_format_of(model))
        labels = torch.zeros(5, dtype=torch.int64, device=start.device)
        for kind in (EagerEngine, FusedEngine):
            with put_back(model):
                model.train()
                with torch.no_grad():
                    outputs = model(inputs)
                if outputs.dim() != 2:
                    return f"its output has {outputs.dim()} dimensions"
                labels = torch.randint(outputs.shape[1], (5,), generator=generator.manual_seed(1), device="cpu")
                engine = kind(model, 0.05, 0.5, 0.01)
                for _ in range(2):
                    engine.epoch(inputs, labels.to(start.device), batch_size=3)
                moved.append(SerializationTool.serialize_model(model) - start)
    except Exception as error:  # noqa: BLE001 - a user's forward: training says it again, with client and round
        return f"forward() does more than apply its layers in order ({type(error).__name__} in a trial step)"
    if not bool((moved[0] - moved[1]).abs().max() <= _TOLERANCE * moved[0].abs().max()):
        return "forward() does more than apply its layers in order"
    return None
