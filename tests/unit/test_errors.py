"""Errors travel between ranks by pickle, so none may have arguments of its own."""

from __future__ import annotations

import pickle

import pytest

from fedmpi import errors
from fedmpi.errors import FedmpiError, shown

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FedmpiError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_way_to_another_rank(kind: type[FedmpiError]) -> None:
    error = kind("--rounds must be odd, got 2")
    assert error.everywhere is False
    error.everywhere = True
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)
    assert back.everywhere is True
    assert back.exit_code == kind.exit_code


class Loud:
    def __repr__(self) -> str:
        raise AssertionError("a foreign object was asked to print itself")

    __str__ = __repr__


class Wordy(str):
    __slots__ = ()
    __str__ = __repr__ = __getitem__ = Loud.__repr__  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("plain", "plain"),
        ("two\nlines\tand  more", "two lines and more"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("right\u202eto left", "right\\u202eto left"),
        ("\ud800", "\\ud800"),
        ("Läufe ü", "Läufe ü"),
        (b"a\xffb\x00", "a\\xffb\\x00"),
        ("x" * 1000, "x" * 77 + "..."),
        (3, "3"),
        (0.5, "0.5"),
        (float("nan"), "nan"),
        (None, "None"),
        (True, "True"),
        pytest.param(10**5000, "an integer of 16610 bits", id="digits"),
        ([0.1], "[0.1]"),
        ([1, [2, [3]], "\n", 4, 5], "[1, a list, , ...]"),
        ({"a": 1}, "a dict"),
        (Loud(), "a Loud"),
        ([Loud()], "[a Loud]"),
        (Wordy("x"), "a Wordy"),
    ],
)
def test_foreign_values_are_shown_in_one_printable_line(value: object, said: str) -> None:
    assert shown(value) == said


def test_the_price_of_showing_does_not_grow_with_the_value() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested] * 10
    assert shown([nested] * 10**6) == "[a list, a list, a list, ...]"
    assert len(shown("\x00" * 10**8)) == 80
