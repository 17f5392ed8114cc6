"""Our own numeric options, given as whatever Python lets a caller give: taken as what they say, or one line."""

import math
from functools import partial

import numpy as np
import pytest

from tilewright.runtime import load
from tilewright.runtime.errors import TilewrightError, UsageError
from tilewright.runtime.folder import restore_images
from tilewright.runtime.profile import profile
from tilewright.runtime.restore import Restorer
from tilewright.runtime.simulate import graph_of

IMAGE = np.zeros((8, 8, 3), np.uint8)
NO_NUMBERS = ["2", b"2", [2], 1 + 0j, math.nan, math.inf, -math.inf, True, np.bool_(True), np.array([2])]
NOT_WHOLE = [*NO_NUMBERS, 1.5, 2.0, np.float32(2), -1]
WHOLE = [2, np.int64(2), np.uint8(2)]
HUGE = 10**30


def text_of(act, *arguments, **options) -> str:
    with pytest.raises(UsageError) as caught:
        act(*arguments, **options)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200
    return str(caught.value)


@pytest.fixture
def restorer(bundle):
    with load(bundle, threads=1) as restorer:
        yield restorer


@pytest.mark.parametrize("name", ["batch", "threads", "memory_limit"])
def test_load_takes_whole_numbers(bundle, name) -> None:
    for value in NOT_WHOLE:
        if name == "memory_limit" and value == "2":  # a text is an amount of memory
            value = "two"
        assert name in text_of(load, bundle, **{name: value})


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_load_takes_numbers_of_numpy(bundle, value) -> None:
    with load(bundle, batch=value, threads=value, memory_limit=np.int64(2**40), deadline_s=value) as restorer:
        assert restorer(IMAGE).shape == (16, 16, 3)


def test_a_deadline_is_seconds_above_0(bundle) -> None:
    for value in (*NO_NUMBERS, 0, -1, 0.0, HUGE):
        assert text_of(load, bundle, deadline_s=value).endswith("is not a number of seconds above 0 to 100000000")


def test_the_time_between_checkpoints_is_seconds_from_0(restorer, tmp_path) -> None:
    for value in (*NO_NUMBERS, -1, HUGE):
        said = text_of(restorer.submit(IMAGE).keeping, tmp_path / "parts", every_s=value)
        assert said.startswith("every_s") and said.endswith("is not a number of seconds from 0 to 100000000")
        assert text_of(restore_images, restorer, [(tmp_path / "a", tmp_path / "b")], keep_every_s=value)


@pytest.mark.parametrize("name", ["seed", "steps", "tile", "overlap", "scale", "max_pixels"])
def test_a_restoration_takes_whole_numbers(restorer, name) -> None:
    for value in NOT_WHOLE:
        assert f"{name}" in text_of(restorer.submit, IMAGE, **{name: value})


@pytest.mark.parametrize("name", ["seed", "steps", "overlap", "scale"])
def test_a_number_beyond_all_sizes_is_refused(restorer, name) -> None:
    assert f"{name}={HUGE}" in text_of(restorer.submit, IMAGE, **{name: HUGE})


@pytest.mark.parametrize("name", ["threads", "batch"])
def test_more_than_any_machine_has_is_refused(bundle, name) -> None:
    assert f"{name}={HUGE}" in text_of(load, bundle, **{name: HUGE})


def test_profiles_and_estimates_take_whole_numbers(restorer: Restorer) -> None:
    program = restorer.bundle.program
    for value in (*NOT_WHOLE, 0):
        assert "runs" in text_of(profile, restorer, [(16, 16)], runs=value)
        for size in ((value, 16), (16, value)):
            assert "is no image size; use 1x1 or more" in text_of(restorer.estimate, *size)
        assert "steps" in text_of(partial(graph_of, program, 16, 16), steps=value)


def test_devices_are_a_list_of_names(bundle) -> None:
    for value in ("cpu:0", b"cpu:0", [0], None, 5, (), [b"cpu:0"]):
        assert "cpu:0" in text_of(load, bundle, devices=value)


def test_a_number_of_the_bundle_is_a_number(tinted) -> None:
    with load(tinted, threads=1) as restorer:
        for value in (*NO_NUMBERS[1:6], True, np.bool_(True), HUGE, "loud"):
            with pytest.raises(TilewrightError, match="gain") as caught:
                restorer(IMAGE, scale=2, gain=value)
            assert caught.value.exit_code == 2


def test_small_integers_of_numpy_do_not_overflow_in_an_estimate(restorer: Restorer) -> None:
    assert restorer.estimate(np.uint8(200), np.int16(300)).needed_bytes == restorer.estimate(200, 300).needed_bytes
