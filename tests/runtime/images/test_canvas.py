"""Enlarged and padded canvases; oracles are Pillow's bicubic and loops over pixels."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from support.pictures import filled, noise, whole
from tilewright.runtime.images.canvas import Enlarged, fill, padded
from tilewright.runtime.images.read import Picture
from tilewright.runtime.images.write import assemble

# Upsampling


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_enlarging_is_pillows_bicubic(scale: int) -> None:
    rgb = noise(15, 17, 3)
    expected = np.asarray(Image.fromarray(rgb).resize((17 * scale, 15 * scale), Image.Resampling.BICUBIC))
    assert np.array_equal(filled(whole(rgb, scale, 1), 15 * scale, 17 * scale), expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 4]), st.sampled_from([1, 8, 16]), st.data())
def test_a_crop_is_what_the_whole_has_there(height: int, width: int, scale: int, multiple: int, data: Any) -> None:
    """Crops at the edges, inside, reaching into the padding, and in the padding of a least side."""
    enlarged = Enlarged(noise(height, width, 3), scale, multiple, data.draw(st.sampled_from([1, 50, 96])))
    _, rows, columns = enlarged.shape
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    high, wide = data.draw(st.integers(1, rows - top)), data.draw(st.integers(1, columns - left))
    expected = enlarged.crop(0, 0, rows, columns)[:, top : top + high, left : left + wide]
    assert np.array_equal(enlarged.crop(top, left, high, wide), expected)


def test_a_picture_filled_part_by_part_is_the_picture_filled_at_once() -> None:
    canvas = np.random.default_rng(0).uniform(-0.2, 1.2, (3, 32, 48)).astype(np.float32)
    rgb = np.full((29, 41, 3), 77, np.uint8)
    for top in (0, 16):
        for left in (0, 20, 40, 44):  # the last two reach past the picture, and one begins there
            fill(rgb, top, left, canvas[:, top : top + 16, left : left + 20])
    assert np.array_equal(rgb, filled(canvas, 29, 41))


def test_alpha_is_enlarged_to_fit_with_the_same_filter() -> None:
    rgb, alpha = noise(6, 9, 3), noise(2, 3)
    expected = np.asarray(Image.fromarray(alpha).resize((9, 6), Image.Resampling.BICUBIC))
    assert np.array_equal(assemble(rgb, Picture(rgb, alpha, False, None))[..., 3], expected)


# Canvases


def reflected(index: int, side: int, padded: int) -> int:
    if padded - side > side - 1:
        return min(index, side - 1)
    return index if index < side else 2 * (side - 1) - index


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23), st.integers(1, 23), st.sampled_from([1, 2, 7, 8, 16]))
def test_a_canvas_is_reflected_or_repeats_the_edge(height: int, width: int, multiple: int) -> None:
    rgb = noise(height, width, 3)
    canvas = whole(rgb, 1, multiple)
    _, rows, columns = canvas.shape
    assert canvas.dtype == np.float32 and canvas.flags.c_contiguous
    assert rows % multiple == 0 and 0 <= rows - height < multiple
    assert columns % multiple == 0 and 0 <= columns - width < multiple
    for y in range(rows):
        for x in range(columns):
            expected = rgb[reflected(y, height, rows), reflected(x, width, columns)]
            assert np.array_equal(canvas[:, y, x], expected.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize(
    ("side", "multiple", "least", "expected"),
    [
        (1, 1, 1, 1),
        (17, 16, 1, 32),
        (17, 16, 32, 32),
        (17, 16, 48, 48),
        (64, 16, 48, 64),  # a side longer than the least is padded to the multiple alone
        (65, 16, 64, 80),
        (17, 16, 40, 48),  # the least is itself padded
    ],
)
def test_a_side_is_padded_to_the_multiple_and_to_the_least(side: int, multiple: int, least: int, expected: int) -> None:
    assert padded(side, multiple, least) == expected
    assert Enlarged(noise(side, 3, 3), 1, multiple, least).shape == (
        3,
        expected,
        max(-(-3 // multiple) * multiple, -(-least // multiple) * multiple),
    )


@pytest.mark.parametrize(("height", "width", "scale"), [(20, 33, 1), (33, 20, 1), (5, 40, 1), (1, 1, 1), (10, 13, 2)])
def test_a_canvas_with_a_least_side_is_reflected_where_that_reaches_and_else_repeats_the_edge(
    height: int, width: int, scale: int
) -> None:
    rgb = noise(height, width, 3)
    canvas = whole(rgb, scale, 8, 48)
    large = np.asarray(Image.fromarray(rgb).resize((width * scale, height * scale), Image.Resampling.BICUBIC))
    large = rgb if scale == 1 else large
    assert canvas.shape == (3, 48, 48)
    rows, columns = ([reflected(i, side * scale, 48) for i in range(48)] for side in (height, width))
    expected = large[np.ix_(rows, columns)].transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    assert np.array_equal(canvas, expected)
    assert np.array_equal(filled(canvas, height * scale, width * scale), large)  # what was padded is cut off again


def test_a_canvas_survives_the_way_back_at_any_strides() -> None:
    rgb = noise(600, 41, 3)[::2, ::-1]
    canvas = whole(rgb, 1, 8)
    assert np.array_equal(filled(canvas, 300, 41), rgb)


def test_a_canvas_is_clamped_rounded_and_left_alone() -> None:
    values = np.array([-np.inf, -1, -0.001, 0, 0.49 / 255, 0.51 / 255, 127.5 / 255, 1, 1.001, 7, np.inf, np.nan])
    canvas = np.broadcast_to(values.astype(np.float32), (3, 2, 12)).copy()
    before = canvas.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb = filled(canvas, 1, 12)
    assert rgb[0, :, 1].tolist() == [0, 0, 0, 0, 0, 1, 128, 255, 255, 255, 255, 0]
    assert rgb.shape == (1, 12, 3) and np.array_equal(canvas, before, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_a_canvas_rounds_to_the_nearest(height: int, width: int, seed: int) -> None:
    canvas = np.random.default_rng(seed).uniform(-0.2, 1.2, (3, height + 2, width + 3)).astype(np.float32)
    expected = np.floor(np.clip(canvas[:, :height, :width], 0, 1) * np.float32(255) + np.float32(0.5))
    assert np.array_equal(filled(canvas, height, width), expected.transpose(1, 2, 0))
