"""Ranges from histograms against the raw numbers: sorting, trying every range, and the textbook's entropy."""

import numpy as np
import pytest

from tilewright.calib.scales.formats import E4M3FN, E5M2, FORMATS, INT8, UINT8, Format, fake_quantise
from tilewright.calib.scales.histograms import histogram_of
from tilewright.calib.scales.ranges import METHODS, mean_squared_error, range_of, scaling_of, spread
from tilewright.runtime.errors import UsageError

BIN = 1 / 64  # the most that a bin is wide, against the numbers in it
GENERATOR = np.random.default_rng(7)
NUMBERS = {
    "normal": GENERATOR.normal(0, 1, 40_000),
    "heavy tails": GENERATOR.standard_t(3, 40_000),
    "after SiLU": (lambda x: x / (1 + np.exp(-x)))(GENERATOR.normal(0, 2, 40_000)),
    "an outlier": np.append(GENERATOR.normal(0, 0.01, 40_000), [25.0]),
    "shifted": GENERATOR.random(40_000) + 3,
    "negative": -GENERATOR.gamma(2, 5, 40_000),
}
EACH = pytest.mark.parametrize("numbers", [n.astype(np.float32) for n in NUMBERS.values()], ids=NUMBERS)


def raw_error(numbers: np.ndarray, format: Format, lowest: float, highest: float) -> float:
    fake = fake_quantise(numbers, spread(format, lowest, highest))
    return float(np.mean((numbers.astype(np.float64) - fake) ** 2))


@EACH
def test_absmax_is_exact(numbers: np.ndarray) -> None:
    for format in FORMATS.values():
        assert range_of(histogram_of(numbers), format, "absmax") == (numbers.min(), numbers.max())


@EACH
@pytest.mark.parametrize("percentile", [99.99, 99.0, 75.0, 100.0])
def test_a_percentile_is_that_of_the_sorted_numbers_within_one_bin(numbers: np.ndarray, percentile: float) -> None:
    histogram = histogram_of(numbers)
    magnitude = np.percentile(np.abs(numbers), percentile, method="inverted_cdf")
    lowest, highest = range_of(histogram, INT8, "percentile", percentile)
    amax = max(-lowest, highest)
    assert magnitude <= amax <= magnitude * (1 + BIN)
    lowest, highest = range_of(histogram, UINT8, "percentile", percentile)
    above = np.percentile(numbers, percentile, method="inverted_cdf")
    below = -np.percentile(-numbers, percentile, method="inverted_cdf")
    assert above <= highest <= above + abs(above) * BIN
    assert below >= lowest >= below - abs(below) * BIN


@EACH
@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_the_error_from_a_histogram_is_that_of_the_raw_numbers(numbers: np.ndarray, format: Format) -> None:
    histogram = histogram_of(numbers)
    for method in METHODS:
        lowest, highest = range_of(histogram, format, method)
        assert scaling_of(histogram, format, method).scale == spread(format, lowest, highest).scale
        raw = raw_error(numbers, format, lowest, highest)
        assert mean_squared_error(histogram, spread(format, lowest, highest)) == pytest.approx(raw, rel=0.05)


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("format", [INT8, E4M3FN, E5M2], ids=lambda format: format.name)
def test_no_other_symmetric_range_has_a_smaller_error(numbers: np.ndarray, format: Format) -> None:
    histogram = histogram_of(numbers)
    lowest, highest = range_of(histogram, format, "mse")
    amax = float(np.abs(numbers).max())
    ends = amax * (1 + BIN / 2) ** -np.arange(500)  # two for each bin, down to 2 % of the magnitude
    errors = [raw_error(numbers, format, -end, end) for end in ends]
    best, ours = min(errors), raw_error(numbers, format, lowest, highest)
    assert ours <= 1.03 * best
    # within one bin of the best range, or of one that is as good
    good = [end for end, error in zip(ends, errors, strict=True) if error <= 1.03 * best]
    assert min(abs(max(-lowest, highest) / end - 1) for end in good) <= BIN


@EACH
def test_no_other_asymmetric_range_has_a_smaller_error(numbers: np.ndarray) -> None:
    numbers = numbers[::4]  # there are 900 ranges to try
    lowest, highest = range_of(histogram_of(numbers), UINT8, "mse")
    ends = [(float(numbers.min()) * a, float(numbers.max()) * b) for a in GRID for b in GRID]
    best = min(raw_error(numbers, UINT8, min(0.0, low), max(0.0, high)) for low, high in ends)
    assert raw_error(numbers, UINT8, lowest, highest) <= 1.03 * best


GRID = np.linspace(0.1, 1, 30)


def divergences_of_textbook(numbers: np.ndarray, levels: int = 128) -> dict[float, float]:
    """Threshold -> divergence, as TensorRT calibrates int8: 2048 cells of raw numbers, 128 levels."""
    counts, edges = np.histogram(np.abs(numbers), 2048, (0, float(np.abs(numbers).max())))
    divergences = {}
    for size in range(levels, 2049, 16):
        reference = counts[:size].astype(float)
        reference[-1] += counts[size:].sum()
        quantised = np.zeros(size)
        for level in range(levels):  # a code stands for the cells nearest to it
            first, last = (level - 0.5) * size / (levels - 1) - 0.5, (level + 0.5) * size / (levels - 1) - 0.5
            near = np.arange(max(0, int(np.ceil(first))), min(size, int(np.ceil(last))))
            cells = near[counts[near] > 0]
            quantised[cells] = counts[cells].sum() / max(len(cells), 1)
        p, q = reference / reference.sum(), quantised / quantised.sum()
        divergences[float(edges[size])] = sum(a * np.log(a / max(b, 1e-9)) for a, b in zip(p, q, strict=True) if a)
    return divergences


MANY = {
    "heavy tails": GENERATOR.standard_t(4, 1_000_000),
    "an outlier": np.append(GENERATOR.normal(0, 0.01, 200_000), [1.0]),
    "gamma": -GENERATOR.gamma(2, 5, 1_000_000),
    "Laplace": GENERATOR.laplace(0, 1, 1_000_000),
}


@pytest.mark.parametrize("name", MANY)
def test_entropy_chooses_a_range_that_is_as_good_in_the_textbook_as_any(name: str) -> None:
    numbers = MANY[name].astype(np.float32)
    lowest, highest = range_of(histogram_of(numbers), INT8, "entropy")
    divergences = divergences_of_textbook(numbers)
    chosen = min(divergences, key=lambda threshold: abs(threshold - max(-lowest, highest)))
    assert divergences[chosen] <= 1.1 * min(divergences.values())
    assert max(divergences.values()) > 10 * min(divergences.values())


def test_entropy_cuts_a_lone_outlier_and_mse_weighs_it() -> None:
    numbers = NUMBERS["an outlier"].astype(np.float32)
    assert range_of(histogram_of(numbers), INT8, "entropy")[1] < 2
    ends = [range_of(histogram_of(numbers * [0.1**i]), INT8, "mse")[1] * 10**i for i in range(3)]
    assert ends == pytest.approx([ends[0]] * 3, rel=2 * BIN)  # a range follows its numbers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_zeros_and_a_single_number_have_a_range(method: str, format: Format) -> None:
    zeros = histogram_of(np.zeros((4, 5), np.float32))
    assert range_of(zeros, format, method) == (0, 0)
    assert np.isfinite(scaling_of(zeros, format, method).scale)
    for number in (3.0, -1e-38, 3.4e38, 1e-45):
        lowest, highest = range_of(histogram_of(np.full(7, number, np.float32)), format, method)
        assert min(lowest, 0) <= np.float32(number) * 0.99 or lowest <= number
        assert np.isfinite([lowest, highest]).all()
        assert np.isfinite(scaling_of(histogram_of(np.full(7, number, np.float32)), format, method).scale)


def test_wrong_words_are_refused_with_the_right_ones() -> None:
    histogram = histogram_of(np.ones(3, np.float32))
    with pytest.raises(UsageError, match=r"method='best' is not one of absmax, percentile, mse, entropy"):
        range_of(histogram, INT8, "best")
    with pytest.raises(UsageError, match=r"percentile=50 is not a number above 50, up to 100"):
        range_of(histogram, INT8, "percentile", 50)
