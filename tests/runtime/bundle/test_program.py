"""The systems' programs are read, written and found runnable; whatever is changed for the worse is refused."""

import copy
import dataclasses
import inspect
import json
import math
import re
import typing
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tilewright.runtime.bundle.check import check_program
from tilewright.runtime.bundle.program import (
    OPTIONAL,
    SCHEDULE_OPTIONS,
    SCHEDULE_TABLES,
    Program,
    Signature,
    State,
    TensorSpec,
    state_shape,
)
from tilewright.runtime.bundle.strict import from_json, schema, to_json
from tilewright.runtime.errors import BundleError
from tilewright.runtime.plan.schedules import SCHEDULES

PROGRAMS = Path(__file__).parents[2] / "programs"
# those of the systems, and two that say more: a start, a state and joined latents; once, each and last
SYSTEMS = ("hitoksr", "in-token", "in-token-fixed", "vicr", "instantir", "toksr", "steered", "private")
SCHEMA = jsonschema.Draft202012Validator(schema(Program, "program.json"))
GONE = object()


@dataclass(frozen=True)
class Surroundings:
    """What a bundle holds besides its program."""

    components: dict[str, Signature]
    constants: dict[str, TensorSpec]


def document(system):
    return json.loads((PROGRAMS / f"{system}.json").read_text())


def surroundings(system, changes=None):
    signatures = json.loads((PROGRAMS / f"{system}.signatures.json").read_text())
    return from_json(Surroundings, json.dumps(changed(signatures, changes or {})), system)


def changed(tree, changes):
    r"""A copy of a document with values at dotted paths put in, exchanged or, for GONE, taken out; `\.` is a dot."""
    tree = copy.deepcopy(tree)
    for path, value in changes.items():
        keys = (key.replace("\\.", ".") for key in re.split(r"(?<!\\)\.", path))
        *parents, last = (int(key) if key.isdecimal() else key for key in keys)
        node = tree
        for key in parents:
            node = node[key]
        if value is GONE:
            del node[last]
        else:
            node[last] = copy.deepcopy(value)
    return tree


def parsed(tree):
    return from_json(Program, json.dumps(tree), "program.json")


def checked(system, changes=None, signature_changes=None):
    around = surroundings(system, signature_changes)
    check_program(parsed(changed(document(system), changes or {})), around.components, around.constants)


def refusal(read):
    """The message of the BundleError that a call must end in: one line, of a length that fits a terminal."""
    with pytest.raises(BundleError) as error:
        read()
    message = str(error.value)
    assert message.isprintable()
    assert 0 < len(message) <= 400
    return message


def meaning(tree):
    """A document with every default of the format written out."""
    empty_pass = {"tiles": None, "steps": None, "state": {}, "once": [], "each": [], "last": []}
    passes = []
    for given_pass in tree["passes"]:
        full = empty_pass | given_pass
        full["tiles"] = full["tiles"] and {"whole_up_to_px": None, "batch": 1, "fixed_px": []} | full["tiles"]
        full["steps"] = full["steps"] and {"px_per_token": 256, "options": {}} | full["steps"]
        full["state"] = {name: {"init": "zeros"} | state for name, state in full["state"].items()}
        passes.append(full)
    inputs = {
        name: {"shape": [], "default": None, "choices": {}} | value for name, value in tree.get("inputs", {}).items()
    }
    texts = {name: {"default": None} | text for name, text in tree.get("texts", {}).items()}
    grids = {name: {"init": "none"} | grid for name, grid in tree["grids"].items()}
    full = {"files": {}, "any_scale": False} | tree | {"inputs": inputs, "texts": texts}
    # as text, which tells 1 from 1.0 and from true
    return json.dumps(full | {"grids": grids, "passes": passes}, sort_keys=True)


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


# Programs that could not run


def run_of(component, **inputs):
    return {"run": component, "inputs": inputs, "outputs": {}}


DECODE_Z = run_of("decode", latent="z") | {"outputs": {"image": "result"}}
DETOKENISE = run_of("detokenise", tokens="tokens", words="words") | {"outputs": {"image": "result"}}
EACH = "passes.3.each.0"  # In-Token's and VICR's step, the steered one's preview
CALLS = {
    "an unknown component": (
        "in-token",
        {"passes.1.once.0.run": "encoder"},
        "pass 'encode', once[0] runs 'encoder': no such component; there are decode, encode, modulate, redux, see",
    ),
    "a missing input": (
        "in-token",
        {f"{EACH}.inputs.sigma": GONE},
        "pass 'sample', each[0] runs 'step': input 'sigma' is missing",
    ),
    "an unknown input": ("in-token", {f"{EACH}.inputs.mask": "z"}, "the component has no input 'mask'"),
    "an unknown output": ("in-token", {f"{EACH}.outputs.v": "v"}, "the component has no output 'v'"),
    "no output": ("in-token", {f"{EACH}.outputs": {}}, "outputs {} must name at least one place, each once"),
    "two outputs to one place": (
        "hitoksr",
        {"passes.0.once.0.outputs.indices": "codes"},
        "outputs {'codes': 'codes', 'indices': 'codes'} must name at least one place, each once",
    ),
    "an output to a place without a name": (
        "in-token",
        {"passes.2.once.1.outputs.tokens": "seen-1"},
        "tokens -> seen-1: a place is named by letters, digits and underscores",
    ),
    "an output to a value of the same tile": (
        "vicr",
        {"passes.1.once.2.outputs.bridge": "y"},
        "bridge -> y: the name is taken; give every value its own",
    ),
    "an output to a value of the job": (
        "private",
        {"passes.1.once.0.outputs.tokens": "words"},
        "tokens -> words: the name is taken; give every value its own",
    ),
    "an output to a value that all tiles share": (
        "in-token",
        {f"{EACH}.outputs.z_next": "modulation"},
        "z_next -> modulation: the name is taken; give every value its own",
    ),
    "an output to a value of an earlier pass with the same tiles": (
        "vicr",
        {"passes.2.once.0.outputs.modulation": "bridge"},
        "modulation -> bridge: the name is taken; give every value its own",
    ),
    "an output to a constant's name": (
        "in-token",
        {f"{EACH}.outputs.z_next": "context"},
        "z_next -> context: the name is taken; give every value its own",
    ),
    "an output to the input": (
        "in-token",
        {"passes.4.once.0.outputs.image": "image"},
        "image -> image: the input is not written to; use another grid",
    ),
}
SOURCES = {
    "a name nobody gave": (
        "in-token",
        {f"{EACH}.inputs.seen": "sean"},
        "'sean': nothing of that name is known here; there are features, modulation, seen",
    ),
    "an empty name": ("in-token", {f"{EACH}.inputs.seen": ""}, "'': nothing of that name is known here"),
    "a tile's value of a pass with another overlap": (
        "in-token",
        {"passes.3.tiles.overlap_px": 128},
        "pass 'sample', each[0] runs 'step': 'seen': nothing of that name is known here; there are modulation",
    ),
    "a tile's value of a pass with other batches": (
        "vicr",
        {"passes.2.tiles.batch": 2},
        "'bridge': nothing of that name is known here; there are context, pooled",
    ),
    "a tile's state of a pass with other tiles": (
        "vicr",
        {"passes.4.tiles": {"px": 1024, "overlap_px": 256}},
        "pass 'decode', once[0] runs 'decode': 'z': nothing of that name is known here; there are context, pooled",
    ),
    "a tile's value where nothing is tiled": (
        "in-token",
        {"passes.4.tiles": GONE, "passes.4.once.0.inputs.latent": "seen"},
        "'seen': nothing of that name is known here; there are modulation",
    ),
    "a tile's value before the pass that makes it": (
        "vicr",
        {"passes.1.once.1.inputs.image": "modulation"},
        "'modulation': nothing of that name is known here; there are context, pooled, y",
    ),
    "an earlier untiled pass's state": (
        "private",
        {"passes": [*document("private")["passes"], {"name": "again", "once": [DETOKENISE]}], "passes.1.tiles": GONE},
        "'tokens': nothing of that name is known here",
    ),
    "a grid before it is written": (
        "in-token",
        {"passes.1.once.0.inputs.image": "y"},
        "'y': the grid is read before any earlier pass writes it",
    ),
    "a grid that the same pass writes": (
        "in-token",
        {"passes.3.last": [DECODE_Z]},
        "pass 'sample', last[0] runs 'decode': 'z': the grid is read in last of the pass that writes it",
    ),
    "a grid that a private pass writes in once": (
        "vicr",
        {
            "grids.m": {"px": 8, "channels": 16, "init": "zeros"},
            "passes.3.once": [run_of("encode", image="image") | {"outputs": {"latent": "m"}}],
            f"{EACH}.inputs.y": "m",
        },
        "'m': the grid is read in each of the pass that writes it; use another grid",
    ),
    "a table without steps": (
        "in-token",
        {"passes.1.once.0.inputs.image": "@sigma"},
        "pass 'encode', once[0] runs 'encode': '@sigma': a table needs a pass with steps",
    ),
    "an unknown table": (
        "in-token",
        {f"{EACH}.inputs.sigma": "@sigmas"},
        "'@sigmas': no table, value or constant has that name; there are context, features, modulation, pooled, seen",
    ),
    "another schedule's table": (
        "private",
        {"passes.1.each.0.inputs.t": "@sigma"},
        "'@sigma': no table, value or constant",
    ),
    "a number as a table": (
        "steered",
        {"passes.3.each.0.inputs.t": "@start_alpha"},
        "'@start_alpha': a single number has no rows",
    ),
    "one number a tile as a table": (
        "in-token",
        {f"{EACH}.inputs.sigma": "@seen"},
        {"components.redux.outputs.tokens.shape": ["batch"], "components.step.inputs.seen.shape": ["batch"]},
        "'@seen': a single number has no rows",
    ),
    "a value as a whole table": (
        "vicr",
        {"passes.2.once.0.inputs.sigmas": "@pooled"},
        "'@pooled': outside 'each' only a schedule's tables can be read as a table",
    ),
    "a constant with too few rows": (
        "in-token-fixed",
        {"passes.2.steps.count": 29},
        "'@modulation': has 28 rows for 29 steps",
    ),
    "a constant of one size of tile with other rows": (
        "in-token-fixed",
        {},
        {r"constants.modulation\.1024.shape": [27, 344, 3072]},
        "'@modulation': the tables of tile sizes differ in type or shape; rebuild the bundle",
    ),
    "a constant of one size of tile with another type": (
        "in-token-fixed",
        {},
        {r"constants.modulation\.1024.dtype": "float16"},
        "'@modulation': the tables of tile sizes differ in type or shape",
    ),
    "no constant of any size of tile": (
        "in-token-fixed",
        {},
        {"constants": {"context": {"dtype": "float32", "shape": [1, 512, 4096]}}},
        "'@modulation': no table, value or constant has that name; there are context, features, seen",
    ),
    "a constant of a size that is no number": (
        "in-token-fixed",
        {"passes.2.each.0.inputs.modulation": "@context"},
        "'@context': has 1 rows for 28 steps",
    ),
    "a size of tile without its constant": (
        "in-token-fixed",
        {f"passes.{i}.tiles.fixed_px": [1024, 512, 256] for i in range(4)},
        "'@modulation': a table of tile sizes needs fixed_px, and one for each of [1024, 512, 256]",
    ),
    "constants of tile sizes where tiles may have any": (
        "in-token-fixed",
        {f"passes.{i}.tiles": {"px": 1024, "overlap_px": 256} for i in range(4)},
        "'@modulation': a table of tile sizes needs fixed_px, and one for each of []",
    ),
    "constants of tile sizes where nothing is tiled": (
        "in-token-fixed",
        {"passes.1.tiles": GONE, "passes.2.tiles": GONE},
        "'@modulation': a table of tile sizes needs fixed_px, and one for each of []",
    ),
    "a constant of tile sizes without its rows": (
        "in-token-fixed",
        {"passes.2.each.0.inputs.modulation": "#modulation"},
        "'#modulation': no such constant in the bundle; there are context, modulation.1024, modulation.4096, pooled",
    ),
    "a job's value with too few rows": (
        "in-token",
        {},
        {"components.modulate.outputs.modulation.shape.0": 27},
        "'@modulation': has 27 rows for 28 steps",
    ),
    "a tile's value with too few rows": (
        "vicr",
        {},
        {"components.modulate.outputs.modulation.shape.1": 29},
        "'@modulation': has 29 rows for 30 steps",
    ),
    "an unknown constant": (
        "in-token",
        {f"{EACH}.inputs.context": "#prompt"},
        "'#prompt': no such constant in the bundle; there are context, pooled",
    ),
    "an unknown input of the program": (
        "vicr",
        {"passes.0.once.0.inputs.ids": "$prompt"},
        "'$prompt': the program has no such input; there are clip_ids, guidance, t5_ids",
    ),
    "noise of nothing": (
        "steered",
        {"passes.3.each.2.inputs.noise": "~q"},
        "'~q': noise needs a grid or a state of this pass; there are delta, preview",
    ),
    "noise of another pass's state": (
        "steered",
        {"passes.2.once.0.inputs.noise": "~preview"},
        "'~preview': noise needs a grid or a state of this pass; there are none",
    ),
    "noise of a state that is no field": (
        "steered",
        {"passes.3.each.2.inputs.noise": "~delta"},
        "'~delta': noise needs a shape of channels, rows, columns, not [1]",
    ),
}
SHAPES = {
    "another channel count": (
        "in-token",
        {},
        {"components.step.inputs.z.shape.1": 4},
        "z = z: float32 ['batch', 16, 'h/8', 'w/8'] does not fit float32 ['batch', 4, 'h', 'w']",
    ),
    "another rank": (
        "in-token",
        {f"{EACH}.inputs.seen": "#context"},
        {"components.step.inputs.seen.shape": ["tokens", 4096]},
        "seen = #context: float32 [1, 512, 4096] does not fit float32 ['tokens', 4096]",
    ),
    "another type": (
        "vicr",
        {"texts": {}, "inputs.t5_ids.dtype": "int32"},
        "ids = $t5_ids: int32 [1, 512] does not fit int64 [1, 512]",
    ),
    "a whole table where a row is meant": (
        "vicr",
        {},
        {"components.modulate.inputs.sigmas.shape": []},
        "sigmas = @sigma: float32 ['steps'] does not fit float32 []",
    ),
    "a row where a whole table is meant": (
        "in-token",
        {f"{EACH}.inputs.modulation": "modulation"},
        "modulation = modulation: float32 ['steps', 344, 3072] does not fit float32 [344, 3072]",
    ),
    "a batch where all tiles share a value": (
        "in-token",
        {},
        {"components.step.inputs.modulation.shape": ["batch", 344, 3072]},
        "modulation = @modulation: float32 [344, 3072] does not fit float32 ['batch', 344, 3072]",
    ),
    "noise of another grid": (
        "steered",
        {"passes.3.each.2.inputs.noise": "~image"},
        "noise = ~image: float32 ['batch', 3, 'h/1', 'w/1'] does not fit float32 ['batch', 4, 'h', 'w']",
    ),
    "an output that is not its grid's": (
        "hitoksr",
        {},
        {"components.decode.outputs.image.shape.1": 1},
        "image -> result: float32 ['batch', 1, 'height', 'width'] does not fit float32 ['batch', 3, 'h/1', 'w/1']",
    ),
    "a half-precision output to a grid": (
        "hitoksr",
        {},
        {"components.decode.outputs.image.dtype": "float16"},
        "image -> result: float16",
    ),
    "an output that is not its state's": (
        "private",
        {},
        {"components.step.outputs.tokens.shape.3": 64},
        "tokens -> tokens: float32 ['batch', 16, 1, 64] does not fit float32 ['batch', 16, 1, 32]",
    ),
    "a value that changes its shape from step to step": (
        "in-token",
        {f"{EACH}.outputs.tokens": "seen"},
        {"components.step.outputs.tokens": {"dtype": "float32", "shape": ["batch", 730, 4096]}},
        "tokens -> seen: float32 ['batch', 730, 4096] does not fit float32 ['batch', 729, 4096]",
    ),
}
PASSES = {
    "a name twice": ("in-token", {"passes.4.name": "encode"}, "pass 'encode': the name is taken; give every pass"),
    "each without steps": (
        "in-token",
        {"passes.3.steps": GONE},
        "pass 'sample': 'each' needs 'steps'; give a schedule",
    ),
    "last without steps": ("in-token", {"passes.1.last": [DECODE_Z]}, "pass 'encode': 'last' and 'state' need 'steps'"),
    "state without steps": (
        "in-token",
        {"passes.1.state": {"s": {"shape": [1]}}},
        "pass 'encode': 'last' and 'state' need 'steps'; use 'once'",
    ),
    "no call": ("in-token", {"passes.1.once": []}, "pass 'encode': makes no call; remove it"),
    "no call but steps": ("in-token", {"passes.3.each": []}, "pass 'sample': makes no call; remove it"),
    "a last call alone": (
        "vicr",
        {"passes.3.each": [], "passes.3.last": [run_of("decode", latent="z") | {"outputs": {"image": "result"}}]},
        "pass 'sample': makes no call; remove it",
    ),
    "tiles that are no multiple": (
        "steered",
        {"passes.1.tiles.px": 1040},
        "pass 'encode': tiles of 1040 px overlapping by 256 px must be multiples of multiple_px 64",
    ),
    "an overlap that is no multiple": (
        "private",
        {"passes.1.tiles.overlap_px": 24},
        "pass 'restore': tiles of 256 px overlapping by 24 px must be multiples of multiple_px 16",
    ),
    "a state that hides a grid": (
        "vicr",
        {"passes.3.state.image": {"shape": [1]}},
        "pass 'sample': state 'image' hides a grid or a value; rename it",
    ),
    "a state that hides a value of the job": (
        "vicr",
        {"passes.3.state.context": {"shape": [1]}},
        "pass 'sample': state 'context' hides a grid or a value; rename it",
    ),
    "a state that hides a value of an earlier pass with the same tiles": (
        "vicr",
        {"passes.3.state.bridge": {"shape": [1]}},
        "pass 'sample': state 'bridge' hides a grid or a value; rename it",
    ),
    "a state finer than the multiple": (
        "vicr",
        {"passes.3.state.z.shape.1": "h/32"},
        "pass 'sample': state 'z': 'h/32' does not divide multiple_px 16",
    ),
    "a state that no source can name": (
        "vicr",
        {"passes.3.state.@z": {"shape": [1]}},
        "pass 'sample': state '@z': a place is named by letters, digits and underscores",
    ),
    "nobody making the result": (
        "in-token",
        {"passes.4": GONE},
        "program: no pass writes the grid 'result'; add the call that makes it",
    ),
    "no pass": ("in-token", {"passes": []}, "program: no pass writes the grid 'result'"),
}
GRIDS_AND_INPUTS = {
    "no image": ("hitoksr", {"grids.image": GONE}, "grid 'image' must be there with px 1, channels 3, init input"),
    "no result": ("hitoksr", {"grids.result": GONE}, "grid 'result' must be there with px 1, channels 3, init none"),
    "a coarse result": ("hitoksr", {"grids.result.px": 8}, "grid 'result' must be there"),
    "an image of noise": ("hitoksr", {"grids.image.init": "noise"}, "grid 'image' must be there"),
    "a second image": ("in-token", {"grids.y.init": "input"}, "grid 'y': only 'image' is an input; use init none"),
    "cells that do not fit the multiple": (
        "in-token",
        {"grids.y.px": 24},
        "grid 'y': px 24 does not divide multiple_px 16",
    ),
    "a grid that no source can name": (
        "in-token",
        {"grids.#y": {"px": 8, "channels": 16}},
        "grid '#y': a place is named by letters, digits and underscores",
    ),
    "an unknown type": (
        "vicr",
        {"inputs.t5_ids.dtype": "int128"},
        "input 't5_ids': dtype 'int128' is not one of float64, float32, float16, bfloat16, float8_e4m3fn",
    ),
    "a default that is no constant": (
        "private",
        {"inputs.ids.default": "#ids"},
        "input 'ids': default '#ids' is no constant of that type and shape",
    ),
    "a default with another mark": (
        "private",
        {"inputs.ids.default": "$empty_ids"},
        "input 'ids': default '$empty_ids' is no constant of that type and shape",
    ),
    "a default of another shape": (
        "private",
        {"inputs.ids.shape": [1, 76]},
        "input 'ids': default '#empty_ids' is no constant of that type and shape",
    ),
    "a number for a tensor": (
        "private",
        {"inputs.ids.default": 0},
        "input 'ids': the number 0 cannot fill [1, 77]; name a #constant",
    ),
    "a fraction for a whole number": (
        "steered",
        {"inputs.adares.default": 0.5},
        "input 'adares': default 0.5 is no int64",
    ),
    "a default that is no choice": (
        "steered",
        {"inputs.adares.default": 3},
        "input 'adares': default 3 is not among {'off': 0, 'paper': 1, 'code': 2}",
    ),
    "the name of a choice for its number": (
        "steered",
        {"inputs.adares.default": "off"},
        "input 'adares': default 'off' is no constant of that type and shape",
    ),
}
IDS, FILE = "texts.prompt.ids", "files.prompt_embeds"
TEXTS_AND_FILES = {
    "words for an input that is not there": (
        "vicr",
        {f"{IDS}.t6_ids": "tokenizers/t5.json"},
        "text 'prompt': 't6_ids' is no input of int64 ids [1, length]",
    ),
    "words for a number": ("vicr", {f"{IDS}.guidance": "tokenizers/t5.json"}, "'guidance' is no input of int64 ids"),
    "words for ids of another type": ("vicr", {"inputs.t5_ids.dtype": "int32"}, "'t5_ids' is no input of int64 ids"),
    "words for two rows": ("vicr", {"inputs.t5_ids.shape": [2, 512]}, "'t5_ids' is no input of int64 ids [1, length]"),
    "words for a row alone": ("vicr", {"inputs.t5_ids.shape": [512]}, "'t5_ids' is no input of int64 ids [1, length]"),
    "words by the name of an input": (
        "vicr",
        {"texts.guidance": {"ids": {"t5_ids": "tokenizers/t5.json"}}},
        "text 'guidance': 't5_ids' is no input of int64 ids [1, length]",
    ),
    "a file by the name of an input": (
        "vicr",
        {"files.guidance": {"a": "context"}},
        "file 'guidance': the name is taken; give every argument its own",
    ),
    "a file by the name of a text": ("vicr", {"files.prompt": {"a": "context"}}, "file 'prompt': the name is taken"),
    "a file of what nobody makes": (
        "vicr",
        {f"{FILE}.prompt_embeds": "words"},
        "file 'prompt_embeds': no input or value 'words'; there are clip_ids, context, guidance, pooled, t5_ids",
    ),
    "a file of a tile's value": ("vicr", {f"{FILE}.prompt_embeds": "bridge"}, "no input or value 'bridge'"),
    "a file of a tile's state": ("vicr", {f"{FILE}.prompt_embeds": "z"}, "no input or value 'z'"),
    "a file of a grid": ("vicr", {f"{FILE}.prompt_embeds": "result"}, "no input or value 'result'"),
    "a file of what tiles share": (
        "in-token",
        {"files": {"table": {"table": "modulation"}}},
        "file 'table': no input or value 'modulation'; there are guidance",
    ),
}
UNRUNNABLE = CALLS | SOURCES | SHAPES | PASSES | GRIDS_AND_INPUTS | TEXTS_AND_FILES


@pytest.mark.parametrize("case", UNRUNNABLE)
def test_a_program_that_could_not_run_is_refused_by_name(case):
    system, changes, *signature_changes, message = UNRUNNABLE[case]
    found = refusal(lambda: checked(system, changes, *signature_changes))
    assert found.startswith("program: ")
    assert message in found


def test_steps_without_each_are_a_pass_that_reads_a_schedules_tables():
    tables = parsed(document("in-token")).passes[0]
    assert tables.steps and not (tables.each or tables.last)
    checked("in-token")


def test_a_grid_may_be_read_in_each_of_the_joined_pass_that_writes_it_in_once():
    start = {"run": "start", "inputs": {"z": "z", "y": "y"}, "outputs": {"z": "z"}}
    latent = {"dtype": "float32", "shape": ["batch", 16, "h", "w"]}
    signature = {"inputs": {"z": latent, "y": latent}, "outputs": {"z": latent}}
    checked("in-token", {"passes.3.once": [start]}, {"components.start": signature})


def test_a_file_may_hold_inputs_and_values():
    checked("vicr", {f"{FILE}.guidance_embeds": "guidance"})


def test_a_value_of_once_may_be_renewed_in_each():
    checked(
        "in-token",
        {f"{EACH}.outputs.tokens": "seen"},
        {"components.step.outputs.tokens": {"dtype": "float32", "shape": ["batch", "tokens", 4096]}},
    )


# Values that mean nothing

TILES, STEPS, OWN_STEPS = "passes.3.tiles", "passes.3.steps", "passes.1.steps"  # In-Token's, and the private one's
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
    "a token of no pixel": ("in-token", {f"{STEPS}.px_per_token": 0}, "px_per_token 0 be positive"),
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
        "overlap_px -16 must lie between 0 and half of px 1024",
    ),
    "a batch of none": ("private", {"passes.1.tiles.batch": 0}, "batch 0 must be at least 1"),
    "an unknown start of a grid": (
        "in-token",
        {"grids.z.init": "ones"},
        "program.json.grids.z: init 'ones' is not one of input, noise, zeros, none",
    ),
    "a grid of no pixel": ("in-token", {"grids.z.px": 0}, "px 0 and channels 16 must be at least 1"),
    "a grid of no channel": ("in-token", {"grids.z.channels": 0}, "px 8 and channels 0 must be at least 1"),
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
    "no multiple": ("hitoksr", {"multiple_px": 0}, "multiple_px 0 in 1..4096"),
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
        "program.json.texts.prompt: a text that gives no ids is of no use",
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


# Any change at all

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
