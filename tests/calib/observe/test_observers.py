"""Observations: the same bytes for any split and any order, and what the file says."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tilewright.calib.observe.observers import Observation, Observations, read_observations
from tilewright.calib.scales.histograms import BINS, NotFinite, histogram_of, merged
from tilewright.runtime.errors import InputError

FACTS = {"bundle": "ab12", "images": [{"name": "a.png"}]}
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ODD = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.1754943508222875e-38, 3.4028234663852886e38, -3.4028234663852886e38])
ARRAYS = st.lists(st.one_of(FINITE, ODD), min_size=1, max_size=40).map(lambda numbers: np.array(numbers, np.float32))


def written(observations: Observations, folder: Path) -> bytes:
    observations.write(folder / "s.safetensors", FACTS)
    return (folder / "s.safetensors").read_bytes()


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_split_and_any_order_of_merging_gives_the_same_bytes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    rows = data.draw(st.lists(ARRAYS.map(lambda a: np.resize(a, (len(a), 3))), min_size=1, max_size=5))
    seen = [(f"t{i % 2}", i // 2 % 2, array) for i, array in enumerate(rows)]
    whole = Observations()
    for tensor, step, array in seen:
        whole.add(tensor, step, array, -1)

    pieces = []
    for tensor, step, array in seen:
        cut = data.draw(st.integers(0, len(array)))
        pieces += [(tensor, step, part) for part in (array[:cut], array[cut:])]
    shards = [Observations() for _ in range(data.draw(st.integers(1, 4)))]
    for tensor, step, part in data.draw(st.permutations(pieces)):
        shards[data.draw(st.integers(0, len(shards) - 1))].add(tensor, step, part, -1)
    while len(shards) > 1:  # any tree of merging
        one = shards.pop(data.draw(st.integers(0, len(shards) - 1)))
        other = shards[data.draw(st.integers(0, len(shards) - 1))]
        other.merge(one)
    assert written(shards[0], folder) == written(whole, folder)


@settings(max_examples=200, deadline=None)
@given(array=ARRAYS)
def test_every_number_is_counted_between_the_edges_of_its_bin(array: np.ndarray) -> None:
    histogram = histogram_of(array)
    assert histogram.counts.shape == (2, BINS) and histogram.counts.sum() == array.size
    assert (histogram.lowest, histogram.highest) == (array.min(), array.max())
    assert (np.diff(histogram.edges) >= 0).all()
    magnitudes = np.sort(np.abs(array.astype(np.float64)))
    bins = np.repeat(np.arange(BINS), histogram.magnitudes)  # the bin of each, in the same order
    ends = histogram.edges[bins + 1]
    assert (histogram.edges[bins] <= magnitudes).all() and (magnitudes <= ends).all()
    first = bins == 0
    assert (magnitudes[first] <= histogram.amax * 2.0**-32).all() or not magnitudes.any()
    width = (ends - histogram.edges[bins])[~first]
    assert (width <= np.maximum(magnitudes[~first] / 64, 2.0**-132)).all()


def test_a_larger_number_that_comes_later_moves_the_range_up() -> None:
    small, large = histogram_of(np.array([1.0, -0.5], np.float32)), histogram_of(np.array([1e30], np.float32))
    both = merged(small, large)
    assert both.counts[:, 0].tolist() == [1, 1] and both.counts.sum() == 3
    assert (both.lowest, both.highest, both.top) == (-0.5, float(np.float32(1e30)), large.top)
    assert np.array_equal(both.counts, histogram_of(np.array([1e30, -0.5, 1.0], np.float32)).counts)


def test_many_numbers_are_counted_block_by_block() -> None:
    numbers = np.random.default_rng(0).normal(0, 1, 2**20 + 12345).astype(np.float32)
    histogram = histogram_of(numbers)
    for sign, counts in zip((-1, 1), histogram.counts, strict=True):
        of_sign = numbers[np.signbit(numbers) == (sign < 0)].astype(np.float64)
        expected, _ = np.histogram(sign * of_sign, histogram.edges)
        assert np.array_equal(counts, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_and_leave_nothing(value: float) -> None:
    observations = Observations()
    with pytest.raises(NotFinite, match=rf"{value}, 2 of 5 numbers are not finite"):
        observations.add("t", 0, np.array([1, value, 2, value, 3], np.float32))
    assert not observations.tensors


def test_the_file_is_as_its_description_says(tmp_path: Path) -> None:
    observations = Observations()
    a = np.array([[1.0, -8.0], [2.0, 4.0]], np.float32)
    observations.add("net/a", 3, a, 1)
    observations.add("net/a", 0, 2 * a, 1)
    observations.add("b:c", 0, np.float32([[7]]))
    observations.write(tmp_path / "s.safetensors", FACTS)
    tensors = load_file(tmp_path / "s.safetensors")
    assert set(tensors) == {
        *(f"net/a:{part}" for part in ("steps", "range", "top", "counts", "channels")),
        *(f"b:c:{part}" for part in ("steps", "range", "top", "counts")),
    }
    assert tensors["net/a:steps"].tolist() == [0, 3]
    assert tensors["net/a:range"].tolist() == [[-16, 8], [-8, 4]]
    assert tensors["net/a:channels"].tolist() == [[4, 16], [2, 8]]
    assert tensors["net/a:counts"].sum((1, 2)).tolist() == [4, 4]

    read, facts = read_observations(tmp_path / "s.safetensors")
    assert facts == FACTS and read.tensors == ["b:c", "net/a"] and read.steps("net/a") == [0, 3]
    read.write(tmp_path / "again.safetensors", facts)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()


def test_steps_can_be_joined() -> None:
    observations = Observations()
    parts = np.random.default_rng(3).normal(0, 1, (4, 10, 6)).astype(np.float32)
    for step, part in enumerate(parts):
        observations.add("t", step, part * 10**step, -1)
    late = np.concatenate([parts[2] * 100, parts[3] * 1000])
    joined, expected = observations.over("t", [2, 3, 9]), Observation(histogram_of(late), np.abs(late).max(0))
    assert np.array_equal(joined.histogram.counts, expected.histogram.counts)
    assert np.array_equal(joined.channels, expected.channels)
    assert observations.over("t").histogram.counts.sum() == parts.size


def test_a_tensor_with_other_channels_is_refused() -> None:
    observations = Observations()
    observations.add("t", 1, np.ones((2, 3), np.float32), -1)
    with pytest.raises(InputError, match="'t' at step 1 was seen with 3 and with 4 channels"):
        observations.add("t", 1, np.ones((2, 4), np.float32), -1)


def test_a_file_that_holds_something_else_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(InputError, match="cannot be read"):
        read_observations(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="damaged or holds no statistics; collect them again"):
        read_observations(path)
    observations = Observations()
    observations.add("t", 0, np.ones(3, np.float32))
    whole = written(observations, tmp_path)
    path.write_bytes(whole[:-8])
    with pytest.raises(InputError, match="damaged"):
        read_observations(path)
