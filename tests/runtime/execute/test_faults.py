"""A fault of an engine, or a number that is not finite, ends the job."""

import itertools
import threading

import numpy as np
import pytest

from support.walked_systems import HITOKSR, IN_TOKEN, IN_TOKEN_CONSTANTS
from support.walks import canvas, program_of, toys
from tilewright.runtime.errors import AccuracyError
from tilewright.runtime.execute.devices import CpuDevice
from tilewright.runtime.execute.walk import Job, run


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_fault_of_an_engine_ends_the_job_and_the_rest_is_not_run(workers):
    calls, threads = itertools.count(1), threading.active_count()

    def generate(image):
        if next(calls) >= 5:
            raise MemoryError("no room for tile 5")
        return HITOKSR["generate"](image)

    engines = toys(HITOKSR | {"generate": generate})
    job = Job(canvas(64, 2048), tile_px=32, overlap_px=0)
    with pytest.raises(MemoryError, match="no room for tile 5"):
        run(program_of("hitoksr"), engines, {}, job, devices=workers)
    assert 5 <= len(engines["generate"].feeds) <= 5 + 2 * workers  # of 128 tiles
    assert threading.active_count() == threads


def test_a_fault_in_one_pass_keeps_the_next_from_starting():
    def step(**inputs):
        raise RuntimeError("device lost")

    engines = toys(IN_TOKEN | {"step": step})
    with pytest.raises(RuntimeError, match="device lost"):
        run(program_of("in-token"), engines, IN_TOKEN_CONSTANTS, Job(canvas(64, 64)))
    assert (len(engines["see"].feeds), len(engines["decode"].feeds)) == (1, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["float32", "float16", "float64"])
def test_numbers_that_are_not_finite_end_the_job_with_the_call_that_gave_them(value, kind):
    calls = itertools.count(1)

    def step(**inputs):
        made = {name: array.astype(kind) for name, array in IN_TOKEN["step"](**inputs).items()}
        if next(calls) == 3:
            next(iter(made.values())).flat[[5, 7]] = value
        return made

    engines = toys(IN_TOKEN | {"step": step})
    with pytest.raises(AccuracyError) as caught:
        run(program_of("in-token"), engines, IN_TOKEN_CONSTANTS, Job(canvas(64, 64), steps=4))
    assert caught.value.exit_code == 7
    assert str(caught.value).startswith(f"pass 'sample', step 3: step.z_next holds {value}, 2 of ")
    assert str(caught.value).isprintable()
    assert len(engines["decode"].feeds) == 0


def test_large_numbers_and_choices_are_no_fault():
    large = np.full((1, 3, 8, 8), 3e38, np.float32)
    codes = np.full((1, 3, 2, 2), np.iinfo(np.int64).max)
    for output in (large, codes, np.full((1, 9, 9), 65504, np.float16)):
        assert CpuDevice("cpu:0", {}).finite(output)
