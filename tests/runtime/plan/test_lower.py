"""Lowering: every tile of every step once, no circle, no more waits than overlaps, against rectangles by hand."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.walks import program_of
from tilewright.runtime.bundle.program import Call, Grid, Pass, Program, State, Steps, Tiles
from tilewright.runtime.plan.lower import beneath, lower, regions
from tilewright.runtime.plan.passes import plan_of
from tilewright.runtime.plan.tiles import TilePlan, tile_plan

GRIDS = {"image": Grid(1, 3, "input"), "result": Grid(1, 3), "z": Grid(8, 3, "noise")}
STEP = Call("step", {"z": "z"}, {"z": "z"})
SHOW = Call("show", {"z": "z"}, {"image": "result"})


def joined(tiles, others):
    """A grid that every step joins, then a pass with other tiles."""
    sample = Pass("sample", tiles, Steps("flow_shift", 3), each=(STEP,))
    return Program(1, 8, GRIDS, (sample, Pass("show", others, once=(SHOW,))))


def private(tiles):
    """A state that each tile keeps to itself."""
    grids = {name: GRIDS[name] for name in ("image", "result")}
    sample = Pass("sample", tiles, Steps("flow_shift", 3), {"z": State((3, "h/8", "w/8"))}, each=(STEP,), last=(SHOW,))
    return Program(1, 8, grids, (sample,))


def lowered(program, height, width, steps=3):
    plans = {p.name: plan_of(program, p, height, width, None, None) for p in program.passes}
    return lower(program, plans, {p.name: steps for p in program.passes if p.steps})


def meet(one, other):
    """Whether two tiles share a pixel."""
    down = one.top < other.top + other.height and other.top < one.top + one.height
    return down and one.left < other.left + other.width and other.left < one.left + one.width


@st.composite
def plans(draw):
    """Two plans of one image."""
    height, width = (8 * draw(st.integers(1, 40)) for _ in range(2))

    def one():
        tile = 8 * draw(st.integers(1, 12))
        return tile_plan(width, height, tile, 8 * draw(st.integers(0, tile // 16)), 8)

    return one(), one()


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(plans())
def test_tiles_beneath_are_those_that_share_a_pixel(pair: tuple[TilePlan, TilePlan]) -> None:
    above, below = pair
    over = beneath(above, below)
    for tile in above.tiles:
        touched = [other.index for other in below.tiles if meet(tile, other)]
        assert over.below(tile.index) == touched and over.count_below(tile.index) == len(touched)
    for tile in below.tiles:
        touched = [other.index for other in above.tiles if meet(tile, other)]
        assert over.above(tile.index) == touched and over.count_above(tile.index) == len(touched)


@settings(max_examples=100, deadline=None)
@given(plans())
def test_regions_part_the_image_and_each_needs_no_later_tile(pair: tuple[TilePlan, TilePlan]) -> None:
    plan = pair[0]
    parts = regions(plan)
    areas = [(b - t) * (r - e) for t, b in parts.rows for e, r in parts.columns]
    assert sum(areas) == plan.height * plan.width and len(areas) == len(plan.tiles)
    over = beneath(parts, plan)
    assert all(max(over.below(i)) == i for i in range(len(areas)))


@st.composite
def graphs(draw):
    height, width = (8 * draw(st.integers(1, 24)) for _ in range(2))

    def tiles():
        side = 8 * draw(st.integers(1, 8))
        return Tiles(side, 8 * draw(st.integers(0, side // 16)))

    program = joined(tiles(), tiles()) if draw(st.booleans()) else private(tiles())
    return lowered(program, height, width, draw(st.integers(1, 4)))


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_every_tile_of_every_step_is_there_once_and_waits_for_earlier_nodes_only(graph) -> None:
    nodes = list(graph.nodes())
    assert len(nodes) == graph.count()
    assert max(Counter((n.pass_name, n.section, n.step, n.tile) for n in nodes).values()) == 1
    for p in graph.program.passes:
        count = len(graph.plans[p.name].tiles)
        stepped = [n for n in nodes if n.pass_name == p.name and n.section == "each"]
        assert len(stepped) == (count * graph.steps[p.name] if p.each else 0)
    before = set()
    for block in graph.blocks:
        for node in (n for n in nodes if (n.section, n.step) == (block.section, block.step)):
            if graph.program.passes[block.place].name == node.pass_name:
                assert set(node.waits) <= before  # so there is no circle
        before |= {(block.number, tile) for tile in range(block.size)}


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_a_node_waits_for_its_overlap_and_no_more(graph) -> None:
    numbers = {block.number: block for block in graph.blocks}
    for node in graph.nodes():
        plan, waits = graph.plans[node.pass_name], dict.fromkeys(node.waits)
        for number, tile in waits:
            writer = numbers[number]
            assert meet(plan.tiles[node.tile], writer.plan.tiles[tile])
    step = [n for n in graph.nodes() if n.pass_name == "sample" and n.step == 1 and n.section == "each"]
    shared = "z" in graph.program.grids
    for node in step:
        tiles = graph.plans["sample"].tiles
        expected = {t.index for t in tiles if meet(t, tiles[node.tile])} if shared else {node.tile}
        assert {tile for _, tile in node.waits} == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 3))
def test_a_wider_overlap_only_adds_waits(rows: int, columns: int, wider: int) -> None:
    """Of plans with as many tiles in the same places, as the program's tiles move together."""
    narrow = TilePlan(rows * 64, columns * 64, 64, 64, 0, *(tuple(64 * i for i in range(n)) for n in (rows, columns)))
    wide = TilePlan(rows * 64, columns * 64, 64 + 8 * wider, 64 + 8 * wider, 8, narrow.tops, narrow.lefts)
    for tile in range(len(narrow.tiles)):
        assert set(beneath(narrow, narrow).below(tile)) <= set(beneath(wide, wide).below(tile))


@pytest.mark.parametrize("system", ["hitoksr", "in-token", "in-token-fixed", "vicr", "steered", "instantir", "toksr"])
def test_every_systems_program_lowers_to_nodes_that_can_all_run(system: str) -> None:
    program = program_of(system)
    graph = lowered(program, 2048, 3072, 4)
    done: set[tuple[int, int]] = set()
    order = iter(graph.nodes())
    for block in graph.blocks:
        for tile in range(block.size):
            assert set(next(order).waits) <= done
            done.add((block.number, tile))
    assert {graph.program.passes[b.place].name for b in graph.blocks} == {p.name for p in program.passes}


def test_ranks_count_the_nodes_on_the_longest_way_to_the_end() -> None:
    graph = lowered(joined(Tiles(64, 16), Tiles(64, 0)), 64, 256, 5)
    assert graph.ranks == (6, 5, 4, 3, 2, 1)
