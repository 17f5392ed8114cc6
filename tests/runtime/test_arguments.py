"""A bundle's arguments as keywords of Python: they lead the picture, and what cannot be meant is one line."""

import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from support.scenes import noise
from tilewright.runtime import Restorer, encode_image, load
from tilewright.runtime.bundle import read
from tilewright.runtime.bundle.arguments import Argument
from tilewright.runtime.bundle.program import Input
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.errors import UsageError
from tilewright.runtime.inputs import checked, whole
from tilewright.runtime.profile import profile

IMAGE = noise(20, 30, 3)


@pytest.fixture
def restorer(tinted):
    with load(tinted) as restorer:
        yield restorer


def test_a_restorer_says_what_its_bundle_takes(restorer: Restorer) -> None:
    assert restorer.arguments == {
        "prompt": Argument("words", "the tint in words", "bright bright bright"),
        "look": Argument("tensors", "what a prompt becomes"),
        "gain": Argument("number", "100% is 1", 1.0, least=-8, most=8),
    }
    assert list(restorer.arguments) == ["prompt", "look", "gain"]


def test_arguments_are_keywords_everywhere(restorer: Restorer) -> None:
    plain, dim = restorer(IMAGE), restorer(IMAGE, prompt="dim red", gain=2)
    assert (plain != dim).any()
    np.testing.assert_array_equal(restorer(IMAGE, prompt=None, gain=None, look=None), plain)
    np.testing.assert_array_equal(restorer.restore(IMAGE, prompt="dim red", gain=2).image, dim)
    np.testing.assert_array_equal(restorer.sitting(IMAGE)(prompt="dim red", gain=2), dim)
    np.testing.assert_array_equal(restorer.sitting(IMAGE, prompt="dim red")(gain=2), dim)
    sitting = restorer.sitting(IMAGE, prompt="dim red", gain=2)
    np.testing.assert_array_equal(sitting(), dim)
    np.testing.assert_array_equal(sitting(prompt="bright bright bright", gain=1.0), plain)  # a round chooses others
    np.testing.assert_array_equal(sitting.restore().image, dim)
    assert profile(restorer, [(30, 20)], runs=5, prompt="dim red", gain=2)["resolutions"][0]["width"] == 30


def test_a_round_of_other_words_than_the_sittings_file_is_the_words(restorer: Restorer, tmp_path) -> None:
    save_file({"look.tint": np.float32([[0.5, 0.25, 1]])}, tmp_path / "look.safetensors")
    looked = restorer(IMAGE, look=tmp_path / "look.safetensors")
    np.testing.assert_array_equal(restorer.sitting(IMAGE, prompt="dim")(look=tmp_path / "look.safetensors"), looked)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"promt": "dim"}, "unknown argument 'promt'; this bundle takes prompt, look, gain"),
        ({"inputs": {"prompt": "dim"}}, "unknown argument 'inputs'; this bundle takes prompt, look, gain"),
        ({"prompt": 3}, "prompt=3 is not words; give a str"),
        ({"prompt": b"dim"}, "prompt=b'dim' is not words; give a str"),
        ({"gain": "high"}, "gain='high' is not a number from -8 to 8"),
        ({"gain": "2"}, "gain='2' is not a number from -8 to 8"),
        ({"gain": True}, "gain=True is not a number from -8 to 8"),
        ({"gain": 8.25}, "gain=8.25 is not a number from -8 to 8"),
        ({"gain": np.float32(-9)}, "gain=-9.0 is not a number from -8 to 8"),
        ({"gain": math.nan}, "gain=nan is not finite as float32; give a number from -8 to 8"),
        ({"gain": [1, 2]}, "gain has shape [2]; give a number from -8 to 8"),
        ({"look": 7}, "look=7 is not a safetensors file; give its path"),
        ({"seed": 1.5}, "seed=1.5 is not a whole number from 0 to 4294967295"),
        ({"seed": True}, "seed=True is not a whole number from 0 to 4294967295"),
        ({"seed": -1}, "seed=-1 is not a whole number from 0 to 4294967295"),
        ({"seed": "7"}, "seed='7' is not a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed=4294967296 is not a whole number from 0 to 4294967295"),
        ({"tile": 32.0}, "tile=32.0 is not a whole number of at least 0"),
        ({"overlap": "8"}, "overlap='8' is not a whole number of at least 0"),
        ({"scale": 1.5}, "scale=1.5 is not a whole number of at least 0"),
        ({"steps": 3}, "steps=3: sharpen has no steps; leave it out"),
    ],
)
def test_a_keyword_that_cannot_be_meant_is_one_line(restorer: Restorer, keywords, message: str) -> None:
    for act in (restorer, restorer.restore, lambda *_, **k: restorer.sitting(IMAGE, **k)()):
        with pytest.raises(UsageError) as caught:
            act(IMAGE, **keywords)
        assert str(caught.value) == message


def test_a_bundle_without_arguments_says_so(bundle) -> None:
    with load(bundle) as restorer, pytest.raises(UsageError) as caught:
        restorer(IMAGE, prompt="dim")
    assert str(caught.value) == "unknown argument 'prompt'; this bundle takes no arguments of its own"


def test_numbers_of_numpy_are_numbers(restorer: Restorer) -> None:
    expected = restorer(IMAGE, gain=0.5, seed=3, tile=16, overlap=0)
    given = {"gain": np.float64(0.5), "seed": np.int64(3), "tile": np.uint8(16), "overlap": np.int32(0)}
    np.testing.assert_array_equal(restorer(IMAGE, **given), expected)
    assert whole("seed", np.uint32(7), 0) == 7


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2.5, "count=2.5 is not a whole number of at least 1"),
        (0, "count=0 is not a whole number of at least 1"),
        (2**63, f"count={2**63} is not a whole number of at least 1"),
        (np.ones(70), "count has shape [70]; give a whole number of at least 1"),
    ],
)
def test_an_integer_is_whole_and_in_its_range(value, message: str) -> None:
    taken = Input("int64", default=3, least=1)
    assert checked("count", "count=2", taken, 2).tolist() == 2
    assert checked("count", "count=2.0", taken, 2.0).dtype == np.int64
    with pytest.raises(UsageError) as caught:
        checked("count", f"count={value}", taken, value)
    assert str(caught.value) == message


def test_a_range_is_compared_in_the_inputs_own_type() -> None:
    taken = Input("float32", default=0.0, least=0, most=0.1)
    assert checked("share", "share=0.1", taken, 0.1) == np.float32(0.1)
    with pytest.raises(UsageError, match=r"^share=0\.10001 is not a number from 0 to 0\.1$"):
        checked("share", "share=0.10001", taken, 0.10001)


def test_a_picture_comes_and_goes_as_bytes(restorer: Restorer, tmp_path) -> None:
    content = encode_image(IMAGE, "png")
    (tmp_path / "in.png").write_bytes(content)
    expected = restorer(tmp_path / "in.png", prompt="dim")
    np.testing.assert_array_equal(restorer(content, prompt="dim"), expected)
    with (tmp_path / "in.png").open("rb") as file:
        np.testing.assert_array_equal(restorer(file, prompt="dim"), expected)
    np.testing.assert_array_equal(restorer(encode_image(expected, ".png")), restorer(expected))


def test_a_bundle_that_was_read_is_not_read_again(tinted, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(tinted)
    expected = load(bundle)(IMAGE)
    monkeypatch.setattr(read, "bytes_of", None)
    monkeypatch.setattr(read, "check_files", None)
    with load(bundle) as restorer:
        assert restorer.bundle is bundle
        np.testing.assert_array_equal(restorer(IMAGE), expected)
