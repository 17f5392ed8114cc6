"""The training images: fixed splits, batches by number, degradations that degrade."""

import itertools

import numpy as np
import pytest
from train import data
from train.metrics import psnr


def test_no_image_is_in_two_splits():
    names = [name for split in data.PHOTOGRAPHS.values() for name in split]
    assert len(names) == len(set(names))
    assert len(set(data.SEEDS.values())) == len(data.SEEDS)
    first = {split: data.FAMILIES["leaves"](data.random(seed, 0, 0)).tobytes() for split, seed in data.SEEDS.items()}
    assert len(set(first.values())) == len(first)


@pytest.mark.parametrize("family", data.FAMILIES)
def test_a_made_image_depends_on_its_key_alone_and_has_something_to_see(family):
    make, number = data.FAMILIES[family], list(data.FAMILIES).index(family)
    images = [make(data.random(9, number, i)) for i in (0, 0, 1)]
    assert images[0].shape == (data.SIDE, data.SIDE, 3)
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    assert images[0].min() >= 0 and images[0].max() <= 1 and images[0].std() > 1e-3


def test_a_batch_depends_on_its_numbers_alone():
    first, again, other = (data.batch(4, n, 6, 64, "held-out") for n in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    sharp, soft, kinds = first
    assert sharp.shape == soft.shape == (6, 64, 64, 3) and sharp.dtype == soft.dtype == np.uint8
    assert kinds.shape == (6,) and kinds.min() >= 0 and kinds.max() <= len(data.FAMILIES)


def test_squares_lie_side_by_side_and_leave_what_does_not_fit():
    image = np.arange(7 * 10 * 3).reshape(7, 10, 3)
    found = data.squares(image, 3)
    expected = [image[top : top + 3, left : left + 3] for top in (0, 3) for left in (0, 3, 6)]
    assert np.array_equal(found, expected)


def test_what_is_kept_back_is_degraded_and_a_quarter_as_large():
    for name, sharp, small in itertools.islice(data.kept_back("held-out"), 5):
        assert small.shape == (sharp.shape[0] // 4, sharp.shape[1] // 4, 3), name
        assert 10 < psnr(data.enlarged(small), sharp) < 40, name
