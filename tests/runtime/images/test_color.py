"""Colours from the enlarged input: against sums over whole pictures, and the same for every rectangle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from support.scenes import noise, scene
from tilewright.runtime.images.color import recolored

HEIGHT, WIDTH = 90, 130
SOURCE = scene(HEIGHT // 2, WIDTH // 2)
LARGE = np.asarray(Image.fromarray(SOURCE).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
PICTURE = np.clip(LARGE.astype(int) // 2 + noise(HEIGHT, WIDTH, 3) // 4 + [40, 0, 10], 0, 255).astype(np.uint8)


def low(plane: np.ndarray) -> np.ndarray:
    """Five blurs with 1 2 1, with 0, 1, 3, 7 and 15 zeros between the weights."""
    for level in range(5):
        kernel = np.zeros(2 ** (level + 1) + 1)
        kernel[[0, 2**level, -1]] = 0.25, 0.5, 0.25
        for axis in (0, 1):
            plane = ndimage.correlate1d(plane, kernel, axis, mode="nearest")
    return plane


def test_wavelet_takes_the_low_frequencies_of_the_source() -> None:
    result = recolored("wavelet", PICTURE, SOURCE, 2)[0:HEIGHT, 0:WIDTH]
    for channel in range(3):
        picture, source = (p[..., channel].astype(float) for p in (PICTURE, LARGE))
        right = (picture - low(picture) + low(source)).clip(0, 255)
        assert np.abs(result[..., channel] - right).max() < 0.51  # rounded to the nearest level


def test_adain_takes_the_mean_and_the_spread_of_each_channel() -> None:
    result = recolored("adain", PICTURE, SOURCE, 2)[0:HEIGHT, 0:WIDTH]
    picture, source = (p.reshape(-1, 3) / 255 for p in (PICTURE, LARGE))
    spread = [np.sqrt(p.var(axis=0, ddof=1) + 1e-5) for p in (picture, source)]
    right = (PICTURE / 255 - picture.mean(0)) / spread[0] * spread[1] + source.mean(0)
    assert np.abs(result - right.clip(0, 1) * 255).max() < 0.51


def test_a_picture_of_one_pixel_gets_the_colour_of_its_source() -> None:
    for color in ("wavelet", "adain"):
        result = recolored(color, np.uint8([[[9, 9, 9]]]), np.uint8([[[200, 100, 50]]]), 1)[0:1, 0:1]
        assert result.tolist() == [[[200, 100, 50]]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("color", ["wavelet", "adain"])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_rectangle_is_what_the_whole_has_there(color: str, dtype: type, data: st.DataObject) -> None:
    scaled = (array.astype(dtype) * (np.iinfo(dtype).max // 255) for array in (PICTURE, SOURCE))
    stored = recolored(color, *scaled, 2)
    whole = stored[0:HEIGHT, 0:WIDTH]
    assert whole.dtype == dtype
    top, left = data.draw(st.integers(0, HEIGHT - 1)), data.draw(st.integers(0, WIDTH - 1))
    bottom, right = data.draw(st.integers(top + 1, HEIGHT)), data.draw(st.integers(left + 1, WIDTH))
    np.testing.assert_array_equal(stored[top:bottom, left:right], whole[top:bottom, left:right])
