"""The score of seams of a picture that is read band by band."""

import numpy as np
import pytest

from support.scenes import noise
from tilewright.runtime.images.seams import borders, seam_excess


def stepped(height: int, width: int, places: list[int], by: int, axis: int) -> np.ndarray:
    """Weak noise with steps at these places."""
    picture = noise(height, width, 3).astype(int) // 32 + 60
    for i, place in enumerate(places):
        span = [slice(None)] * 2
        span[axis] = slice(place, None)
        picture[tuple(span)] += by if i % 2 == 0 else -by
    return picture.astype(np.uint8)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_step_at_a_border_counts_and_one_elsewhere_does_not(axis: int) -> None:
    shape, places = (300, 200) if axis == 0 else (200, 300), [128, 192]
    for steps, least, most in ((places, 4, 9), ([100, 160], -0.1, 0.1)):
        picture = stepped(*shape, steps, 20, axis)
        found = seam_excess(picture, places if axis == 0 else [], places if axis == 1 else [], 8)
        assert least < found < most


def test_eight_bits_sixteen_bits_and_floats_have_the_same_score() -> None:
    picture = stepped(290, 150, [64, 128], 9, 0)
    scores = [
        seam_excess(p, [64, 128], [64], 16)
        for p in (picture, picture.astype(np.uint16) * 257, picture.astype(np.float64) / 255)
    ]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-9)


def test_a_picture_of_one_tile_has_no_seam() -> None:
    assert borders((0,), 64) == [] and borders((0, 48, 90), 64) == [48, 64, 90, 112]
    assert seam_excess(noise(50, 60, 3), [], [], 8) == 0
    assert seam_excess(noise(1, 1, 3), [], [], 8) == 0
