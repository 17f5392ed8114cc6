"""Seams against pictures whose steps are known."""

import numpy as np
import pytest

from tilewright.export.verify.seams import PICTURES, seam_excess
from tilewright.runtime.images.seams import LEVEL
from tilewright.runtime.plan.tiles import tile_plan

PLAN = tile_plan(96, 80, 48, 16, 4)  # borders at columns 32, 48 and 80, rows 32 and 48


def test_a_picture_without_steps_has_no_seams() -> None:
    for make in PICTURES.values():
        picture = make(96, 80).transpose(2, 0, 1).astype(np.float32) / 255
        assert abs(seam_excess(picture, PLAN, 4)) < 0.6  # a ramp in 8 bits is a staircase of single levels
    assert seam_excess(np.full((3, 80, 96), 0.5, np.float32), PLAN, 4) == 0.0


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("step", [0.02, 0.3])
def test_a_step_at_every_border_of_an_axis_is_measured_in_levels(axis: int, step: float) -> None:
    borders = sorted(
        {*PLAN.tops[1:], *(t + 48 for t in PLAN.tops[:-1])}
        if axis == 1
        else {*PLAN.lefts[1:], *(left + 48 for left in PLAN.lefts[:-1])}
    )
    line = np.zeros(80 if axis == 1 else 96)
    for border in borders:
        line[border:] += step
    picture = np.broadcast_to(line[:, None] if axis == 1 else line, (3, 80, 96)).astype(np.float32)
    assert seam_excess(picture, PLAN, 4) == pytest.approx(step / LEVEL, rel=1e-4)


def test_steps_of_a_networks_own_tokens_are_no_seams() -> None:
    """Every fourth column steps, borders and others alike."""
    picture = np.broadcast_to((np.arange(96) // 4 % 2) * 0.5, (3, 80, 96)).astype(np.float32)
    assert seam_excess(picture, PLAN, 4) == pytest.approx(0, abs=1e-9)


def test_steps_beside_the_borders_count_against_them() -> None:
    down, across = np.zeros(80), np.zeros(96)
    for line, borders in ((down, (32, 48)), (across, (32, 48, 80))):
        for border in borders:
            line[border + 4 :] += 0.3
    assert seam_excess((down[:, None] + across)[None].repeat(3, 0).astype(np.float32), PLAN, 4) < -0.5


def test_one_tile_has_no_borders() -> None:
    random = np.random.default_rng(0).random((3, 48, 48), np.float32)
    assert seam_excess(random, tile_plan(48, 48, 48, 0, 4), 4) == 0.0
