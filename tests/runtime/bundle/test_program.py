"""The systems' programs are read and written; documents of another form are refused."""

import dataclasses
import json
import math
from dataclasses import dataclass

import jsonschema
import pytest

from support.documents import (
    EACH,
    GONE,
    PROGRAMS,
    SCHEMA,
    STEPS,
    SYSTEMS,
    TILES,
    changed,
    checked,
    document,
    meaning,
    parsed,
    refusal,
    surroundings,
)
from tilewright.runtime.bundle.program import (
    Program,
    State,
    state_shape,
)
from tilewright.runtime.bundle.strict import from_json, to_json

# The systems


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_systems_program_is_read_and_could_run(system):
    checked(system)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_program_says_what_its_document_says(system):
    program = parsed(document(system))
    assert json.dumps(dataclasses.asdict(program), sort_keys=True) == meaning(document(system))


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_program_is_written_so_that_it_reads_back_the_same(system):
    program = parsed(document(system))
    text = to_json(program)
    assert from_json(Program, text, "program.json") == program
    assert to_json(from_json(Program, text.encode(), "program.json")) == text
    assert meaning(json.loads(text)) == meaning(document(system))


def test_what_is_written_is_canonical_and_says_every_field():
    program = parsed(document("hitoksr"))
    text = to_json(program)
    assert text == to_json(parsed(changed(document("hitoksr"), {"passes.0.tiles.batch": 1, "inputs": {}})))
    assert text == json.dumps(dataclasses.asdict(program), indent=2, sort_keys=True) + "\n"
    assert text.startswith('{\n  "any_scale": false,\n  "files": {},\n  "grids": {\n')


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_program_names_its_components(system):
    called = {
        call["run"] for p in document(system)["passes"] for s in ("once", "each", "last") for call in p.get(s, ())
    }
    assert parsed(document(system)).components() == called == surroundings(system).components.keys()


def test_an_unneeded_output_and_an_unneeded_constant_are_allowed():
    checked("hitoksr", {}, {"constants.spare": {"dtype": "uint8", "shape": [3]}})  # `indices` goes nowhere already


def test_a_state_is_sized_by_the_tile_it_belongs_to():
    assert state_shape(State((16, "h/8", "w/4")), 64, 48) == (16, 8, 12)
    assert state_shape(State((16, 1, 32), "noise"), 64, 48) == (16, 1, 32)


# Documents of another form: refused by the reader and by the published schema

MALFORMED = {
    "an unknown key": (
        {"colour": "blue"},
        "program.json: unknown key 'colour'; known are any_scale, files, grids, inputs, multiple_px, passes, scale",
    ),
    "an unknown key deep inside": ({f"{EACH}.in": {}}, "program.json.passes[3].each[0]: unknown key 'in'"),
    "a missing key": ({"scale": GONE}, "program.json: key 'scale' is missing; rebuild the bundle"),
    "a missing key deep inside": ({f"{EACH}.run": GONE}, "program.json.passes[3].each[0]: key 'run' is missing"),
    "true for a number": ({"scale": True}, "program.json.scale: expected integer, found true"),
    "a fraction for a whole number": ({"grids.z.px": 8.5}, "program.json.grids.z.px: expected integer, found 8.5"),
    "text for a number": ({"grids.z.px": "8"}, 'program.json.grids.z.px: expected integer, found "8"'),
    "null for a number": ({"grids.z.px": None}, "program.json.grids.z.px: expected integer, found null"),
    "null for a list": ({"passes": None}, "program.json.passes: expected a list, found null"),
    "a number for a name": ({f"{EACH}.run": 1}, "program.json.passes[3].each[0].run: expected string, found 1"),
    "a number for an object": ({f"{EACH}.inputs": 7}, "each[0].inputs: expected an object, found 7"),
    "a list for an object": ({"grids": []}, "program.json.grids: expected an object, found []"),
    "an object for a list": ({"passes": {}}, "program.json.passes: expected a list, found {}"),
    "an object for a grid's name": (
        {f"{EACH}.outputs.z_next": {"grid": "z"}},
        'each[0].outputs.z_next: expected string, found {"grid": "z"}',
    ),
    "three sides": ({f"{TILES}.whole_up_to_px": [1, 2, 3]}, "whole_up_to_px: expected a list of 2, found [1, 2, 3]"),
    "one side": ({f"{TILES}.whole_up_to_px": [1]}, "whole_up_to_px: expected a list of 2, found [1]"),
    "a side of true": ({f"{TILES}.whole_up_to_px": [1, True]}, "whole_up_to_px[1]: expected integer, found true"),
    "true for an option": (
        {f"{STEPS}.options": {"max_mu": True}},
        "steps.options.max_mu: expected integer or number or string, found true",
    ),
    "null for an option": ({f"{STEPS}.options": {"max_mu": None}}, "options.max_mu: expected integer or number or"),
    "a fraction of a side": (
        {"passes.3.state": {"s": {"shape": [1.5]}}},
        "state.s.shape[0]: expected integer or string, found 1.5",
    ),
    "a list for a default": (
        {"inputs": {"a": {"dtype": "float32", "default": [1]}}},
        "inputs.a.default: expected integer or number or string or null, found [1]",
    ),
    "text for a choice": (
        {"inputs": {"a": {"dtype": "int64", "choices": {"off": "0"}}}},
        'inputs.a.choices.off: expected integer, found "0"',
    ),
    "a number for any scale": ({"any_scale": 1}, "program.json.any_scale: expected boolean, found 1"),
    "a fraction for a fixed side": ({f"{TILES}.fixed_px": [1024.5]}, "fixed_px[0]: expected integer, found 1024.5"),
    "one fixed side that is no list": ({f"{TILES}.fixed_px": 1024}, "fixed_px: expected a list, found 1024"),
    "a list for a text's ids": ({"texts": {"prompt": {"ids": []}}}, "texts.prompt.ids: expected an object, found []"),
    "a text of no ids at all": ({"texts": {"prompt": {}}}, "program.json.texts.prompt: key 'ids' is missing"),
    "a number for a default text": (
        {"texts": {"prompt": {"ids": {"a": "b"}, "default": 1}}},
        "program.json.texts.prompt.default: expected string, found 1",
    ),
    "a name for a file's tensors": ({"files": {"embeds": "context"}}, "files.embeds: expected an object, found"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_document_of_another_form_is_refused_by_the_reader_and_by_the_schema(case):
    changes, message = MALFORMED[case]
    tree = changed(document("in-token"), changes)
    assert message in refusal(lambda: parsed(tree))
    assert not SCHEMA.is_valid(tree)


@pytest.mark.parametrize("tree", [None, True, 1, 1.5, "text", [], [{}]])
def test_a_document_that_is_no_object_is_refused(tree):
    assert "program.json: expected an object, found " in refusal(lambda: parsed(tree))
    assert not SCHEMA.is_valid(tree)


def test_the_published_schema_is_a_schema_and_takes_the_systems_programs():
    jsonschema.Draft202012Validator.check_schema(SCHEMA.schema)
    assert SCHEMA.schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for system in SYSTEMS:
        SCHEMA.validate(document(system))
        SCHEMA.validate(json.loads(to_json(parsed(document(system)))))


def test_a_whole_number_with_a_decimal_point_is_refused_though_a_schema_cannot_see_it():
    tree = changed(document("in-token"), {"passes.3.steps.count": 28.0})
    assert "steps.count: expected integer, found 28.0" in refusal(lambda: parsed(tree))
    assert SCHEMA.is_valid(tree)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
@pytest.mark.parametrize("place", ["passes.1.steps.options.beta_start", "passes.1.steps.count", "scale"])
def test_a_number_that_is_not_finite_is_refused(place, number):
    text = json.dumps(changed(document("private"), {place: "HERE"})).replace('"HERE"', number)
    assert "found " in refusal(lambda: from_json(Program, text, "program.json"))


@pytest.mark.parametrize("number", [10**400, -(10**400)], ids=["positive", "negative"])
def test_a_whole_number_too_large_for_a_float_is_refused_as_one(number):
    @dataclass(frozen=True)
    class Holder:
        value: float

    text = json.dumps({"value": number})
    assert "m.json.value: expected a finite number, found " in refusal(lambda: from_json(Holder, text, "m.json"))
    assert from_json(Holder, '{"value": 3}', "m.json").value == 3.0
    assert math.isclose(from_json(Holder, f'{{"value": {10**300}}}', "m.json").value, 1e300)


WHOLE = (PROGRAMS / "hitoksr.json").read_text()
UNREADABLE = {
    "nothing": ("", "not valid JSON (Expecting value: line 1 column 1 (char 0)); rebuild the bundle"),
    "half a document": (WHOLE[: len(WHOLE) // 2], "not valid JSON ("),
    "two documents": (WHOLE + WHOLE, "not valid JSON (Extra data"),
    "a comma too many": (WHOLE.replace('"scale": 4,', '"scale": 4,,'), "not valid JSON ("),
    "single quotes": (WHOLE.replace('"', "'"), "not valid JSON ("),
    "bytes that are no text": (WHOLE.encode().replace(b"restore", b"rest\xff\xfere"), "not valid JSON ('utf-8' codec"),
    "a mark before the text": ("\ufeff" + WHOLE, "not valid JSON ("),
    "a line break inside a string": (WHOLE.replace("restore", "re\nstore"), "not valid JSON (Invalid control char"),
    "lists too deep": ("[" * 100_000, "not valid JSON ("),
    "objects too deep": ('{"grids":' * 100_000, "not valid JSON ("),
    "depth where a number is meant": (
        WHOLE.replace('"scale": 4', '"scale": ' + "[" * 900 + "]" * 900),
        "program.json",  # the reader's recursion limit or the type, whichever it meets first
    ),
    "a number of too many digits": (WHOLE.replace('"scale": 4', '"scale": 4' + "0" * 5000), "not valid JSON ("),
    "a key twice": (
        WHOLE.replace('"scale": 4', '"scale": 4, "scale": 2'),
        "program.json: key 'scale' appears twice in one object; rebuild the bundle",
    ),
    "a key twice deep inside": (
        WHOLE.replace('"run": "decode"', '"run": "decode", "run": "decode"'),
        "program.json: key 'run' appears twice in one object",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_text_that_is_no_json_is_refused_in_one_line(case):
    text, message = UNREADABLE[case]
    assert message in refusal(lambda: from_json(Program, text, "program.json"))


@pytest.mark.parametrize(
    "changes",
    [
        {"grids.a\nb": {"px": 0, "channels": 1}},
        {"grids.a\nb": {"px": 1, "channels": 1}},
        {"grids.\ud800": {"px": 1, "channels": 1, "init": 1}},
        {"a\r\nb": 1},
        {"passes.0.once.0.run": "x" * 100_000},
        {"passes.0.once.0.inputs.image": "\x1b[31m" + "x" * 100_000},
        {"grids.image.init": "\u2028" * 1000},
        {"inputs": {f"a\n{i}": {"dtype": "int64"} for i in range(200)}, "passes.0.once.0.inputs.image": "$b"},
        {"scale": 10**4000},
        {"multiple_px": [0] * 100_000},
    ],
)
def test_whatever_a_document_holds_the_complaint_is_one_line_that_fits_a_terminal(changes):
    refusal(lambda: checked("hitoksr", changes))


def test_a_long_complaint_keeps_where_and_what_to_do():
    message = refusal(lambda: checked("hitoksr", {"passes.0.once.0.run": "x" * 1000}))
    assert message.startswith("program: pass 'restore', once[0] runs 'xxx")
    assert message.endswith("xxx': no such component; there are decode, generate")
    assert len(message) == 400
