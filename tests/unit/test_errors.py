"""Errors travel between ranks by pickle, so none may have arguments of its own."""

from __future__ import annotations

import pickle

import pytest

from fedmpi.core import errors
from fedmpi.core.errors import FedmpiError

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
