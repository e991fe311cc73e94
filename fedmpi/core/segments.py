"""The model, and what else travels with it, as named segments of one flat vector.

A flat vector holds, in this order: segments that only go down to clients; `w`, the trainable parameters; `b`, the float
buffers; segments that go both ways; segments that only go up. So what goes down is one range of it, and what goes up is
another, and the module's own tensors are views into `w` and `b`.

Shapes: T trainable entries, P = T + float buffer entries, V entries of the flat vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmpi.errors import ConfigError

Direction = Literal["down", "up", "both"]
Extra = Mapping[str, tuple[int | Literal["T"], Direction]]
"""Further segments: name -> (entries, direction); "T" stands for as many as there are trainable parameters."""

_ALIGNED = 16
"""`w` begins at a multiple of so many float32: 64 bytes, as an allocation of its own would."""


@dataclass(frozen=True)
class Segment:
    """A named range of a flat vector."""

    name: str
    start: int
    size: int
    direction: Direction

    @property
    def columns(self) -> slice:
        """The range."""
        return slice(self.start, self.start + self.size)


class Layout:
    """The segments of a flat vector.

    Attributes:
        segments: in the order of the vector.
        size: V.
        vector: range of the model itself, (P,).
        down: range that is sent to clients.
        up: range that they send back.
    """

    def __init__(self, num_trainable: int, num_buffers: int, extra: Extra | None = None) -> None:
        """Lay out the model's two segments and `extra`.

        Raises:
            ConfigError: an extra segment has a name, a size or a direction that cannot be.
        """
        ways: dict[str, list[tuple[str, int]]] = {"down": [], "both": [], "up": []}
        for name, (count, direction) in (extra or {}).items():
            size = num_trainable if count == "T" else count
            if name in ("w", "b") or not isinstance(size, int) or size < 1 or direction not in ways:
                raise ConfigError(
                    f'extra segment {name!r} must be another name than w and b, with (entries >= 1 or "T", "down", "up"'
                    f' or "both"), got ({count!r}, {direction!r})'
                )
            ways[direction].append((name, size))
        begin = -(-sum(size for _, size in ways["down"]) // _ALIGNED) * _ALIGNED
        self.segments: list[Segment] = []
        self._append(ways["down"], 0, "down")
        self._append([("w", num_trainable), ("b", num_buffers)], begin, "both")
        self.vector = slice(begin, begin + num_trainable + num_buffers)
        self._append(ways["both"], self.vector.stop, "both")
        self.down = slice(0, self._end)
        self._append(ways["up"], self._end, "up")
        self.up = slice(begin, self._end)
        self.size = self._end
        self._by_name = {segment.name: segment for segment in self.segments}

    @property
    def _end(self) -> int:
        last = self.segments[-1]
        return last.start + last.size

    def _append(self, parts: list[tuple[str, int]], start: int, direction: Direction) -> None:
        for name, size in parts:
            self.segments.append(Segment(name, start, size, direction))
            start += size

    def __getitem__(self, name: str) -> Segment:
        """Return a segment by its name."""
        return self._by_name[name]

    def sent_down(self) -> list[Segment]:
        """Return the segments that go down, the empty ones left out."""
        return [segment for segment in self.segments if segment.size and segment.direction != "up"]

    def sent_up(self) -> list[Segment]:
        """Return the segments that come back, the empty ones left out."""
        return [segment for segment in self.segments if segment.size and segment.direction != "down"]


class Segments:
    """A flat vector by its named parts, which are views."""

    __slots__ = ("flat", "layout")

    def __init__(self, flat: Tensor, layout: Layout) -> None:
        """Name the parts of `flat` (V,)."""
        self.flat, self.layout = flat, layout

    @classmethod
    def zeros(cls, layout: Layout, dtype: torch.dtype = torch.float64) -> Segments:
        """Return segments of zeros, on CPU."""
        return cls(torch.zeros(layout.size, dtype=dtype, device="cpu"), layout)

    def clone(self) -> Segments:
        """Return a copy in memory of its own."""
        return Segments(self.flat.clone(), self.layout)

    @property
    def w(self) -> Tensor:
        """(T,) trainable parameters."""
        return self["w"]

    @property
    def b(self) -> Tensor:
        """Float buffers, such as BatchNorm's statistics: averaged, never stepped by a server optimizer."""
        return self["b"]

    @property
    def vector(self) -> Tensor:
        """(P,) the model: `w`, then `b`."""
        return self.flat[self.layout.vector]

    def __getitem__(self, name: str) -> Tensor:
        """Return a segment by its name.

        Raises:
            KeyError: there is no such segment.
        """
        return self.flat[self.layout[name].columns]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return (segment.name for segment in self.layout.segments)
