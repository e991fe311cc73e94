"""Named parts of one flat vector: their order, their ranges, and that they are views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmpi.core.segments import Layout, Segments
from fedmpi.core.vector import flatten, layout_of
from fedmpi.errors import ConfigError

EXTRA: Any = {"momentum": ("T", "down"), "control": (5, "both"), "sum": (2, "up"), "flag": (1, "down")}


def test_down_comes_first_then_the_model_then_both_ways_then_up() -> None:
    layout = Layout(7, 3, EXTRA)
    names = [segment.name for segment in layout.segments]
    assert names == ["momentum", "flag", "w", "b", "control", "sum"]
    assert [layout[name].size for name in names] == [7, 1, 7, 3, 5, 2]
    assert layout["w"].start == 16, "at 64 bytes, as an allocation of its own"
    assert (layout.vector, layout.down, layout.up) == (slice(16, 26), slice(0, 31), slice(16, 33))
    assert [segment.name for segment in layout.sent_down()] == ["momentum", "flag", "w", "b", "control"]
    assert [segment.name for segment in layout.sent_up()] == ["w", "b", "control", "sum"]


def test_a_model_alone_is_its_own_layout() -> None:
    layout = Layout(7, 0)
    assert (layout.size, layout.vector, layout.down, layout.up) == (7, *[slice(0, 7)] * 3)
    assert [segment.name for segment in layout.sent_up()] == ["w"], "an empty segment does not travel"
    assert len(Segments.zeros(layout).b) == 0


directions = st.sampled_from(["down", "up", "both"])


@given(st.integers(1, 40), st.integers(0, 9), st.lists(st.tuples(st.integers(1, 33) | st.just("T"), directions)))
def test_segments_do_not_meet_and_ranges_hold_what_travels(num_trainable: int, num_buffers: int, more: Any) -> None:
    layout = Layout(num_trainable, num_buffers, {f"x{i}": part for i, part in enumerate(more)})
    place = 0
    for segment in layout.segments:
        assert segment.start >= place
        place = segment.columns.stop
        for span, travels in ((layout.down, segment.direction != "up"), (layout.up, segment.direction != "down")):
            inside = span.start <= segment.start and segment.columns.stop <= span.stop
            assert inside == travels or not segment.size
    assert place == layout.size
    assert layout["w"].start % 16 == 0
    assert layout.vector == slice(layout["w"].start, layout["b"].columns.stop)
    assert layout.up.start == layout.vector.start, "nothing that only goes down lies between"


@pytest.mark.parametrize(
    "part",
    [
        {"w": (3, "up")}, {"b": ("T", "down")}, {"x": (0, "up")}, {"x": (-1, "up")}, {"x": (2.0, "up")},
        {"x": ("P", "up")}, {"x": (3, "sideways")}, {"x": (3, "")},
    ],
)  # fmt: skip
def test_segments_that_cannot_be_are_refused(part: Any) -> None:
    with pytest.raises(ConfigError, match=r"^extra segment '\w' must be another name than w and b, with .*, got \("):
        Layout(4, 2, part)


def test_parts_are_views_and_the_modules_own_memory() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    layout = layout_of(model, EXTRA)
    parts = Segments(flatten(model, layout), layout)
    assert (len(parts.w), len(parts.b), len(parts["momentum"])) == (15, 6, 15)
    assert list(parts) == ["momentum", "flag", "w", "b", "control", "sum"]
    parts.w.fill_(2.0)
    parts.b.fill_(3.0)
    parts["control"].fill_(4.0)
    assert model[0].weight.unique().tolist() == [2.0]
    assert model[1].running_mean.unique().tolist() == [3.0]  # type: ignore[union-attr]  # a tensor
    assert parts.vector.tolist() == [2.0] * 15 + [3.0] * 6
    assert int((parts.flat == 4).sum()) == 5
    copied = parts.clone()
    copied.flat.zero_()
    assert parts.w.unique().tolist() == [2.0]
    with pytest.raises(KeyError, match="other"):
        parts["other"]


def test_zeros_are_float64_on_cpu() -> None:
    parts = Segments.zeros(Layout(3, 1, {"x": (2, "both")}))
    assert (parts.flat.dtype, parts.flat.device.type, parts.flat.tolist()) == (torch.float64, "cpu", [0.0] * 6)
