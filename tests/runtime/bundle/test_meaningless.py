"""Values that mean nothing are refused where they stand; the checks know every schedule's names."""

import inspect
import json
import typing

import pytest

from support.documents import GONE, OWN_STEPS, STEPS, TILES, changed, document, parsed, refusal
from tilewright.runtime.bundle.program import (
    OPTIONAL,
    SCHEDULE_OPTIONS,
    SCHEDULE_TABLES,
    TensorSpec,
)
from tilewright.runtime.bundle.strict import from_json
from tilewright.runtime.plan.schedules import SCHEDULES

MEANINGLESS = {
    "an unknown schedule": (
        "in-token",
        {f"{STEPS}.schedule": "euler"},
        "program.json.passes[3].steps: schedule 'euler' is not one of flow_shift, ddim, ddpm",
    ),
    "an unknown option": (
        "in-token",
        {f"{STEPS}.options": {"shift": 3.0}},
        "schedule 'flow_shift' has no option 'shift'",
    ),
    "a missing option": (
        "private",
        {f"{OWN_STEPS}.options.betas": GONE},
        "schedule 'ddim' needs the option 'betas'",
    ),
    "a number for a name": (
        "private",
        {f"{OWN_STEPS}.options.betas": 1},
        "schedule 'ddim': option 'betas' is no str: 1",
    ),
    "a name for a number": (
        "in-token",
        {f"{STEPS}.options": {"max_mu": "1.15"}},
        "schedule 'flow_shift': option 'max_mu' is no float: '1.15'",
    ),
    "a fraction of an offset": (
        "private",
        {f"{OWN_STEPS}.options.spacing_offset": 0.5},
        "schedule 'ddim': option 'spacing_offset' is no int: 0.5",
    ),
    "no step": ("in-token", {f"{STEPS}.count": 0}, "count 0 must lie in 1..1000"),
    "too many steps": ("in-token", {f"{STEPS}.count": 1001}, "count 1001 must lie in 1..1000"),
    "a token of no pixel": ("in-token", {f"{STEPS}.px_per_token": 0}, "px_per_token 0 must be at least 1"),
    "tiles of no pixel": (
        "in-token",
        {TILES: {"px": 0, "overlap_px": 0}},
        "program.json.passes[3].tiles: px 0 must be at least 1",
    ),
    "more than half in common": (
        "in-token",
        {f"{TILES}.overlap_px": 528},
        "overlap_px 528 must lie between 0 and half of px 1024",
    ),
    "a negative overlap": (
        "in-token",
        {f"{TILES}.overlap_px": -16},
        "overlap_px -16 must be at least 0",
    ),
    "a batch of none": ("private", {"passes.1.tiles.batch": 0}, "batch 0 must be at least 1"),
    "an unknown start of a grid": (
        "in-token",
        {"grids.z.init": "ones"},
        "program.json.grids.z: init 'ones' is not one of input, noise, zeros, none",
    ),
    "a grid of no pixel": ("in-token", {"grids.z.px": 0}, "program.json.grids.z: px 0 must be at least 1"),
    "a grid of no channel": (
        "in-token",
        {"grids.z.channels": 0},
        "program.json.grids.z: channels 0 must be at least 1",
    ),
    "an unknown start of a state": (
        "private",
        {"passes.1.state.tokens.init": "input"},
        "program.json.passes[1].state.tokens: init 'input' is not one of zeros, ones, noise",
    ),
    "noise that is no field": (
        "private",
        {"passes.1.state.tokens.shape": [16, 32]},
        "noise needs a shape of channels, rows, columns, not [16, 32]",
    ),
    "a state of no size": ("steered", {"passes.3.state.delta.shape": [0]}, "0 is neither a size nor like 'h/8'"),
    "a state over nothing": ("vicr", {"passes.3.state.z.shape.1": "h/0"}, "'h/0' is neither a size nor like 'h/8'"),
    "a state of depth": ("vicr", {"passes.3.state.z.shape.1": "d/8"}, "'d/8' is neither a size nor like 'h/8'"),
    "an input of no size": ("vicr", {"inputs.t5_ids.shape": [1, 0]}, "shape [1, 0] holds a size below 1"),
    "no scale": ("hitoksr", {"scale": 0}, "program.json: scale 0 must lie in 1..16"),
    "a scale beyond reason": ("hitoksr", {"scale": 17}, "scale 17 must lie in 1..16"),
    "no multiple": ("hitoksr", {"multiple_px": 0}, "multiple_px 0 must lie in 1..4096"),
    "fixed sides without the usual one": (
        "in-token-fixed",
        {"passes.2.tiles.fixed_px": [512, 256]},
        "program.json.passes[2].tiles: px 1024 must be among fixed_px [512, 256], and no image be taken whole",
    ),
    "fixed sides and images taken whole": (
        "in-token-fixed",
        {"passes.2.tiles.whole_up_to_px": [512, 512]},
        "px 1024 must be among fixed_px [1024, 512], and no image be taken whole",
    ),
    "a text that gives nothing": (
        "vicr",
        {"texts.prompt.ids": {}},
        "program.json.texts.prompt: a text needs at least one input for its ids",
    ),
}


@pytest.mark.parametrize("case", MEANINGLESS)
def test_a_value_that_means_nothing_is_refused_where_it_stands(case):
    system, changes, message = MEANINGLESS[case]
    assert message in refusal(lambda: parsed(changed(document(system), changes)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"dtype": "float8", "shape": []}, "dtype 'float8' is not one of float64"),
        ({"dtype": "float32", "shape": [1, 0]}, "shape [1, 0] holds a size below 1"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(spec, message):
    assert message in refusal(lambda: from_json(TensorSpec, json.dumps(spec), "bundle.json"))


# The names of schedules that the checks know without importing them

OPTIONS = {
    "flow_shift": {
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_tokens": 256,
        "max_tokens": 4096,
        "min_mu": 0.5,
        "max_mu": 1.15,
    },
    "ddim": document("private")["passes"][1]["steps"]["options"],
    "ddpm": document("steered")["passes"][3]["steps"]["options"],
}


def test_the_known_schedules_are_those_there_are():
    assert SCHEDULES.keys() == SCHEDULE_TABLES.keys() == SCHEDULE_OPTIONS.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_known_tables_are_those_a_schedule_returns(name):
    assert set(SCHEDULES[name](7, 1024, **OPTIONS[name])) == set(SCHEDULE_TABLES[name])
    assert len(set(SCHEDULE_TABLES[name])) == len(SCHEDULE_TABLES[name])


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_known_options_are_those_a_schedule_takes(name):
    parameters = inspect.signature(SCHEDULES[name]).parameters.values()
    options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == ["count", "tokens"]
    assert options.keys() == SCHEDULE_OPTIONS[name].keys()
    assert {o for o in options if options[o].default is not inspect.Parameter.empty} == OPTIONAL & options.keys()
    hints = typing.get_type_hints(SCHEDULES[name])
    for option, kind in SCHEDULE_OPTIONS[name].items():
        assert kind in (typing.get_args(hints[option]) or (hints[option],))
