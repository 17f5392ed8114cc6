"""Tiles that move from step to step: where they lie, and what a walk makes of them."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.walked_systems import IN_TOKEN, IN_TOKEN_CONSTANTS, in_token_reference
from support.walks import SEED, canvas, program_of, toys, with_pass
from tilewright.runtime.bundle.program import Tiles
from tilewright.runtime.errors import UsageError
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.plan.tiles import moved, tile_plan, weights

HEIGHT, WIDTH, TILE, OVERLAP = 160, 256, 64, 32


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(2, 12), st.data(), st.integers(0, 2**32 - 1), st.integers(0, 50)
)
def test_moved_tiles_cover_the_picture_and_share_half_of_the_overlap(rows, columns, cells, data, seed, step) -> None:
    overlap = data.draw(st.integers(0, cells // 2))
    plan = tile_plan(columns * 8, rows * 8, cells * 8, overlap * 8, 8)
    there = moved(plan, 8, seed, step)
    assert there == moved(plan, 8, seed, step)
    assert (len(there.tops), len(there.lefts)) == (len(plan.tops), len(plan.lefts))
    for starts, before, size, length in (
        (there.tops, plan.tops, plan.tile_height, plan.height),
        (there.lefts, plan.lefts, plan.tile_width, plan.width),
    ):
        assert starts[0] == 0 and starts[-1] == length - size
        assert all(start % 8 == 0 for start in starts)
        assert all(0 < after - start <= size - overlap * 8 / 2 for start, after in pairwise(starts))
        assert all(abs(start - at) <= overlap * 8 / 2 for start, at in zip(starts, before, strict=True))
    for axis, starts, length in zip(weights(there, 8), (there.tops, there.lefts), (rows, columns), strict=True):
        total = np.zeros(length)
        for weight, start in zip(axis, starts, strict=True):
            total[start // 8 : start // 8 + len(weight)] += weight
        np.testing.assert_allclose(total, 1, atol=1e-6)


def test_tiles_lie_elsewhere_at_every_step_and_with_every_seed() -> None:
    plan = tile_plan(4096, 4096, 1024, 256, 16)
    lefts = {(seed, step): moved(plan, 16, seed, step).lefts for seed in range(3) for step in range(28)}
    assert len({starts[1] for starts in lefts.values()}) == 17  # all multiples of 16 from -128 to 128
    assert all(len({lefts[seed, step] for step in range(28)}) > 10 for seed in range(3))


def walked(devices: int, jitter: bool, steps: int = 4) -> np.ndarray:
    program = program_of("in-token")
    for name in ("modulate", "encode", "see", "sample", "decode"):
        program = with_pass(program, name, tiles=Tiles(TILE, OVERLAP))
    job = Job(canvas(HEIGHT, WIDTH), SEED, steps=steps, jitter=jitter)
    return run(program, toys(IN_TOKEN), IN_TOKEN_CONSTANTS, job, devices=devices)


def test_a_walk_with_moving_tiles_is_as_computed_step_by_step_on_whole_grids() -> None:
    plan = tile_plan(WIDTH, HEIGHT, TILE, OVERLAP, program_of("in-token").multiple_px)

    def places(step: int) -> list[tuple[int, int, int, int]]:
        there = moved(plan, program_of("in-token").multiple_px, SEED, step)
        return [(top, left, TILE, TILE) for top in there.tops for left in there.lefts]

    assert len({tuple(places(step)) for step in range(4)}) > 1
    result, still = walked(1, True), walked(1, False)
    expected = in_token_reference(canvas(HEIGHT, WIDTH).astype(np.float64), TILE, OVERLAP, 4, places=places)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert np.abs(result - still).max() > 1e-4


def test_the_bytes_do_not_depend_on_the_number_of_devices() -> None:
    assert walked(1, True).tobytes() == walked(3, True).tobytes()


def test_a_program_without_joined_steps_has_nothing_that_moves(restorer) -> None:
    with pytest.raises(UsageError, match=r"jitter=True: \w+ has no pass that joins its tiles after every step"):
        restorer(np.zeros((8, 8, 3), np.uint8), jitter=True)
