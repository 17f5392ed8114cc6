"""What is made once for all tiles, once a tile and once a pass, and when it is given back."""

import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from support.walked_systems import (
    IN_TOKEN,
    IN_TOKEN_CONSTANTS,
    PRIVATE_CONSTANTS,
    VICR,
    VICR_INPUTS,
    in_token_reference,
    private,
)
from support.walks import PAINT, PAINTING, SEED, Toy, canvas, flow, mean_of, program_of, toys, with_pass
from tilewright.runtime.bundle.program import Call, Input, Pass, State, Steps, Tiles
from tilewright.runtime.execute.walk import Job, run


@pytest.mark.parametrize("workers", [1, 3])
def test_a_call_that_reads_nothing_of_a_tile_is_made_once_whatever_the_number_of_tiles(workers):
    for width, tiles in ((64, 1), (2576, 4)):
        engines = toys(IN_TOKEN)
        run(program_of("in-token"), engines, IN_TOKEN_CONSTANTS, Job(canvas(48, width), SEED), devices=workers)
        assert len(engines["see"].feeds) == len(engines["redux"].feeds) == tiles
        (feed,) = engines["modulate"].feeds
        assert feed["guidance"] == 30.0
        np.testing.assert_array_equal(feed["sigmas"][0], flow(28, 48 * min(width, 1024) // 256)[0])  # the whole table


def test_what_an_earlier_pass_with_the_same_tiles_made_is_made_once_a_tile():
    engines = toys(IN_TOKEN)
    run(program_of("in-token"), engines, IN_TOKEN_CONSTANTS, Job(canvas(48, 2576), SEED))
    made = Counter(mean_of(feed["image"]).item() for feed in engines["see"].feeds)
    assert (len(made), made.total()) == (4, 4)
    seen = Counter(feed["seen"].item() for feed in engines["step"].feeds)
    assert seen == {2 * mean: 28 for mean in made}  # every tile's own, in all of its steps


def test_a_caller_chooses_what_the_shared_call_reads():
    image = canvas(112, 160)
    job = Job(image, SEED, tile_px=64, overlap_px=16, steps=5, inputs={"guidance": 0.5})
    result = run(program_of("in-token"), toys(IN_TOKEN), IN_TOKEN_CONSTANTS, job)
    expected = in_token_reference(image.astype(np.float64), 64, 16, 5, guidance=0.5)
    np.testing.assert_allclose(result, expected, atol=1e-5)


SHARING = {
    "base": lambda level: {"value": np.full((1, 3, 1, 1), level, np.float32)},
    "more": lambda value: {"value": value + 1},
    "paint": lambda value, image: {"image": image * value},
}


def shared_calls(*once, **changes):
    """How often each engine is called, and the picture, of a pass of six tiles."""
    engines = toys(SHARING)
    inputs = {"level": Input("float32", default=0.5)}
    program = replace(PAINTING, inputs=inputs, passes=(replace(PAINT, once=once, **changes),))
    result = run(program, engines, {"half": np.float32([0.5])}, Job(canvas(32, 48)))
    return {name: len(engine.feeds) for name, engine in engines.items()}, result / np.asarray(canvas(32, 48))


PAINT_VALUE = Call("paint", {"value": "v", "image": "image"}, {"image": "result"})


@pytest.mark.parametrize("source", ["$level", "#half"])
def test_calls_that_build_on_shared_values_are_shared_too(source):
    base, more = Call("base", {"level": source}, {"value": "u"}), Call("more", {"value": "u"}, {"value": "v"})
    counts, gain = shared_calls(base, more, PAINT_VALUE)
    assert counts == {"base": 1, "more": 1, "paint": 6}
    np.testing.assert_allclose(gain, 1.5, rtol=1e-6)


def test_a_call_that_builds_on_a_tiles_value_is_made_for_every_tile():
    of_tile = Call("more", {"value": "image"}, {"value": "u"})
    counts, gain = shared_calls(of_tile, Call("more", {"value": "u"}, {"value": "v"}), PAINT_VALUE)
    assert counts == {"base": 0, "more": 12, "paint": 6}
    np.testing.assert_allclose(gain, np.asarray(canvas(32, 48)) + 2, rtol=1e-5)


def test_a_call_that_reads_fresh_noise_is_made_for_every_tile():
    counts, _ = shared_calls(Call("more", {"value": "~result"}, {"value": "v"}), PAINT_VALUE)
    assert counts == {"base": 0, "more": 6, "paint": 6}


def test_a_call_that_writes_a_grid_is_made_for_every_tile_whatever_it_reads():
    flat = Call("base", {"level": "$level"}, {"value": "result"})
    engines = {"base": Toy(lambda level: {"value": np.full((1, 3, 16, 16), level, np.float32)})}
    program = replace(
        PAINTING, inputs={"level": Input("float32", default=0.25)}, passes=(replace(PAINT, once=(flat,)),)
    )
    result = run(program, engines, {}, Job(canvas(32, 48)))
    assert len(engines["base"].feeds) == 6
    np.testing.assert_array_equal(result, np.full((3, 32, 48), 0.25, np.float32))


def test_a_call_that_writes_a_state_is_made_for_every_tile_whatever_it_reads():
    counts, gain = shared_calls(
        Call("base", {"level": "$level"}, {"value": "v"}),
        steps=Steps("flow_shift", 2),
        state={"v": State((3, 1, 1), "ones")},
        each=(Call("more", {"value": "v"}, {"value": "v"}),),
        last=(PAINT_VALUE,),
    )
    assert counts == {"base": 6, "more": 12, "paint": 6}
    np.testing.assert_allclose(gain, 0.5 + 2, rtol=1e-6)


def test_passes_with_other_tiles_read_what_was_shared():
    base = Pass("base", Tiles(8, 0), once=(Call("base", {"level": "$level"}, {"value": "v"}),))
    program = replace(PAINTING, inputs={"level": Input("float32", default=0.5)})
    program = replace(program, passes=(base, replace(PAINT, once=(PAINT_VALUE,))))
    engines = toys(SHARING)
    result = run(program, engines, {}, Job(canvas(32, 48)))
    assert len(engines["base"].feeds) == 1
    np.testing.assert_array_equal(result, np.asarray(canvas(32, 48)) * np.float32(0.5))


class Forgetful(Toy):
    """A toy that keeps nothing it is fed."""

    def run(self, inputs, wanted):
        return self.function(**inputs)


def test_a_tile_that_is_done_gives_its_values_back():
    """21 tiles; what a tile kept to itself is gone when it is joined, so that memory does not grow with the image."""
    alive, most = [], 0
    functions = private(64, 64)

    def tokenise(image, words):
        nonlocal most
        tokens = np.array(functions["tokenise"](image, words)["tokens"])
        alive.append(weakref.ref(tokens))
        most = max(most, sum(r() is not None for r in alive))
        return {"tokens": tokens}

    program = with_pass(program_of("private"), "restore", tiles=Tiles(64, 16))
    engines = toys(functions | {"tokenise": tokenise}, Forgetful)
    run(program, engines, PRIVATE_CONSTANTS, Job(canvas(64, 1024), steps=2))
    assert len(alive) == 21
    assert most <= 3  # one runs, one is prepared, one waits for its turn


def test_what_passes_with_the_same_tiles_hand_on_is_given_back_when_the_last_reader_is_done():
    alive = {"y": [], "z": []}
    counts = {"step": [], "decode": []}

    def watched(name, function, made):
        def watch(**inputs):
            outputs = function(**inputs)
            array = next(iter(outputs.values()))
            alive.setdefault(made, []).append(weakref.ref(array))
            if name in counts:
                counts[name].append({kind: sum(r() is not None for r in refs) for kind, refs in alive.items()})
            return outputs

        return watch

    made = {"encode": "y", "step": "z", "decode": "result"}
    functions = VICR | {name: watched(name, VICR[name], kind) for name, kind in made.items()}
    job = Job(canvas(64, 1024), tile_px=64, overlap_px=16, steps=2, inputs=VICR_INPUTS)
    run(program_of("vicr"), toys(functions, Forgetful), {}, job)
    assert counts["step"][0]["y"] >= 20  # all tiles are encoded before any is sampled; the last may just be
    assert counts["step"][-1]["y"] <= 3  # and the last tiles' alone is held for its last step
    first = counts["decode"][0]
    assert first["y"] <= 1 and first["z"] <= 22 and first["result"] == 1  # one more where two threads take turns
    assert max(now["result"] for now in counts["decode"]) <= 6  # what waits for its turn to be joined
