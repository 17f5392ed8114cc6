"""The tiles that a walk takes, the tables for their sizes, and how they are joined."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.walked_systems import FIXED, HITOKSR, IN_TOKEN, IN_TOKEN_CONSTANTS, first_rows, in_token_reference
from support.walks import PAINT, PAINTING, SEED, Canvas, Toy, canvas, field, program_of, toys, with_pass
from tilewright.runtime.bundle.program import Call, Grid, Pass, Program, State, Steps, Tiles
from tilewright.runtime.errors import UsageError
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.plan.passes import least_px, plan_of


def test_passes_of_one_program_have_their_own_tiles():
    program = with_pass(program_of("in-token"), "encode", tiles=Tiles(32, 0))
    for name in ("modulate", "see", "sample"):
        program = with_pass(program, name, tiles=Tiles(64, 16))
    program = with_pass(program, "decode", tiles=Tiles(128, 64, (160, 112)))
    engines = toys(IN_TOKEN)
    run(program, engines, IN_TOKEN_CONSTANTS, Job(canvas(112, 160), SEED, steps=3))
    fed = {name: next(iter(engines[name].feeds[0].values())) for name in ("encode", "see", "step", "decode")}
    sizes = {name: array.shape[2:] for name, array in fed.items()}
    assert sizes == {"encode": (32, 32), "see": (64, 64), "step": (8, 8), "decode": (14, 20)}
    assert {name: len(engine.feeds) for name, engine in engines.items()} == {
        "modulate": 1,
        "encode": 4 * 5,
        "see": 2 * 3,
        "redux": 2 * 3,
        "step": 2 * 3 * 3,
        "decode": 1,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "tokens"), [(None, 4096), (1024, 4096), (512, 1024)])
def test_a_table_is_that_of_the_tiles_token_count(tile, tokens):
    image = canvas(1024, 1040)
    engines = toys(FIXED)
    job = Job(image, SEED, tile_px=tile, steps=2)
    result = run(program_of("in-token-fixed"), engines, first_rows(2), job)
    rows = {feed["modulation"].tobytes() for feed in engines["step"].feeds}
    table = first_rows(2)[f"modulation.{tokens}"]
    assert rows == {row.tobytes() for row in table[0]}
    expected = in_token_reference(image.astype(np.float64), tile or 1024, 256, 2, table=table.astype(np.float64))
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_a_table_of_no_size_serves_all_tiles_and_one_of_their_size_comes_before_it():
    program = with_pass(program_of("in-token"), "sample", tiles=Tiles(64, 0))
    program = replace(program, passes=program.passes[1:])  # without the call that makes it
    program = with_pass(with_pass(program, "see", tiles=Tiles(64, 0)), "encode", tiles=Tiles(64, 0))
    whole, fitting, other = (np.random.default_rng(i).random((1, 3, 2), np.float32) for i in range(3))
    for tables, read in (
        ({"modulation": whole}, whole),
        ({"modulation": whole, "modulation.17": other, "modulation.1": other, "modulation.x16": other}, whole),
        ({"modulation": whole, "modulation.16": fitting}, fitting),
        ({"modulation.16": fitting, "modulation.17": other}, fitting),
    ):
        engines = toys(IN_TOKEN)
        run(program, engines, IN_TOKEN_CONSTANTS | tables, Job(canvas(64, 128), SEED, steps=3))
        rows = sorted(feed["modulation"][0].tolist() for feed in engines["step"].feeds)
        assert rows == sorted(read[0].repeat(2, axis=0).tolist())


@pytest.mark.parametrize(
    ("height", "width", "tile", "expected"),
    [
        (1024, 1024, None, (1024, 1024, 256, 1)),
        (1024, 1792, None, (1024, 1024, 256, 2)),
        (2560, 1440, None, (1024, 1024, 256, 6)),  # nothing is taken whole
        (1024, 1024, 512, (512, 512, 256, 9)),
        (512, 528, 512, (512, 512, 256, 2)),
    ],
)
def test_tiles_of_fixed_sides_are_never_cut_to_the_image(height, width, tile, expected):
    assert plan_sizes(program_of("in-token-fixed"), "sample", height, width, tile) == expected


@pytest.mark.parametrize("tile", [16, 496, 528, 768, 2048])
def test_a_tile_of_another_side_than_the_fixed_ones_is_refused(tile):
    with pytest.raises(UsageError, match=rf"^tile={tile} is not one of the sizes this bundle is made for: \[1024, 512"):
        run(program_of("in-token-fixed"), {}, first_rows(2), Job(canvas(2048, 2048), tile_px=tile))


def test_an_image_is_padded_up_to_a_tile_of_fixed_sides():
    fixed, free = program_of("in-token-fixed"), program_of("in-token")
    assert [least_px(fixed, tile) for tile in (None, 1024, 512)] == [1024, 1024, 512]
    assert [least_px(free, tile) for tile in (None, 1024, 512)] == [1, 1, 1]
    mixed = with_pass(with_pass(free, "encode", tiles=Tiles(512, 0, fixed_px=(512,))), "see", tiles=None)
    assert least_px(mixed, None) == 512


# Tile plans


def plan_sizes(program, name, height, width, tile=None, overlap=None):
    (p,) = (p for p in program.passes if p.name == name)
    plan = plan_of(program, p, height, width, tile, overlap)
    return plan.tile_height, plan.tile_width, plan.overlap, len(plan.tiles)


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap", "expected"),
    [
        (1440, 2560, None, None, (1440, 2560, 0, 1)),
        (2560, 1440, None, None, (2560, 1440, 0, 1)),  # whole either way round
        (2560, 1456, None, None, (1024, 1024, 256, 6)),
        (1440, 2576, None, None, (1024, 1024, 256, 8)),
        (1456, 1456, None, None, (1024, 1024, 256, 4)),
        (1440, 2560, 1024, None, (1024, 1024, 256, 6)),  # a tile that is asked for wins over whole
        (1440, 2560, 1024, 64, (1024, 1024, 64, 6)),
        (1440, 2560, 1024, 0, (1024, 1024, 0, 6)),
        (64, 96, 32, None, (32, 32, 16, 15)),  # no more than half of the tile
        (96, 96, 48, None, (48, 48, 16, 9)),  # and a multiple
    ],
)
def test_a_plan_follows_the_program_unless_the_job_asks(height, width, tile, overlap, expected):
    assert plan_sizes(program_of("in-token"), "sample", height, width, tile, overlap) == expected


def test_a_pass_without_tiles_has_one_whatever_the_job_asks():
    assert plan_sizes(program_of("vicr"), "text", 4096, 4096, 64, 16) == (4096, 4096, 0, 1)


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (40, None, "tile=40 is not a positive multiple of 16; use 48"),
        (0, None, "tile=0 is not a positive multiple of 16; use 16"),
        (-16, None, "tile=-16 is not a positive multiple of 16; use 16"),
        (64, 48, "overlap=48 does not fit tile=64; use a multiple of 16 from 0 to 32"),
        (64, -16, "overlap=-16 does not fit tile=64"),
    ],
)
def test_tiles_that_cannot_be_meant_are_refused(tile, overlap, message):
    with pytest.raises(UsageError, match=message):
        run(program_of("hitoksr"), toys(HITOKSR), {}, Job(canvas(64, 64), tile_px=tile, overlap_px=overlap))


# Joins


@st.composite
def layouts(draw):
    """Padded images of up to 300 pixels a side, a multiple, and the tiles of two passes."""
    multiple = draw(st.sampled_from([1, 2, 8, 16]))
    height, width = (-(-draw(st.integers(1, 300 - multiple)) // multiple) * multiple for _ in range(2))
    tiles = []
    for _ in range(2):
        cells = draw(st.integers(max(1, 24 // multiple), 320 // multiple))
        whole = draw(st.none() | st.tuples(st.integers(1, 300), st.integers(1, 300)))
        overlap = draw(st.integers(0, cells // 2)) * multiple
        tiles.append(Tiles(cells * multiple, overlap, whole, draw(st.integers(1, 5))))
    return height, width, multiple, tiles


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(1, 3))
def test_a_program_that_changes_nothing_gives_its_canvas_back(layout, workers):
    height, width, multiple, (there, back) = layout
    px = math.gcd(multiple, 8)
    same = (
        Pass("there", there, once=(Call("fold", {"image": "image"}, {"cells": "cells"}),)),
        Pass("back", back, once=(Call("unfold", {"cells": "cells"}, {"image": "result"}),)),
    )
    grids = {"image": Grid(1, 3, "input"), "cells": Grid(px, 3 * px * px), "result": Grid(1, 3)}

    def fold(image):
        batch, _, h, w = image.shape
        blocks = image.reshape(batch, 3, h // px, px, w // px, px).transpose(0, 1, 3, 5, 2, 4)
        return {"cells": blocks.reshape(batch, -1, h // px, w // px)}

    def unfold(cells):
        batch, _, h, w = cells.shape
        blocks = cells.reshape(batch, 3, px, px, h, w).transpose(0, 1, 4, 2, 5, 3)
        return {"image": blocks.reshape(batch, 3, h * px, w * px)}

    image = canvas(height, width)
    engines = toys({"fold": fold, "unfold": unfold})
    result = run(Program(1, multiple, grids, same), engines, {}, Job(image), devices=workers)
    np.testing.assert_allclose(result, image, atol=1e-6)


def painted(height, width, **options):
    """Every tile painted in the column it starts at, and a hundred times its row."""
    places = 100 * np.arange(height)[:, None] + np.arange(width)
    places = np.stack([places] * 3).astype(np.float32).view(Canvas)
    brush = Toy(lambda image: {"image": np.broadcast_to(image[:, :, :1, :1], image.shape)})
    return run(PAINTING, {"paint": brush}, {}, Job(places, **options))


def test_without_overlap_tiles_stand_side_by_side():
    expected = np.kron([[0, 16, 32], [1600, 1616, 1632]], np.ones((16, 16)))
    np.testing.assert_array_equal(painted(32, 48), [expected] * 3)


def test_without_overlap_a_shifted_tile_shares_its_cells_evenly():
    np.testing.assert_array_equal(painted(16, 40)[0, 0], [0] * 16 + [16] * 8 + [20] * 8 + [24] * 8)


def test_an_overlap_is_crossed_by_a_raised_cosine():
    rise = [0.5 - 0.5 * math.cos(math.pi * (i + 0.5) / 8) for i in range(8)]
    across, down = painted(16, 24, overlap_px=8)[0, 0], painted(24, 16, overlap_px=8)[0, :, 0]
    np.testing.assert_allclose(across / 8, [*[0] * 8, *rise, *[1] * 8], atol=1e-6)
    np.testing.assert_allclose(down / 800, [*[0] * 8, *rise, *[1] * 8], atol=1e-6)


def test_grids_start_as_zeros_or_as_the_seeds_noise():
    grids = PAINTING.grids | {"n": Grid(1, 3, "noise"), "o": Grid(8, 2, "zeros")}
    once = (Call("paint", {"noise": "n", "zeros": "o"}, {"image": "result"}),)
    program = replace(PAINTING, grids=grids, passes=(replace(PAINT, once=once),))
    engine = Toy(lambda noise, zeros: {"image": noise})
    result = run(program, {"paint": engine}, {}, Job(canvas(32, 48), SEED))
    np.testing.assert_array_equal(result, field(0, 0, 3, 32, 48))
    assert all(feed["zeros"].shape == (1, 2, 2, 2) and not feed["zeros"].any() for feed in engine.feeds)


def test_a_step_reads_the_grids_as_they_were_before_it():
    """Two calls of a step write two grids; neither sees what the other wrote until the next step."""
    each = (
        Call("one", {"a": "a", "b": "b"}, {"sum": "a"}),
        Call("one", {"a": "a", "b": "b"}, {"sum": "b"}),
    )
    show = Pass("show", once=(Call("show", {"a": "a", "b": "b"}, {"image": "result"}),))
    program = Program(
        1,
        8,
        PAINTING.grids | {"a": Grid(1, 3, "noise"), "b": Grid(1, 3, "zeros")},
        (Pass("walk", Tiles(16, 8), Steps("flow_shift", 5), each=each), show),
    )
    engines = toys({"one": lambda a, b: {"sum": 0.5 * a + b}, "show": lambda a, b: {"image": a - 3 * b}})
    result = run(program, engines, {}, Job(canvas(16, 40), SEED))
    a, b = field(0, 0, 3, 16, 40).astype(np.float64), np.zeros((3, 16, 40))
    for _ in range(5):
        a, b = 0.5 * a + b, 0.5 * a + b
    np.testing.assert_allclose(result, a - 3 * b, atol=1e-5)


def test_once_of_a_joined_pass_may_prepare_the_grid_that_its_steps_walk():
    walk = Pass(
        "walk",
        Tiles(16, 8),
        Steps("flow_shift", 2),
        {"kept": State((3, "h/1", "w/1"), "ones")},
        once=(Call("start", {"image": "image"}, {"image": "z"}),),
        each=(Call("add", {"z": "z", "kept": "kept"}, {"z": "z", "kept": "kept"}),),
        last=(Call("end", {"kept": "kept"}, {"image": "result"}),),
    )
    program = Program(1, 8, PAINTING.grids | {"z": Grid(1, 3, "zeros")}, (walk,))
    functions = {
        "start": lambda image: {"image": image},
        "add": lambda z, kept: {"z": 2 * z, "kept": kept + z},
        "end": lambda kept: {"image": kept},
    }
    image = canvas(24, 40)
    np.testing.assert_allclose(run(program, toys(functions), {}, Job(image)), 1 + image + 2 * image, atol=1e-5)
