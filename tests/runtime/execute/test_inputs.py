"""The inputs of a job: the caller's, or the program's defaults."""

from dataclasses import replace

import numpy as np
import pytest

from support.walks import PAINT, PAINTING, Toy, canvas, program_of
from tilewright.runtime.bundle.program import Call, Input
from tilewright.runtime.errors import UsageError
from tilewright.runtime.execute.walk import Job, run

ASKING = replace(
    PAINTING,
    inputs={
        "gain": Input("float32", default=2.0),
        "mode": Input("int64", default=0, choices={"off": 0, "on": 1}),
        "ids": Input("int64", (1, 2), "#ids"),
        "level": Input("float32", least=0, most=2),
    },
    passes=(
        replace(
            PAINT,
            once=(
                Call(
                    "paint", {"gain": "$gain", "mode": "$mode", "ids": "$ids", "level": "$level"}, {"image": "result"}
                ),
            ),
        ),
    ),
)


def fed_by(inputs):
    """What an engine sees of a caller's inputs."""
    engine = Toy(lambda **inputs: {"image": np.zeros((1, 3, 8, 8), np.float32)})
    run(ASKING, {"paint": engine}, {"ids": np.array([[7, 8]])}, Job(canvas(8, 8), inputs=inputs))
    return engine.feeds[0]


def test_inputs_are_the_callers_or_the_programs_defaults():
    feed = fed_by({"level": 0.25})
    assert {name: (str(value.dtype), value.shape, value.tolist()) for name, value in feed.items()} == {
        "gain": ("float32", (1,), [2.0]),
        "mode": ("int64", (1,), [0]),
        "ids": ("int64", (1, 2), [[7, 8]]),
        "level": ("float32", (1,), [0.25]),
    }
    feed = fed_by({"level": 1, "gain": np.float64(3), "mode": "on", "ids": [(1, 2)]})
    assert {name: (str(value.dtype), value.shape, value.tolist()) for name, value in feed.items()} == {
        "gain": ("float32", (1,), [3.0]),
        "mode": ("int64", (1,), [1]),
        "ids": ("int64", (1, 2), [[1, 2]]),
        "level": ("float32", (1,), [1.0]),
    }
    assert fed_by({"level": 1, "mode": 1})["mode"] == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "level has no default; give it a value"),
        ({"level": None}, "level has no default; give it a value"),
        ({"level": 1, "gian": 2}, "input 'gian' is not one of gain, mode, ids, level"),
        ({"level": 1, "mode": "auto"}, "mode='auto' is not one of off, on"),
        ({"level": 1, "mode": 2}, "mode=2 is not one of off, on"),
        ({"level": "high"}, "level='high' is not a number from 0 to 2"),
        ({"level": "1"}, "level='1' is not a number from 0 to 2"),
        ({"level": True}, "level=True is not a number from 0 to 2"),
        ({"level": "#ids"}, "level='#ids' is not a number from 0 to 2"),
        ({"level": -0.01}, "level=-0.01 is not a number from 0 to 2"),
        ({"level": np.float64(2.01)}, "level=2.01 is not a number from 0 to 2"),
        ({"level": float("nan")}, "level=nan is not finite as float32; give a number from 0 to 2"),
        ({"level": 1, "gain": 1e39}, r"gain=1e\+39 is not finite as float32; give a number"),
        ({"level": 1, "gain": float("-inf")}, "gain=-inf is not finite as float32; give a number"),
        ({"level": [1, 2]}, r"level has shape \[2\]; give a number from 0 to 2"),
        ({"level": 1, "ids": 3}, r"ids has shape \[\]; give an array of \[1, 2\]"),
        ({"level": 1, "ids": [1, 2.5]}, r"ids=\[1, 2.5\] is not an array of int64"),
        ({"level": 1, "ids": [[1], [2, 3]]}, r"ids=\[\[1\], \[2, 3\]\] is not an array of int64"),
        ({"level": 1, "mode": 2**70}, f"mode={2**70} is not one of off, on"),
        ({"level": {}}, "level={} is not a number from 0 to 2"),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(inputs, message):
    with pytest.raises(UsageError, match=message) as error:
        fed_by(inputs)
    assert "\n" not in str(error.value)


def test_a_program_without_inputs_takes_none():
    with pytest.raises(UsageError, match="input 'guidance' is not one of none"):
        run(program_of("in-token-fixed"), {}, {}, Job(canvas(1024, 1024), inputs={"guidance": 1.0}))
