"""Rules that work column by column, applied to clients' values as these arrive in blocks.

Shapes: V entries of a flat vector, K clients, B columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmpi.core.segments import Layout
from fedmpi.errors import ConfigError


def apply_rule(
    blocks: Iterable[tuple[slice, NDArray[np.float32]]],
    layout: Layout,
    flat: Tensor,
    rule: Callable[[Tensor, Tensor], Tensor],
    source: str,
) -> Tensor:
    """Return (V,) what `rule` makes of each segment that comes back, but for float buffers.

    Args:
        blocks: see `exchange.Arrived`.
        layout: of the flat vectors.
        flat: (V,) what was sent; kept where no rule applies.
        rule: (K, B) float32 values, (B,) values that were sent -> (B,) values.
        source: of the rule, for a message.

    Raises:
        ConfigError: the rule returns something else.
    """
    result = flat.clone()
    for columns, values in blocks:
        block = torch.from_numpy(values)
        first = columns.start + layout.up.start
        for segment in layout.sent_up() if len(block) else ():
            start, stop = max(first, segment.start), min(columns.stop + layout.up.start, segment.columns.stop)
            if start >= stop or segment.name == "b":
                continue
            new = rule(block[:, start - first : stop - first].contiguous(), flat[start:stop])
            result[start:stop] = _checked(new, stop - start, source)
    return result


def whole_rows(blocks: Iterable[tuple[slice, NDArray[np.float32]]], layout: Layout, num_rows: int) -> Tensor:
    """Return (K, V) all values of all clients, zeros in segments that do not come back."""
    rows = torch.zeros((num_rows, layout.size), dtype=torch.float32, device="cpu")
    for columns, values in blocks:
        rows[:, columns.start + layout.up.start : columns.stop + layout.up.start] = torch.from_numpy(values)
    return rows


def _checked(values: object, size: int, source: str) -> Tensor:
    if isinstance(values, Tensor) and values.shape == (size,):
        return values
    found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
    raise ConfigError(f"{source} must return a tensor of shape ({size},), got {found}")
