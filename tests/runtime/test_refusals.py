"""Images and options that cannot be meant are refused in one line."""

import numpy as np
import pytest

from support.scenes import noise
from tilewright.runtime import TilewrightError, load
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.engines.machine import usable_cores
from tilewright.runtime.errors import InputError, UsageError
from tilewright.runtime.memory.estimate import estimate

CORES = usable_cores()


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 7), np.uint8), 3, None, "nowhere.png"],
    ids=["floats", "empty", "seven planes", "number", "nothing", "missing file"],
)
def test_what_is_no_image_is_refused(restorer, image):
    with pytest.raises(InputError) as caught:
        restorer(image)
    assert caught.value.exit_code == 8
    assert len(str(caught.value).splitlines()) == 1


def test_an_image_of_more_pixels_than_allowed_is_refused(restorer):
    restorer(noise(4, 5, 3), max_pixels=20)
    with pytest.raises(InputError, match="over the limit of 19"):
        restorer(noise(4, 5, 3), max_pixels=19)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": "medium"}, "memory='medium' is not one of fast, low"),
        ({"threads": -1}, "threads=-1 is not a whole number from 0 to 1024"),
        ({"batch": 0}, "batch=0 is not a whole number from 1 to 32"),
        ({"batch": 33}, "batch=33 is not a whole number from 1 to 32"),
        ({"devices": []}, "no device is named; use cpu:0"),
        ({"devices": ["gpu:0"]}, rf"device 'gpu:0' is unknown; there are cpu:0 to cpu:{CORES - 1}"),
        ({"devices": ["cpu"]}, rf"device 'cpu' is unknown; there are cpu:0 to cpu:{CORES - 1}"),
        (
            {"devices": [f"cpu:{CORES}"]},
            rf"device 'cpu:{CORES}': there are {CORES} cores; use cpu:0 to cpu:{CORES - 1}",
        ),
        ({"devices": ["cpu:0", "cpu:0"]}, "device 'cpu:0' is named twice; name it once"),
    ],
)
def test_options_of_loading_that_cannot_be_meant_are_refused(bundle, options, words):
    with pytest.raises(UsageError, match=f"^{words}$") as caught:
        load(bundle, **options)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": 60}, "tile=60 is not a positive multiple of 8; use 64"),
        ({"tile": 0}, "tile=0 is not a positive multiple of 8; use 8"),
        ({"overlap": 40}, "overlap=40 does not fit tile=64"),
        ({"strength": 1}, "unknown argument 'strength'; this bundle takes no arguments of its own"),
    ],
)
def test_options_of_restoring_that_cannot_be_meant_are_refused(restorer, options, words):
    with pytest.raises(UsageError, match=words):
        restorer(noise(4, 4, 3), **options)


@pytest.mark.parametrize("scale", [1, 3, 4, 0])
def test_another_scale_than_the_bundles_is_refused(restorer, scale):
    restorer(noise(4, 4, 3), scale=2)
    with pytest.raises(UsageError, match=f"^scale={scale} does not work with this bundle; use 2$"):
        restorer(noise(4, 4, 3), scale=scale)


@pytest.mark.parametrize("scale", [0, -1, 17])
def test_a_scale_beyond_reason_is_refused(tinted, scale):
    with pytest.raises(UsageError, match=f"^scale={scale} does not work with this bundle; use 1 to 16$"):
        estimate(read_bundle(tinted), 10, 10, scale=scale)


def test_loading_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(TilewrightError, match=r"no bundle\.json there"):
        load(tmp_path)
