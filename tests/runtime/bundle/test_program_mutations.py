"""A program after any change is refused in one line or read as what it says."""

import copy
import dataclasses
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.documents import SCHEMA, SYSTEMS, document, meaning, surroundings
from tilewright.runtime.bundle.check import check_program
from tilewright.runtime.bundle.program import (
    Program,
)
from tilewright.runtime.bundle.strict import from_json, to_json
from tilewright.runtime.errors import BundleError

VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 8, 16, 29, 64, 1001, 10**30, 0.5, -0.0, 16.0, 1e308),
    *("", "image", "result", "z", "tokens", "@sigma", "@t", "~z", "#context", "$guidance", "@modulation", "h/8", "w/1"),
    *("none", "noise", "ones", "input", "flow_shift", "ddim", "float32", "int64", "line\nbreak", "\u2028", "x" * 1000),
    *([], {}, [1], [0], [16, "h/8", "w/8"], [[]], {"": None}, {"px": 8, "channels": 16}, {"shape": [4]}),
)
NAMES = (*(v for v in VALUES if isinstance(v, str)), "init", "batch", "steps", "state", "once", "each", "last")


def places(tree):
    """Every (parent, key) of a document."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield tree, key
        yield from places(child)


@st.composite
def mutated_texts(draw):
    """A system and the text of its program after one to three deletions, renamings, exchanges and doublings."""
    system = draw(st.sampled_from(SYSTEMS))
    tree, twice = document(system), None
    for _ in range(draw(st.integers(1, 3))):
        parent, key = draw(st.sampled_from(list(places(tree))))
        kinds = ["delete", "put", "transplant", "rename" if isinstance(parent, dict) else "double"]
        match draw(st.sampled_from([*kinds, "twice"] if isinstance(parent, dict) and not twice else kinds)):
            case "delete":
                del parent[key]
            case "put":
                parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            case "transplant":
                other, place = draw(st.sampled_from(list(places(tree))))
                parent[key] = copy.deepcopy(other[place])
            case "rename":
                parent[draw(st.sampled_from(NAMES))] = parent.pop(key)
            case "double":
                parent.insert(key, copy.deepcopy(parent[key]))
            case "twice":
                twice = key
                parent["HERE TWICE"] = copy.deepcopy(parent[key])
        if not any(True for _ in places(tree)):
            break
    text = json.dumps(tree)
    return system, text if twice is None else text.replace('"HERE TWICE"', json.dumps(twice))


@pytest.mark.slow
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(mutated_texts())
def test_any_change_is_refused_in_one_line_or_read_as_what_it_says(case):
    system, text = case
    try:
        program = from_json(Program, text, "program.json")
    except BundleError as error:
        assert re.fullmatch(r"program\.json[^\n]{1,388}", str(error))
        return
    tree = json.loads(text)
    assert json.dumps(dataclasses.asdict(program), sort_keys=True) == meaning(tree)
    assert from_json(Program, to_json(program), "program.json") == program
    assert SCHEMA.is_valid(tree)
    around = surroundings(system)
    try:
        check_program(program, around.components, around.constants)
    except BundleError as error:
        assert re.fullmatch(r"program: [^\n]{1,391}", str(error))
