"""A buffer that MPI would misread is refused, with what was passed and what is wanted."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from fedmpi.errors import TransferError
from fedmpi.mpi.buffers import DEVICE_BYTES, Form, check_buffer


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8, np.bool_, np.complex64, np.float16])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (0,), (0, 4), (1, 1, 6)])
def test_contiguous_numbers_pass(dtype, shape):
    array = np.zeros(shape, dtype)
    check_buffer(array, count=array.size)
    check_buffer(array, array.dtype.name, array.size, written=True)
    check_buffer(read_only(array))


UNFIT = {
    "not contiguous": np.zeros(12)[::2],
    "contiguous (C order)": np.zeros((2, 3)).T,
    "not contiguous (C order)": np.zeros(6)[::-1],
    "of the other byte order": np.zeros(6).astype(np.dtype(float).newbyteorder()),
    "not aligned": np.frombuffer(bytearray(17), np.uint8)[1:].view(np.int64),
    "object of shape (6,)": np.zeros(6, object),
    "float64 of shape ()": np.array(3.0),
    "dtype <M8[s]": np.zeros(6, "M8[s]"),
    "dtype <U3": np.array(["abc"]),
    "structured of shape (6,)": np.zeros(6, [("a", float), ("b", int)]),
    "a MaskedArray of float64": np.ma.zeros(6),
    "a matrix of float64": np.zeros(6).view(np.matrix) if hasattr(np, "matrix") else None,
    "a tensor (torch.float32 on cpu) of shape (6,)": torch.zeros(6),
    "not contiguous, on its own": torch.zeros(12, dtype=torch.uint8)[::2],
    "a tensor (torch.uint8 on meta)": torch.zeros(6, dtype=torch.uint8, device="meta"),
    "of type list": [0.0] * 6,
    "of type bytes": b"123456",
    "of type NoneType": None,
    "of type float64": np.float64(3),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("said", UNFIT)
def test_what_mpi_would_misread_is_refused(said):
    with pytest.raises(TransferError, match=re.escape(said.partition(", on its own")[0])) as caught:
        check_buffer(UNFIT[said])
    assert "wanted is a contiguous NumPy array of numbers" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_mpi_writes_a_read_only_buffer_is_refused():
    with pytest.raises(TransferError, match=r"float64 of shape \(3,\), read-only; wanted is a contiguous, writable"):
        check_buffer(read_only(np.zeros(3)), written=True)


@pytest.mark.parametrize(
    ("dtype", "count"), [("float64", 5), ("float32", 6), ("int64 or float32", 6), (DEVICE_BYTES, 6)]
)
def test_another_type_or_count_is_refused(dtype, count):
    with pytest.raises(TransferError, match=rf"is float64 of shape \(2, 3\); wanted .* of {count} {dtype} in"):
        check_buffer(np.zeros((2, 3)), dtype, count)
    check_buffer(np.zeros((2, 3)), "int64 or float64", 6)


def test_device_bytes_are_their_own_type():
    device = torch.zeros(8, dtype=torch.uint8)
    check_buffer(device, count=8, written=True)
    Form(DEVICE_BYTES, (8,)).check(device)
    for form in (Form("uint8", (8,)), Form(DEVICE_BYTES, (4,)), Form("float32", (2,))):
        with pytest.raises(TransferError):
            form.check(device)
