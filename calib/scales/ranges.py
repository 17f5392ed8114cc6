"""The range that the codes of a format are spread over, from a histogram of the numbers. Four methods:

absmax      all numbers
percentile  all but the outermost 0.01 %, or another share
mse         the range with the least mean squared error of the numbers after quantisation
entropy     the range that keeps most of the distribution's information: the least Kullback-Leibler divergence between
            the numbers and the quantised numbers, as TensorRT and ONNX Runtime compute it

Inside a bin, numbers are taken as spread evenly. So a range is right to within one bin, 1.6 % of its width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.calib.scales.formats import Format, Integer, Scaling, asymmetric, fake_quantise, symmetric
from tilewright.calib.scales.histograms import OCTAVE, Histogram
from tilewright.runtime.errors import UsageError

__all__ = ["METHODS", "PERCENTILE", "mean_squared_error", "range_of", "scaling_of", "spread"]

PERCENTILE = 99.99
POINTS = 4  # in a bin, for the mean squared error; the step of int8 is as wide as a bin of the largest numbers
SEARCHED = 10 * OCTAVE  # bins below the largest magnitude that a range may end at
COARSE = 8  # the search first tries every eighth bin
CELLS = 2048  # of equal width, for entropy
LEAST_CELLS, STRIDE = 128, 16  # ranges that entropy tries: 128 cells, 144, ...
NEVER = 1e-9  # the share of a cell that the quantised distribution leaves out
Floats = npt.NDArray[np.float64]
Range = tuple[float, float]


def scaling_of(histogram: Histogram, format: Format, method: str, percentile: float = PERCENTILE) -> Scaling:
    """The scaling of a tensor whose numbers have this histogram."""
    return spread(format, *range_of(histogram, format, method, percentile))


def spread(format: Format, lowest: float, highest: float) -> Scaling:
    """The scaling that spreads a format's codes over a range. A symmetric format reaches as far to both sides."""
    if isinstance(format, Integer) and not format.symmetric:
        return asymmetric(format, lowest, highest)
    return symmetric(format, max(-lowest, highest))


def range_of(histogram: Histogram, format: Format, method: str, percentile: float = PERCENTILE) -> Range:
    """The range by one of METHODS."""
    if method not in METHODS:
        raise UsageError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if not 50 < percentile <= 100:
        raise UsageError(f"percentile={percentile} is not a number above 50, up to 100")
    return METHODS[method](histogram, format, percentile)


def _absmax(histogram: Histogram, format: Format, percentile: float) -> Range:
    return histogram.lowest, histogram.highest


def _percentile(histogram: Histogram, format: Format, percentile: float) -> Range:
    """A symmetric format leaves out a share of the magnitudes, another one a share at each end."""
    if format.symmetric:
        amax = _quantile(histogram.magnitudes, histogram.edges[1:], percentile)
        return max(histogram.lowest, -amax), min(histogram.highest, amax)
    minus, plus = histogram.counts
    ends = np.concatenate([-histogram.edges[-2::-1], histogram.edges[1:]])
    highest = _quantile(np.concatenate([minus[::-1], plus]), ends, percentile)
    lowest = -_quantile(np.concatenate([plus[::-1], minus]), ends, percentile)
    return max(histogram.lowest, lowest), min(histogram.highest, highest)


def _quantile(counts: npt.NDArray[np.int64], ends: Floats, percentile: float) -> float:
    """The upper end of the bin that holds this percentile."""
    place = int(np.ceil(percentile / 100 * int(counts.sum())))
    return float(ends[int(np.searchsorted(np.cumsum(counts), max(1, place)))])


def mean_squared_error(histogram: Histogram, scaling: Scaling) -> float:
    """The mean squared difference between the numbers and what a scaling makes of them."""
    return _error(*_points(histogram), scaling)


def _points(histogram: Histogram) -> tuple[Floats, Floats]:
    """Numbers that stand for the histogram's, and the share of each."""
    minus, plus = (np.flatnonzero(counts) for counts in histogram.counts)
    parts = (np.arange(POINTS) + 0.5) / POINTS
    points = []
    for sign, bins, end in ((-1, minus, -histogram.lowest), (1, plus, histogram.highest)):
        below, above = histogram.edges[bins], np.minimum(histogram.edges[bins + 1], max(0.0, end))
        points.append(sign * (below[:, None] + (above - below)[:, None] * parts))
    counts = np.concatenate([histogram.counts[0, minus], histogram.counts[1, plus]])
    shares = np.repeat(counts / (POINTS * counts.sum()), POINTS)
    return np.concatenate(points).reshape(-1), shares


def _error(points: Floats, shares: Floats, scaling: Scaling) -> float:
    return float(np.sum(shares * (points - fake_quantise(points, scaling)) ** 2))


def _mse(histogram: Histogram, format: Format, percentile: float) -> Range:
    points = _points(histogram)

    def error(lowest: float, highest: float) -> float:
        return _error(*points, spread(format, lowest, highest))

    def error_below(highest: float, end: float) -> float:
        return error(-end, highest)

    edges = histogram.edges
    if format.symmetric:
        amax = _least(lambda end: error(-end, end), edges, histogram.amax)
        return max(histogram.lowest, -amax), min(histogram.highest, amax)
    lowest, highest = min(0.0, histogram.lowest), max(0.0, histogram.highest)
    ends = -lowest, highest
    for _ in range(2):  # each end is the best for the other
        highest = _least(partial(error, lowest), edges, ends[1])
        lowest = -_least(partial(error_below, highest), edges, ends[0])
    return lowest + 0.0, highest  # 0.0 instead of -0.0


def _least(error: Callable[[float], float], edges: Floats, end: float) -> float:
    """The end of a range, at an edge of a bin or at its present place, with the least error."""
    if end <= 0:
        return 0.0
    last = int(np.searchsorted(edges, end))
    ends = np.append(edges[max(1, last - SEARCHED) : last], end)[::-1]  # of equal errors, the widest range
    errors = {place: error(float(ends[place])) for place in range(0, len(ends), COARSE)}
    best = min(errors, key=lambda place: (errors[place], place))
    near = range(max(0, best - COARSE + 1), min(len(ends), best + COARSE))
    errors |= {place: error(float(ends[place])) for place in near if place not in errors}
    return float(ends[min(errors, key=lambda place: (errors[place], place))])


def _entropy(histogram: Histogram, format: Format, percentile: float) -> Range:
    """The range reaches as far to both sides, but no further than the numbers do."""
    amax = histogram.amax
    if amax == 0:
        return 0.0, 0.0
    cells = np.linspace(0, amax, CELLS + 1)
    upper = np.minimum(histogram.edges, amax)
    counts = np.diff(np.interp(cells, upper, np.append(0, np.cumsum(histogram.magnitudes))))
    sizes = range(LEAST_CELLS, CELLS + 1, STRIDE)
    lost = [_divergence(counts, size, spread(format, 0, float(cells[size])), amax / CELLS) for size in sizes]
    end = float(cells[sizes[int(np.argmin(lost))]])
    return max(histogram.lowest, -end), min(histogram.highest, end)


def _divergence(counts: Floats, size: int, scaling: Scaling, width: float) -> float:
    """How much of the distribution is lost in the first cells alone, quantised. Outliers count to the last cell."""
    inside = counts[:size]
    numbers = np.append(inside[:-1], inside[-1] + counts[size:].sum())
    _, groups = np.unique(fake_quantise((np.arange(size) + 0.5) * width, scaling), return_inverse=True)
    filled = (inside > 0).astype(np.float64)
    means = np.bincount(groups, inside) / np.maximum(np.bincount(groups, filled), 1)
    quantised = np.where(inside > 0, means[groups], 0)
    if not quantised.any():
        return np.inf
    shares, left = numbers / numbers.sum(), np.maximum(quantised / quantised.sum(), NEVER)
    there = shares > 0
    return float(np.sum(shares[there] * np.log(shares[there] / left[there])))


METHODS: dict[str, Callable[[Histogram, Any, float], Range]] = {
    "absmax": _absmax,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
