"""Tiles in batches give what they give one by one."""

from collections import Counter

import numpy as np
import pytest

from support.walked_systems import (
    IN_TOKEN,
    IN_TOKEN_CONSTANTS,
    PRIVATE_CONSTANTS,
    STEERED,
    STEERED_CONSTANTS,
    VICR,
    VICR_INPUTS,
    private,
)
from support.walks import SEED, canvas, program_of, toys, with_pass
from tilewright.runtime.bundle.program import Tiles
from tilewright.runtime.execute.walk import Job, run


def test_batches_hold_as_many_tiles_as_asked_and_the_last_the_rest():
    engines = toys(private(48, 256))
    run(program_of("private"), engines, PRIVATE_CONSTANTS, Job(canvas(48, 2272)))
    assert Counter(len(feed["image"]) for feed in engines["tokenise"].feeds) == {8: 1, 2: 1}
    assert Counter(len(feed["tokens"]) for feed in engines["step"].feeds) == {8: 25, 2: 25}
    assert Counter(len(feed["tokens"]) for feed in engines["detokenise"].feeds) == {8: 1, 2: 1}


def test_every_tile_of_a_batch_has_its_own_state():
    program = with_pass(program_of("steered"), "sample", tiles=Tiles(64, 0, batch=4))
    engines = toys(STEERED)
    run(program, engines, STEERED_CONSTANTS, Job(canvas(128, 128), SEED, steps=1))
    assert [feed["preview"].shape for feed in engines["denoise"].feeds] == [(4, 4, 8, 8)]
    np.testing.assert_array_equal(engines["aggregate"].feeds[0]["delta"], np.ones((4, 1), np.float32))


@pytest.mark.parametrize("batch", [3, 8, 50])
def test_a_batch_gives_the_bytes_of_single_tiles(batch):
    results = []
    for size in (1, batch):
        program = with_pass(program_of("private"), "restore", tiles=Tiles(256, 32, batch=size))
        results.append(run(program, toys(private(48, 256)), PRIVATE_CONSTANTS, Job(canvas(48, 2272), SEED)))
    assert results[0].tobytes() == results[1].tobytes()


def test_a_batch_of_tiles_joined_every_step_gives_the_bytes_of_single_tiles():
    results = []
    for size in (1, 4):
        program = program_of("in-token")
        for name in ("see", "sample"):
            program = with_pass(program, name, tiles=Tiles(64, 16, batch=size))
        program = with_pass(program, "modulate", tiles=Tiles(64, 16))
        results.append(run(program, toys(IN_TOKEN), IN_TOKEN_CONSTANTS, Job(canvas(112, 160), SEED, steps=4)))
    assert results[0].tobytes() == results[1].tobytes()


def test_a_row_of_a_tiles_value_is_taken_from_every_tile_of_a_batch():
    results = []
    for size in (1, 2):
        program = program_of("vicr")
        for name in ("condition", "modulate", "sample", "decode"):
            program = with_pass(program, name, tiles=Tiles(64, 16, batch=size))
        results.append(run(program, toys(VICR), {}, Job(canvas(112, 160), SEED, steps=4, inputs=VICR_INPUTS)))
    assert results[0].tobytes() == results[1].tobytes()
