import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.runtime.errors import UsageError
from tilewright.runtime.plan.noise import BLOCK, _normal_from_words, normal, philox4x32

WORD = st.integers(0, 2**32 - 1)
FIELD = {"region": 0, "stream": 0, "channels": 1, "top": 0, "left": 0, "height": 64, "width": 64}


def philox_reference(counter, key):
    """The textbook's Philox4x32-10, on Python integers."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * x0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = hi1 ^ x1 ^ k0, lo1, hi0 ^ x3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_words_are_those_of_random123s_known_answers(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert philox_reference(counter, key) == tuple(words)
    result = philox4x32(np.array(counter, np.uint32), tuple(key))
    assert result.dtype == np.uint32
    assert result.tolist() == words


@settings(deadline=None, max_examples=50)
@given(counters=st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=6), key=st.tuples(WORD, WORD))
def test_the_words_are_those_of_a_textbook_philox(counters, key):
    expected = [list(philox_reference(counter, key)) for counter in counters]
    assert philox4x32(np.array(counters, np.uint32), key).tolist() == expected


def test_leading_axes_of_the_counters_are_kept():
    counters = np.arange(24, dtype=np.uint32).reshape(2, 3, 4)
    assert philox4x32(counters, (1, 2))[1, 2].tolist() == list(philox_reference((20, 21, 22, 23), (1, 2)))


@settings(deadline=None, max_examples=30)
@given(seed=WORD, region=WORD, stream=WORD, top=st.integers(0, 2**31), left=st.integers(0, 2**31))
def test_a_value_is_box_mullers_cosine_of_its_own_counter(seed, region, stream, top, left):
    field = normal(seed, region=region, stream=stream, channels=2, top=top, left=left, height=2, width=3)
    assert field.shape == (2, 2, 3)
    assert field.dtype == np.float32
    for (channel, y, x), value in np.ndenumerate(field):
        w0, w1, _, _ = philox_reference((left + x, top + y, channel, stream), (seed, region))
        u1, u2 = (w0 + 1) / 2**32, w1 / 2**32
        expected = math.sqrt(-2 * math.log(u1)) * math.cos(2 * math.pi * u2)
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-12)  # float32 rounds to 6e-8


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_crop_of_a_field_is_the_field_asked_for_directly(data):
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    h, w = data.draw(st.integers(1, height - y)), data.draw(st.integers(1, width - x))
    whole = normal(7, region=3, stream=2, channels=2, top=100, left=200, height=height, width=width)
    crop = normal(7, region=3, stream=2, channels=2, top=100 + y, left=200 + x, height=h, width=w)
    np.testing.assert_array_equal(crop, whole[:, y : y + h, x : x + w])


def test_a_crop_that_spans_several_blocks_of_rows_is_the_same_field():
    whole = normal(5, region=0, stream=0, channels=1, top=0, left=0, height=40, width=5000)
    crop = normal(5, region=0, stream=0, channels=1, top=5, left=4000, height=30, width=900)
    np.testing.assert_array_equal(crop, whole[:, 5:35, 4000:4900])


def test_a_field_wider_than_a_block_is_the_same_field():
    whole = normal(5, region=0, stream=0, channels=1, top=0, left=0, height=3, width=BLOCK + 70)
    crop = normal(5, region=0, stream=0, channels=1, top=1, left=BLOCK - 10, height=2, width=80)
    np.testing.assert_array_equal(crop, whole[:, 1:, BLOCK - 10 :])


def test_the_values_are_standard_normal():
    n = 4 * 256 * 256
    values = normal(2026, region=0, stream=0, channels=4, top=0, left=0, height=256, width=256).astype(np.float64)
    # the standard errors of the first four moments of n normal values; five of them is one failure in a million seeds
    assert abs(values.mean()) < 5 * math.sqrt(1 / n)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((values**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / n)


def test_the_rarest_words_give_the_largest_finite_value_and_zero():
    values = _normal_from_words(np.array([0, 2**32 - 1], np.uint64), np.zeros(2, np.uint64))
    np.testing.assert_allclose(values, [math.sqrt(64 * math.log(2)), 0], rtol=1e-12)


def test_neighbours_in_any_direction_are_uncorrelated():
    values = normal(11, region=0, stream=0, channels=4, top=0, left=0, height=128, width=128).astype(np.float64)
    bound = 5 / math.sqrt(values.size / 2)
    for axis in range(3):
        first, second = np.moveaxis(values, axis, 0)[:-1], np.moveaxis(values, axis, 0)[1:]
        assert abs((first * second).mean()) < bound


@pytest.mark.parametrize("change", [{"region": 1}, {"stream": 1}, {"top": 64}, {"left": 64}])
def test_another_region_stream_or_place_is_another_field(change):
    assert not np.any(normal(3, **FIELD) == normal(3, **FIELD | change))


def test_another_seed_is_another_field_and_the_same_seed_the_same():
    assert not np.any(normal(3, **FIELD) == normal(4, **FIELD))
    np.testing.assert_array_equal(normal(3, **FIELD), normal(3, **FIELD))


def test_channels_differ_and_do_not_depend_on_how_many_there_are():
    three = normal(3, **FIELD | {"channels": 3})
    assert not np.any(three[0] == three[1])
    np.testing.assert_array_equal(three[:1], normal(3, **FIELD))


def test_seeds_at_both_ends_of_the_range_are_taken_also_as_numpy_integers():
    assert np.isfinite(normal(0, **FIELD)).all()
    np.testing.assert_array_equal(normal(np.uint32(2**32 - 1), **FIELD), normal(2**32 - 1, **FIELD))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_does_not_fit_in_32_bits_is_refused(seed):
    with pytest.raises(UsageError, match=re.escape(f"seed={seed} does not fit in 32 bits; use a whole number from 0")):
        normal(seed, **FIELD)


def test_a_place_left_of_the_field_is_refused():
    with pytest.raises(UsageError, match="left=-1 does not fit"):
        normal(0, **FIELD | {"left": -1})
