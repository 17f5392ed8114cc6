"""What a job tells while it runs: parts of the result, progress, seconds."""

import time
from dataclasses import replace

import numpy as np
import pytest

from support.walked_systems import HITOKSR, IN_TOKEN, IN_TOKEN_CONSTANTS, SYSTEMS
from support.walks import SEED, Toy, canvas, grown, program_of, toys
from tilewright.runtime.bundle.program import Call, Grid, Pass, Program, Steps, Tiles
from tilewright.runtime.execute.walk import Job, run


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_final_parts_are_the_result_each_cell_told_once(system, workers):
    functions, constants, inputs = SYSTEMS[system]
    pieces = np.full((3, 128, 192), np.nan, np.float32)

    def place(top, left, part):
        there = pieces[:, top : top + part.shape[1], left : left + part.shape[2]]
        assert there.shape == part.shape and np.isnan(there).all()
        there[...] = part

    overlap = 0 if system == "steered" else 16
    job = Job(canvas(128, 192), SEED, tile_px=64, overlap_px=overlap, steps=3, inputs=inputs)
    result = run(program_of(system), toys(functions), constants, replace(job, on_final=place), devices=workers)
    assert result.tobytes() == pieces.tobytes()


def test_progress_counts_every_tile_of_every_step_up_to_the_total():
    told = []
    job = Job(canvas(48, 2576), steps=3, on_progress=lambda *news: told.append(news))
    run(program_of("in-token"), toys(IN_TOKEN), IN_TOKEN_CONSTANTS, job)
    totals = {"encode": 4, "see": 4, "sample": 4 * 3, "decode": 4}  # `modulate` is one call that all tiles share
    for name, total in totals.items():
        assert [news for news in told if news[0] == name] == [(name, done, total) for done in range(1, total + 1)]
    assert {name for name, *_ in told} == totals.keys()


def test_seconds_are_counted_for_every_component():
    job = Job(canvas(64, 192), tile_px=64, overlap_px=0)
    slow = HITOKSR | {"decode": lambda codes: time.sleep(0.02) or {"image": grown(codes, 16)}}
    run(program_of("hitoksr"), toys(slow), {}, job, devices=2)
    assert job.seconds.keys() == {"generate", "decode"}
    assert 3 * 0.02 <= job.seconds["decode"] < 2  # three tiles
    assert 0 < job.seconds["generate"] < job.seconds["decode"]


class Watched(dict):
    """Numbers that take their time between being read and written; how many do so at once."""

    now = most = 0

    def get(self, *arguments):
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.005)
        return super().get(*arguments)

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        self.now -= 1


def test_seconds_of_tiles_that_end_at_once_are_added_one_after_another():
    job = Job(canvas(64, 512), tile_px=64, overlap_px=0, seconds=Watched())
    run(program_of("hitoksr"), toys(HITOKSR), {}, job, devices=4)
    assert job.seconds.most == 1


@pytest.mark.parametrize("sections", [("each",), ("each", "last"), ("once", "each")])
def test_a_result_that_every_step_writes_is_told_once_and_as_it_stays(sections):
    calls = {"once": {"image": "image"}, "each": {"image": "image", "sigma": "@sigma"}, "last": {"image": "result"}}
    made = {name: (Call("paint", calls[name], {"painted": "result"}),) for name in sections}
    grids = {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}
    program = Program(1, 8, grids, (Pass("paint", Tiles(64, 0), Steps("flow_shift", 3), **made),))
    pieces = np.full((3, 64, 128), np.nan, np.float32)

    def place(top, left, part):
        there = pieces[:, top : top + part.shape[1], left : left + part.shape[2]]
        assert np.isnan(there).all()
        there[...] = part

    paint = Toy(lambda image, sigma=0.5: {"painted": np.float32(image * sigma)})
    result = run(program, {"paint": paint}, {}, Job(canvas(64, 128), on_final=place))
    assert len(paint.feeds) == 2 * (3 + len(sections) - 1)
    assert result.tobytes() == pieces.tobytes()
