import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.runtime.errors import UsageError
from tilewright.runtime.plan.tiles import Tile, TilePlan, starts, tile_plan, weights


@st.composite
def plans(draw, largest=5000):
    """Plans of images up to 5000 pixels a side, padded to the multiple, of at most a few hundred tiles an axis."""
    multiple = draw(st.sampled_from([1, 2, 8, 16, 64]))
    cells = draw(st.integers(max(1, 16 // multiple), 1024 // multiple))
    overlap = draw(st.integers(0, cells // 2))
    width, height = (-(-draw(st.integers(1, largest)) // multiple) * multiple for _ in range(2))
    px = draw(st.sampled_from([px for px in (1, 2, 8, 16) if multiple % px == 0]))
    return tile_plan(width, height, cells * multiple, overlap * multiple, multiple), px


def ramp_reference(start_cells, tile, overlap):
    """Weights of an axis, one cell at a time."""
    raw = []
    for index in range(len(start_cells)):
        weight = [1.0] * tile
        for i in range(overlap):
            w = 0.5 - 0.5 * math.cos(math.pi * (i + 0.5) / overlap)
            if index > 0:
                weight[i] = w
            if index < len(start_cells) - 1:
                weight[tile - 1 - i] = w
        raw.append(weight)
    total = [0.0] * (start_cells[-1] + tile)
    for start, weight in zip(start_cells, raw, strict=True):
        for i, w in enumerate(weight):
            total[start + i] += w
    return [
        [w / total[start + i] for i, w in enumerate(weight)] for start, weight in zip(start_cells, raw, strict=True)
    ]


def axis_sum(start_cells, axis_weights, length):
    total = np.zeros(length)
    for start, weight in zip(start_cells, axis_weights, strict=True):
        total[start : start + len(weight)] += weight
    return total


@settings(deadline=None, max_examples=100)
@given(plans())
def test_tiles_are_equal_lie_inside_and_cover_every_pixel(case):
    layout, _ = case
    for axis, tile, length in (
        (layout.tops, layout.tile_height, layout.height),
        (layout.lefts, layout.tile_width, layout.width),
    ):
        assert axis[0] == 0
        assert axis[-1] + tile == length
        assert all(0 < after - before <= tile - layout.overlap for before, after in pairwise(axis))


@settings(deadline=None, max_examples=100)
@given(plans())
def test_weights_of_an_axis_sum_to_one_at_every_cell_and_are_never_negative(case):
    layout, px = case
    rows, columns = weights(layout, px)
    assert (len(rows), len(columns)) == (len(layout.tops), len(layout.lefts))
    for axis, axis_weights, length in ((layout.tops, rows, layout.height), (layout.lefts, columns, layout.width)):
        assert all(weight.dtype == np.float32 and (weight >= 0).all() for weight in axis_weights)
        np.testing.assert_allclose(axis_sum([s // px for s in axis], axis_weights, length // px), 1, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(plans(largest=120))
def test_outer_products_sum_to_one_over_the_image(case):
    layout, px = case
    rows, columns = weights(layout, px)
    total = np.zeros((layout.height // px, layout.width // px), np.float32)
    for tile in layout.tiles:
        r, c = divmod(tile.index, len(layout.lefts))
        y, x = tile.top // px, tile.left // px
        total[y : y + tile.height // px, x : x + tile.width // px] += np.outer(rows[r], columns[c])
    np.testing.assert_allclose(total, 1, atol=1e-6)


@settings(deadline=None, max_examples=100)
@given(length=st.integers(1, 5000), tile=st.integers(16, 1024), data=st.data())
def test_an_axis_has_the_fewest_tiles_that_keep_the_overlap(length, tile, data):
    overlap = data.draw(st.integers(0, tile // 2))
    expected = 1 if length <= tile else math.ceil((length - overlap) / (tile - overlap))
    assert len(starts(length, tile, overlap)) == expected


@pytest.mark.parametrize(
    ("width", "height", "columns", "rows"),
    [(3840, 2160, 5, 3), (7680, 4320, 10, 6), (12288, 6912, 16, 9), (1024, 1024, 1, 1)],
)
def test_4k_8k_and_12k_have_the_specifications_number_of_tiles(width, height, columns, rows):
    layout = tile_plan(width, height, 1024, 256, 16)
    assert (len(layout.lefts), len(layout.tops)) == (columns, rows)
    assert len(layout.tiles) == columns * rows


def test_last_tile_shifts_inwards_instead_of_shrinking():
    assert starts(100, 40, 8) == (0, 32, 60)  # the nominal third start is 64
    assert starts(104, 40, 8) == (0, 32, 64)
    assert starts(41, 40, 0) == (0, 1)


def test_tiles_come_in_row_major_order():
    layout = tile_plan(64, 48, 32, 0, 16)
    assert layout == TilePlan(48, 64, 32, 32, 0, (0, 16), (0, 32))
    assert layout.tiles == (
        Tile(0, 0, 0, 32, 32),
        Tile(1, 0, 32, 32, 32),
        Tile(2, 16, 0, 32, 32),
        Tile(3, 16, 32, 32, 32),
    )


def test_a_tile_shrinks_to_a_side_that_is_shorter():
    layout = tile_plan(64, 16, 32, 16, 16)
    assert (layout.tile_height, layout.tile_width) == (16, 32)
    assert (layout.tops, layout.lefts) == ((0,), (0, 16, 32))


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(100, 40, 8), (104, 40, 8), (77, 40, 20), (90, 17, 5), (41, 40, 0)]
)
def test_ramps_are_those_of_a_loop_over_the_cells(length, tile, overlap):
    layout = tile_plan(length, 1, tile, overlap, 1)
    _, columns = weights(layout, 1)
    np.testing.assert_allclose(columns, ramp_reference(layout.lefts, tile, overlap), atol=6e-8)  # half a float32 ulp


def test_ramps_are_sampled_per_cell_of_the_grid():
    coarse, _ = weights(tile_plan(16, 160, 64, 16, 16), 8)
    cells, _ = weights(tile_plan(1, 20, 8, 2, 1), 1)
    for ours, theirs in zip(coarse, cells, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("size", [16, 1024])
def test_a_single_tile_has_weights_of_exactly_one(size):
    rows, columns = weights(tile_plan(size, size, 1024, 256, 16), 8)
    for (weight,) in (rows, columns):
        np.testing.assert_array_equal(weight, np.ones(size // 8, np.float32))


def test_without_overlap_only_a_shifted_tile_shares_its_cells():
    _, columns = weights(tile_plan(10, 1, 4, 0, 1), 1)
    assert [column.tolist() for column in columns] == [[1, 1, 1, 1], [1, 1, 0.5, 0.5], [0.5, 0.5, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 64, 32, 0, 16), "width=100 is not a positive multiple of 16; use 112"),
        ((64, 0, 32, 0, 16), "height=0 is not a positive multiple of 16; use 16"),
        ((64, 64, 40, 0, 16), "tile=40 is not a positive multiple of 16; use 48"),
        ((64, 64, 64, 8, 16), "overlap=8 does not fit tile=64; use a multiple of 16 from 0 to 32"),
        ((64, 64, 64, 48, 16), "overlap=48 does not fit tile=64; use a multiple of 16 from 0 to 32"),
        ((64, 64, 64, -16, 16), "overlap=-16 does not fit tile=64; use a multiple of 16 from 0 to 32"),
        ((64, 64, 64, 0, 0), "multiple=0 is no size; use 1 or more"),
    ],
)
def test_plans_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        tile_plan(*arguments)


@pytest.mark.parametrize("px", [0, 24, 64])
def test_a_grid_whose_cells_do_not_fit_the_plan_is_refused(px):
    with pytest.raises(UsageError, match=f"px={px} does not divide the tile plan; use a divisor of 16"):
        weights(tile_plan(160, 160, 64, 16, 16), px)


def test_a_plan_counts_its_tiles_without_listing_them() -> None:
    plan = tile_plan(1000, 4000, 64, 16, 8)
    assert plan.count == len(plan.tops) * len(plan.lefts) and "tiles" not in vars(plan)
    assert plan.count == len(plan.tiles)


@pytest.mark.parametrize(("width", "height"), [(5_000_000, 64), (64, 5_000_000)])
def test_a_side_of_too_many_tiles_is_refused(width: int, height: int) -> None:
    most = 48 * 100_000 + 16
    assert len(tile_plan(most, 64, 64, 16, 8).lefts) == 100_000
    with pytest.raises(UsageError, match="a side of 5000000 px is more than 100000 tiles of 64 px; use a larger tile"):
        tile_plan(width, height, 64, 16, 8)
