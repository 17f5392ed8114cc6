"""The steps of a job: how many, and which rows they read."""

from dataclasses import replace

import numpy as np
import pytest

from support.walked_systems import (
    FIXED,
    PRIVATE_CONSTANTS,
    SYSTEMS,
    VICR,
    VICR_INPUTS,
    first_rows,
    private,
    vicr_modulate,
    vicr_reference,
)
from support.walks import DDPM, PAINT, PAINTING, SEED, Toy, canvas, program_of, toys
from tilewright.runtime.bundle.program import Call, Program, Steps
from tilewright.runtime.bundle.strict import from_json, to_json
from tilewright.runtime.errors import UsageError
from tilewright.runtime.execute.walk import Job, run


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_a_job_may_ask_for_other_steps_than_the_program(steps):
    image = canvas(112, 160)
    engines = toys(VICR)
    job = Job(image, SEED, tile_px=64, overlap_px=16, steps=steps, inputs=VICR_INPUTS)
    result = run(program_of("vicr"), engines, {}, job)
    assert len(engines["step"].feeds) == steps * 6
    np.testing.assert_allclose(result, vicr_reference(image.astype(np.float64), 64, 16, steps), atol=1e-5)


@pytest.mark.parametrize("steps", [27, 29])
def test_other_steps_than_a_constants_table_has_rows_are_refused(steps):
    with pytest.raises(UsageError, match=f"table 'modulation.4096' has 28 rows for {steps} steps; use --steps 28"):
        run(program_of("in-token-fixed"), toys(FIXED), first_rows(28), Job(canvas(1024, 1024), steps=steps))


def test_more_steps_than_a_tiles_table_has_rows_are_refused():
    short = VICR | {"modulate": lambda **inputs: {"modulation": vicr_modulate(**inputs)["modulation"][:, :30]}}
    with pytest.raises(UsageError, match="table 'modulation' has 30 rows for 31 steps; use --steps 30"):
        run(program_of("vicr"), toys(short), {}, Job(canvas(64, 64), steps=31, inputs=VICR_INPUTS))


def test_a_jobs_value_is_read_row_by_row():
    text, restore = program_of("private").passes
    calls = [replace(restore.each[0], inputs=restore.each[0].inputs | {"pooled": "@pooled"})]
    program = replace(program_of("private"), passes=(text, replace(restore, each=calls)))
    rows = np.random.default_rng(0).random((1, 25, 2), np.float32)
    functions = private(48, 64) | {"text": lambda ids: {"words": np.ones((1, 77), np.float32), "pooled": rows}}
    engines = toys(functions)
    run(program, engines, PRIVATE_CONSTANTS, Job(canvas(48, 64)))
    np.testing.assert_array_equal([feed["pooled"][0] for feed in engines["step"].feeds], rows[0])


@pytest.mark.parametrize(
    ("system", "steps", "message"),
    [
        ("in-token", 0, "count=0 is no number of steps; use 1 or more"),
        ("in-token", -1, "count=-1 is no number of steps"),
        ("private", 1001, "count=1001 is no number of steps; use 1 to 1000"),
        ("steered", 1000, "spacing_offset=1 with 1000 steps leaves the schedule"),
    ],
)
def test_steps_that_cannot_be_meant_are_refused(system, steps, message):
    functions, constants, inputs = SYSTEMS[system]
    with pytest.raises(UsageError, match=message):
        run(program_of(system), toys(functions), constants, Job(canvas(64, 64), steps=steps, inputs=inputs))


@pytest.mark.parametrize(
    "steps",
    [
        Steps("ddim", 25, options=DDPM | {"beta_start": 1e-4}),
        Steps("ddpm", 25, options=DDPM),
        Steps("flow_shift", 25, options={"max_mu": 1}),
    ],
)
def test_a_programs_options_reach_its_schedule_as_they_were_read(steps):
    each = (Call("note", {"image": "image"}, {"image": "result"}),)
    program = replace(PAINTING, passes=(replace(PAINT, once=(), steps=steps, each=each),))
    read_again = from_json(Program, to_json(program), "program.json")
    engine = Toy(lambda image: {"image": image})
    run(read_again, {"note": engine}, {}, Job(canvas(16, 16)))
    assert len(engine.feeds) == 25
