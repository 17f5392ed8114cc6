"""Rounds on one image repeat only what other inputs reach."""

import time
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file

from support.scenes import assert_tinted, noise, scene, tinted_by
from tilewright.runtime import TilewrightError, load
from tilewright.runtime.engines import ort
from tilewright.runtime.errors import ResourceError


@pytest.fixture
def calls(monkeypatch):
    """How often each component's engine is run."""
    counted = Counter()
    run = ort.OrtEngine.run

    def count(engine, inputs, wanted):
        counted[engine.graph.stem] += 1
        return run(engine, inputs, wanted)

    monkeypatch.setattr(ort.OrtEngine, "run", count)
    return counted


ROUNDS = [  # what is asked for, and what is done again; the image is in two tiles
    ({}, {"words": 1, "see": 2, "paint": 2}),
    ({}, {}),
    ({"prompt": "bright bright bright"}, {}),  # the program's own words, given
    ({"prompt": "dim"}, {"words": 1, "paint": 2}),
    ({"prompt": "dim", "gain": 2}, {"paint": 2}),
    ({"prompt": "dim red", "gain": 2}, {"words": 1, "paint": 2}),
    ({"gain": 2, "look": "look.safetensors"}, {"paint": 2}),
    ({"gain": 2, "look": "look.safetensors"}, {}),
    ({"gain": 2, "prompt": "dim"}, {"words": 1, "paint": 2}),
    ({}, {"words": 1, "paint": 2}),
]


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_sitting_repeats_only_what_other_inputs_reach(tinted, tmp_path, monkeypatch, calls, memory):
    monkeypatch.chdir(tmp_path)
    save_file({"look.tint": np.float32([[0.5, 0.25, 1]])}, "look.safetensors")
    image, told = scene(20, 50), []
    with load(tinted, memory=memory, threads=1) as restorer:
        sitting = restorer.sitting(image, on_progress=lambda name, done, total: told.append(name))
        for inputs, repeated in ROUNDS:
            calls.clear()
            told.clear()
            made = sitting.restore(**inputs)
            assert calls == repeated
            assert made.seconds.keys() & {"words", "see", "paint"} == repeated.keys()
            again = {"words": "text"}  # the pass is called otherwise than its component
            assert set(told) == {again.get(name, name) for name in repeated}
            assert made.tiles == {"text": 1, "see": 2, "paint": 2}
            np.testing.assert_array_equal(made.image, restorer(image, **inputs))


def test_a_sitting_is_called_with_its_inputs_by_name(tinted):
    image = noise(20, 30, 3)
    with load(tinted) as restorer:
        sitting = restorer.sitting(image)
        np.testing.assert_array_equal(
            sitting(prompt="dim red", gain=2), sitting.restore(prompt="dim red", gain=2).image
        )
        assert_tinted(sitting(prompt="dim red"), tinted_by(image, [3, 5, 1]))


def test_pictures_of_earlier_rounds_stay_as_they_were(tinted):
    with load(tinted) as restorer:
        sitting = restorer.sitting(noise(20, 30, 3))
        first = sitting(prompt="red")
        before = first.copy()
        sitting(prompt="dim")
        assert sitting(prompt="red") is not first
        np.testing.assert_array_equal(first, before)


def test_a_round_that_is_refused_leaves_the_sitting_usable(tinted, calls):
    image = noise(20, 30, 3)
    with load(tinted) as restorer:
        sitting = restorer.sitting(image)
        first = sitting(prompt="red")
        calls.clear()
        for wrong in ({"prompt": "red " * 9}, {"gian": 1}, {"gain": "high"}, {"look": "nowhere"}, {"mean": 1}):
            with pytest.raises(TilewrightError):
                sitting.restore(**wrong)
        np.testing.assert_array_equal(sitting(prompt="red"), first)
        assert calls == {}


def test_a_round_after_an_engine_failed_gives_what_a_fresh_one_gives(tinted, monkeypatch):
    image = scene(20, 50)
    with load(tinted) as restorer:
        sitting = restorer.sitting(image)
        sitting()
        run, failing = ort.OrtEngine.run, [True]

        def fail(engine, inputs, wanted):
            if engine.graph.stem == "paint" and failing:
                raise ResourceError("no room")
            return run(engine, inputs, wanted)

        monkeypatch.setattr(ort.OrtEngine, "run", fail)
        with pytest.raises(ResourceError, match="no room"):
            sitting(prompt="dim")
        failing.clear()
        np.testing.assert_array_equal(sitting(prompt="dim"), restorer(image, prompt="dim"))
        np.testing.assert_array_equal(sitting(), restorer(image))


def test_the_time_between_rounds_is_nobodys(tinted):
    with load(tinted) as restorer:
        sitting = restorer.sitting(noise(20, 30, 3))
        sitting.restore()
        time.sleep(0.5)
        began = time.perf_counter()
        seconds = sitting.restore(gain=2).seconds
        took = time.perf_counter() - began
    assert 0 < seconds["passes"] < seconds["total"] <= took + seconds["read"]  # the picture was read for the first
    phases = seconds.keys() - {"total", "words", "see", "paint"}
    assert seconds["total"] == pytest.approx(sum(seconds[name] for name in phases))
