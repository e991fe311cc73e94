"""The weighted sum of updates as a sum of integers, so that it has no order.

Client k adds round(n_k * (w_k - w) * 2^s) as int64. Integer addition is associative: any placement of clients, any
order of arrival and any MPI reduction gives the same bits. `s` is known before the round starts; it is the largest with
which, for |w_k - w| < 2^7, no single term passes 2^51 and no sum passes 2^62. A client whose update reaches 2^7
puts its whole vector into a coarser bin (each 2^40 times coarser, each an exact sum of its own), and what that bin
rounds away into the next finer one, down to bin 0; where it starts depends on that client alone. An entry with the very
bits it was sent with adds nothing, also where it is not finite (a mask of -inf).

The mean is off by at most 2^-43 * (largest weight / mean weight), or by K * 2^-53 where that is more, plus 2^-50 of the
cohort's largest |w_k - w|.

Source: pre-rounded reproducible summation, Demmel and Nguyen, "Fast reproducible floating-point summation", 2013.

Shapes: P vector entries, K clients in the sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmpi.errors import ConfigError
from fedmpi.machine.device import host_buffer

_RANGE_BITS = 7  # |w_k - w| below 2^7 goes to bin 0
_BIN_BITS = 40  # bin j takes updates below 2^(7 + 40 j)
_LARGEST_WEIGHT = 2**30
_BLOCK = 2**16  # entries: for shorter blocks, calls cost more than memory
_MAGIC = 1.5 * 2.0**52  # x + _MAGIC has the integer nearest to x in its low mantissa bits, for |x| <= 2^51
_MAGIC_BITS = 0x4338_0000_0000_0000  # the bits of _MAGIC itself


def scale_exponent(weight_total: int, weight_max: int) -> int:
    """`s` of bin 0.

    Args:
        weight_total: sum of the cohort's weights.
        weight_max: largest weight in the cohort.
    """
    term = 51 - _RANGE_BITS - math.ceil(math.log2(max(weight_max, 1)))
    total = 61 - _RANGE_BITS - math.ceil(math.log2(max(weight_total, 1)))
    return min(term, total)


def integer_weights(weights: NDArray[Any] | Sequence[float]) -> NDArray[np.int64]:
    """Weights as the integers that the exact sum counts with, which are in proportion to them.

    Whole numbers up to 2^30 stay as they are. Others are scaled so that the largest becomes 2^30, and rounded: off by
    at most 2^-31 of the largest.

    Args:
        weights: (K,) numbers >= 0.

    Raises:
        ConfigError: one is negative, not finite or no number.
    """
    try:
        given = np.asarray(weights, np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"weights must be numbers >= 0: {error}") from error
    if given.ndim != 1 or not np.isfinite(given).all() or (given < 0).any():
        wrong = given[~(np.isfinite(given) & (given >= 0))]
        found = f"{wrong.flat[0]}" if wrong.size else f"an array of shape {given.shape}"
        raise ConfigError(f"weights must be finite numbers >= 0, one per client of the cohort, got {found}")
    largest = given.max(initial=0.0)
    if largest <= _LARGEST_WEIGHT and (given == np.rint(given)).all():
        return np.asarray(given, np.int64)
    return np.asarray(np.rint(given / largest * _LARGEST_WEIGHT), np.int64)


class Reference:
    """A vector w that clients started from, in the forms that a sum of w_k - w needs; each is made when first used."""

    def __init__(self, start: Tensor) -> None:
        """`start`: (P,) float32."""
        self.start = start

    @functools.cached_property
    def wide(self) -> Tensor:
        """(P,) float64."""
        return self.start.to(torch.float64)

    @functools.cached_property
    def array(self) -> NDArray[np.float64]:
        """(P,) float64; on CPU only."""
        return self.wide.numpy()

    @functools.cached_property
    def largest(self) -> float:
        """The largest of the absolute values; NaN if there is one."""
        return _largest(self.start)


class ExactSum:
    """Accumulates n_k * (w_k - w) over clients; one (P,) int64 tensor per bin."""

    def __init__(self, reference: Tensor | Reference, weight_total: int, weight_max: int) -> None:
        """Start empty.

        Args:
            reference: (P,) float32, the vector w that the clients started from.
            weight_total: sum of the weights that will ever be added, over all ranks.
            weight_max: largest of what is added at a time.
        """
        self._reference = reference if isinstance(reference, Reference) else Reference(reference)
        self._shape, self._device = self._reference.start.shape, self._reference.start.device
        self._weight_total = weight_total
        self._exponent = scale_exponent(weight_total, weight_max)
        self._bins: dict[int, Tensor] = {}
        self._copies: dict[int, Tensor] = {}
        self._terms: dict[int, int] = {}  # how many times a bin still holds _MAGIC_BITS too much

    def add(self, vector: Tensor, weight: int, reference: Reference | None = None) -> int | None:
        """Add one client.

        Args:
            vector: (P,) float32, w_k.
            weight: n_k, an integer >= 0.
            reference: w, if it is another than that of the other clients.

        Returns:
            The client's bin, or None if the vector is not finite and nothing was added.
        """
        reference = reference or self._reference
        in_range = reference.largest + _largest(vector) < 2.0**_RANGE_BITS
        if in_range and self._device.type == "cpu":
            self._add_in_blocks(vector.numpy(), reference.array, weight)
            return 0
        self._term.copy_(vector).sub_(reference.wide)
        if not math.isfinite(reference.largest):  # the same bits add nothing, also where they are not finite
            self._term.masked_fill_(vector.view(torch.int32) == reference.start.view(torch.int32), 0)
        bin_idx = 0 if in_range else _bin_of(self._term)
        if bin_idx is None:
            return None
        self._term.mul_(weight * 2.0 ** (self._exponent - _BIN_BITS * bin_idx))
        for coarse_idx in range(bin_idx, 0, -1):
            rounded = self._term + _MAGIC
            self._put(coarse_idx, rounded)
            self._term.sub_(rounded.sub_(_MAGIC)).mul_(2.0**_BIN_BITS)  # exact: the bits that were rounded away
        self._put(0, self._term.add_(_MAGIC))
        return bin_idx

    def add_group(self, update: Tensor, weight: int) -> bool:
        """Add what several clients of the weight `weight` together came to.

        Args:
            update: (P,) float64, the sum of n_k * (w_k - w); used up.
            weight: the sum of their n_k, at most the largest that this sum was made for.

        Returns:
            False if it does not fit or is not finite; then nothing was added.
        """
        if not _largest(update) < weight * 2.0**_RANGE_BITS:
            return weight == 0 and not bool(update.any())
        self._put(0, update.mul_(2.0**self._exponent).add_(_MAGIC))
        return True

    def _add_in_blocks(self, vector: NDArray[np.float32], reference: NDArray[np.float64], weight: int) -> None:
        """Add a client of bin 0, on CPU; each operand crosses the memory bus once."""
        sums, scale = self._open(0).numpy(), weight * 2.0**self._exponent
        for start in range(0, len(vector), _BLOCK):
            block = vector[start : start + _BLOCK]
            count = len(block)
            term, total = self._scratch[:count], sums[start : start + count]
            np.copyto(term, block)
            np.subtract(term, reference[start : start + count], term)
            np.multiply(term, scale, term)
            np.add(term, _MAGIC, term)
            np.add(total, self._scratch_bits[:count], total)
        self._terms[0] += 1

    @property
    def num_bins(self) -> int:
        """One more than the coarsest bin in use; 0 before the first client."""
        return max(self._bins, default=-1) + 1

    def buffers(self, num_bins: int) -> list[NDArray[np.int64]]:
        """(P,) int64 sums of bins 0 .. `num_bins` - 1, zeros where nothing was added; on CPU what is written counts.

        From a GPU each sum is copied once; nothing is added after that.
        """
        return [self._on_host(bin_idx).numpy() for bin_idx in range(num_bins)]

    def mean(self) -> Tensor:
        """(P,) float64: the weighted mean update; zeros when the total weight is 0."""
        return self.total().div_(max(self._weight_total, 1))

    def total(self) -> Tensor:
        """(P,) float64: the sum of n_k * (w_k - w)."""
        total = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        for bin_idx in sorted(self._bins):
            total.add_(self._settled(bin_idx).to(torch.float64).mul_(2.0 ** (_BIN_BITS * bin_idx - self._exponent)))
        return total

    # What the first client of a round needs; a rank without clients spends nothing on it.

    @functools.cached_property
    def _term(self) -> Tensor:
        return torch.empty(self._shape, dtype=torch.float64, device=self._device)

    @functools.cached_property
    def _scratch(self) -> NDArray[np.float64]:
        return np.empty(_BLOCK)

    @functools.cached_property
    def _scratch_bits(self) -> NDArray[np.int64]:
        return self._scratch.view(np.int64)

    def _put(self, bin_idx: int, shifted: Tensor) -> None:
        """Add integers that come as float64 with _MAGIC on top."""
        self._open(bin_idx).add_(shifted.view(torch.int64))
        self._terms[bin_idx] += 1

    def _on_host(self, bin_idx: int) -> Tensor:
        if self._device.type == "cpu":
            return self._settled(bin_idx)
        if bin_idx not in self._copies:
            values = self._settled(bin_idx)
            self._copies[bin_idx] = host_buffer(len(values), values.dtype, values.device).copy_(values)
        return self._copies[bin_idx]

    def _settled(self, bin_idx: int) -> Tensor:
        bin_sum = self._open(bin_idx)
        excess = self._terms[bin_idx] * _MAGIC_BITS % 2**64
        bin_sum.sub_(excess - 2**64 if excess >= 2**63 else excess)  # int64 wraps, as the sum did
        self._terms[bin_idx] = 0
        return bin_sum

    def _open(self, bin_idx: int) -> Tensor:
        if bin_idx not in self._bins:
            self._bins[bin_idx] = torch.zeros(self._shape, dtype=torch.int64, device=self._device)
            self._terms[bin_idx] = 0
        return self._bins[bin_idx]


def _largest(values: Tensor) -> float:
    """Of the absolute values; NaN if there is one."""
    if not len(values):
        return 0.0
    low, high = values.aminmax()
    return max(-float(low), float(high))


def _bin_of(update: Tensor) -> int | None:
    largest = _largest(update)
    if not math.isfinite(largest):
        return None
    return max(0, math.ceil((math.frexp(largest)[1] - _RANGE_BITS) / _BIN_BITS))
