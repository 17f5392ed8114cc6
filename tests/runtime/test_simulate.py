"""The executor's queue on a virtual clock, against bounds that hold for any order of the nodes."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from tilewright.runtime.bundle.program import Call, Grid, Pass, Program, State, Steps, Tiles
from tilewright.runtime.plan.lower import lower
from tilewright.runtime.plan.tiles import tile_plan
from tilewright.runtime.simulate import Cost, simulate, svg, timeline

COST = Cost(0.9, 0.003)


def graph(rows: int, columns: int, *, private: bool = False, steps: int = 28):
    """A sampler of tiles that overlap, joined every step or each to itself, then a decoder."""
    tiles, call = Tiles(64, 16), Call("step", {"z": "z"}, {"z": "z"})
    show = (Call("show", {"z": "z"}, {"image": "result"}),)
    grids = {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}
    if private:
        state = {"z": State((3, "h/8", "w/8"), "noise")}
        passes = (Pass("sample", tiles, Steps("flow_shift", steps), state, each=(call,), last=show),)
    else:
        grids["z"] = Grid(8, 3, "noise")
        passes = (Pass("sample", tiles, Steps("flow_shift", steps), each=(call,)), Pass("show", tiles, once=show))
    plan = tile_plan(64 + 48 * (columns - 1), 64 + 48 * (rows - 1), 64, 16, 8)
    assert len(plan.tiles) == rows * columns
    return lower(Program(1, 8, grids, passes), {p.name: plan for p in passes}, {"sample": steps})


@pytest.mark.parametrize(
    ("rows", "columns", "devices", "utilisation"),
    [(1, 13, 4, 0.97), (9, 16, 8, 0.99), (9, 16, 16, 0.99), (1, 1, 1, 0.99)],
)
def test_devices_wait_little_where_a_barrier_would_make_them_wait(rows, columns, devices, utilisation) -> None:
    ran = simulate([graph(rows, columns)], devices, COST)
    assert ran.utilisation >= utilisation
    assert ran.makespan_s >= ran.bound_s


@pytest.mark.parametrize("devices", [64, 72, 100])
def test_as_many_devices_as_half_the_tiles_stay_near_the_bound(devices) -> None:
    ran = simulate([graph(9, 16)], devices, COST)
    assert ran.bound_s <= ran.makespan_s <= 1.03 * ran.bound_s


@pytest.mark.parametrize("private", [False, True])
def test_every_node_runs_once_and_after_those_it_waits_for(private) -> None:
    lowered = graph(3, 4, private=private, steps=5)
    ran = simulate([lowered], 3, COST)
    when = {(run.pass_name, run.step, tile): run for run in ran.runs for tile in run.tiles}
    nodes = [n for n in lowered.nodes() if n.section != "once" or n.pass_name == "show"]
    names = {block.number: (lowered.program.passes[block.place].name, block) for block in lowered.blocks}
    assert sum(len(run.tiles) for run in ran.runs) == lowered.count()
    for node in (n for n in nodes if n.section == "each"):
        for number, tile in node.waits:
            name, block = names[number]
            if block.section == "each":
                assert when[name, block.step, tile].end_s <= when[node.pass_name, node.step, node.tile].start_s
    for device in range(3):
        runs = sorted((r for r in ran.runs if r.device == device), key=lambda r: r.start_s)
        assert all(a.end_s <= b.start_s for a, b in pairwise(runs))


def test_images_share_the_devices() -> None:
    alone = simulate([graph(1, 1)], 4, COST)
    together = simulate([graph(1, 1) for _ in range(4)], 4, COST)
    assert together.makespan_s == pytest.approx(alone.makespan_s)
    assert alone.utilisation == pytest.approx(together.utilisation / 4)


def test_private_tiles_hold_no_more_memory_on_a_larger_image() -> None:
    some, many = (simulate([graph(1, n, private=True)], 1, COST).peak_bytes for n in (8, 80))
    assert some == many == 2 * 4 * 3 * 8 * 8  # two states: one runs, one is made ready
    joined = [simulate([graph(1, n)], 1, COST).peak_bytes for n in (8, 80)]
    assert 9 * joined[0] <= joined[1] <= 10 * joined[0]


def test_the_timeline_shows_every_device_and_every_batch() -> None:
    ran = simulate([graph(1, 4, steps=3)], 2, COST)
    lines = timeline(ran).splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1"] and all(len(line) == 77 for line in lines)
    picture = ElementTree.fromstring(svg(ran))
    bars = [bar for bar in picture.iter("{http://www.w3.org/2000/svg}rect") if bar.find("{*}title") is not None]
    assert len(bars) == len(ran.runs)


def test_bars_too_narrow_to_be_seen_are_drawn_as_one() -> None:
    ran = simulate([graph(40, 40, steps=3)], 2, COST)
    picture = ElementTree.fromstring(svg(ran))
    titles = [title.text or "" for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) < len(ran.runs) / 20
    counts = [int(found[1]) if (found := re.search(r"(\d+) tiles,", title)) else 1 for title in titles]
    assert sum(counts) == sum(len(run.tiles) for run in ran.runs)
