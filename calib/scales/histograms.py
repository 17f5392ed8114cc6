"""Histograms of numbers that are seen part by part, in any order.

The bins follow from the bits of a float32 number: its sign, its exponent and the first bits of its mantissa. So every
power of two has as many bins, and an edge never depends on the numbers that came first. The range reaches from the
largest magnitude down by a fixed number of powers of two; numbers closer to zero share the first bin. When a larger
number comes, the range moves up, and the bins that fall out of it are added to the first one. All counts are integers.
Therefore the same numbers give the same histogram, whatever their order and however they were split.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BINS", "Histogram", "NotFinite", "histogram_of", "merged"]

BITS = 6  # of the mantissa: 64 bins for each power of two, so a bin is at most 1.6 % wide
OCTAVE = 2**BITS
OCTAVES = 34  # more than e5m2 reaches from its largest number to its smallest
BINS = OCTAVE * OCTAVES  # for the numbers of one sign
CUT = 23 - BITS  # bits of a float32 number that its bin leaves out
INFINITE = 255 * OCTAVE  # the place of the first number that is not finite
BLOCK = 1 << 20  # numbers that are counted at once
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class NotFinite(Exception):
    """Some numbers are NaN or infinite."""

    def __init__(self, value: float, count: int, size: int) -> None:
        super().__init__(f"{value}, {count} of {size} numbers are not finite")


@dataclass(frozen=True)
class Histogram:
    """How many numbers lie in each bin, and the exact range of the numbers."""

    lowest: float
    highest: float
    top: int  # the exponent of the largest magnitude, as its bits hold it
    counts: Counts  # [2, BINS]: numbers with a minus and without, each from zero outwards

    @property
    def amax(self) -> float:
        """The largest magnitude."""
        return max(-self.lowest, self.highest)

    @cached_property
    def edges(self) -> Floats:
        """The magnitudes between the bins [BINS + 1]; the first is zero."""
        places = np.maximum((self.top + 1) * OCTAVE - BINS + np.arange(BINS + 1), 0)
        bits = np.minimum(places << CUT, 0x7F7F_FFFF).astype(np.uint32)
        edges = bits.view(np.float32).astype(np.float64)
        edges[0] = 0
        return edges

    @cached_property
    def magnitudes(self) -> Counts:
        """How many numbers of either sign lie in each bin [BINS]."""
        return np.asarray(self.counts.sum(0))


def histogram_of(array: Any) -> Histogram:
    """The histogram of an array of floats, which has at least one number. Numbers that are not finite are refused."""
    numbers = np.ascontiguousarray(array, np.float32).reshape(-1)
    bits, total = numbers.view(np.uint32), np.zeros(2 ** (32 - CUT), np.int64)
    for start in range(0, bits.size, BLOCK):
        total += np.bincount(bits[start : start + BLOCK] >> CUT, minlength=total.size)
    signs = total.reshape(2, -1)[::-1]  # the sign is the highest bit
    if lost := int(signs[:, INFINITE:].sum()):
        raise NotFinite(float(numbers[~np.isfinite(numbers)][0]), lost, numbers.size)
    lowest, highest = float(numbers.min()) + 0.0, float(numbers.max()) + 0.0  # 0.0 instead of -0.0
    top = int(np.float32(abs(max(-lowest, highest))).view(np.uint32) >> 23)
    first = (top + 1) * OCTAVE - BINS
    below = np.zeros((2, max(0, -first)), np.int64)
    counts = np.concatenate([below, signs[:, max(0, first) : (top + 1) * OCTAVE]], 1)
    counts[:, 0] += signs[:, : max(0, first)].sum(1)
    return Histogram(lowest, highest, top, counts)


def merged(one: Histogram, other: Histogram) -> Histogram:
    """The histogram of the numbers of both."""
    top = max(one.top, other.top)
    lowest, highest = min(one.lowest, other.lowest), max(one.highest, other.highest)
    return Histogram(lowest, highest, top, _raised(one, top) + _raised(other, top))


def _raised(histogram: Histogram, top: int) -> Counts:
    """The counts for a range that reaches higher."""
    moved = min((top - histogram.top) * OCTAVE, BINS - 1)
    if not moved:
        return histogram.counts
    counts = np.zeros_like(histogram.counts)
    counts[:, : BINS - moved] = histogram.counts[:, moved:]
    counts[:, 0] += histogram.counts[:, :moved].sum(1)
    return counts
