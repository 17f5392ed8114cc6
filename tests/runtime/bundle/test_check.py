"""Programs that could not run are refused by name."""

import pytest

from support.documents import EACH, GONE, checked, document, parsed, refusal


def run_of(component, **inputs):
    return {"run": component, "inputs": inputs, "outputs": {}}


DECODE_Z = run_of("decode", latent="z") | {"outputs": {"image": "result"}}
DETOKENISE = run_of("detokenise", tokens="tokens", words="words") | {"outputs": {"image": "result"}}
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
        {r"constants.modulation\.1024.shape": [1, 27, 344, 3072]},
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
        "'@context': has 512 rows for 28 steps",
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
        {"components.modulate.outputs.modulation.shape.1": 27},
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
        "ids = $t5_ids: int32 [1, 512] does not fit int64 ['batch', 512]",
    ),
    "a whole table where a row is meant": (
        "vicr",
        {},
        {"components.modulate.inputs.sigmas.shape": []},
        "sigmas = @sigma: float32 [1, 'steps'] does not fit float32 []",
    ),
    "a row where a whole table is meant": (
        "in-token",
        {f"{EACH}.inputs.modulation": "modulation"},
        "modulation = modulation: float32 [1, 'steps', 344, 3072] does not fit float32 ['batch_or_1', 344, 3072]",
    ),
    "a row for each tile where all tiles share a value": (
        "in-token",
        {},
        {"components.step.inputs.modulation.shape": ["batch", 344, 3072]},
        "modulation = @modulation: the input's shape ['batch', 344, 3072] must begin with batch_or_1",
    ),
    "one row where every tile has a value": (
        "in-token",
        {},
        {"components.step.inputs.seen.shape": [1, 729, 4096]},
        "seen = seen: the input's shape [1, 729, 4096] must begin with batch or batch_or_1",
    ),
    "no axis of tiles": (
        "in-token",
        {},
        {"components.step.inputs.sigma.shape": []},
        "sigma = @sigma: float32 [1] does not fit float32 []",
    ),
    "a constant of several rows": (
        "in-token",
        {},
        {"constants.context.shape": [2, 512, 4096]},
        "context = #context: [2, 512, 4096] is not one row; begin it with 1",
    ),
    "a constant without rows": (
        "steered",
        {},
        {"constants.start_alpha.shape": [], "components.start.inputs.alpha.shape": []},
        "alpha = #start_alpha: [] is not one row; begin it with 1",
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
IDS, FILE = "texts.prompt.ids", "files.prompt_embeds.tensors"
TEXTS_AND_FILES = {
    "words for an input that is not there": (
        "vicr",
        {f"{IDS}.t6_ids": "tokenizers/t5.json"},
        "text 'prompt': 't6_ids' is no input of int64 ids [1, length]",
    ),
    "words for a number": ("vicr", {f"{IDS}.guidance": "tokenizers/t5.json"}, "'guidance' is no input of int64 ids"),
    "words for ids of another type": ("vicr", {"inputs.t5_ids.dtype": "int32"}, "'t5_ids' is no input of int64 ids"),
    "words for two rows": (
        "vicr",
        {"inputs.t5_ids.shape": [2, 512]},
        "'t5_ids': shape [2, 512] is not one row; begin it",
    ),
    "words for a row alone": (
        "vicr",
        {"inputs.t5_ids.shape": [512]},
        "'t5_ids': shape [512] is not one row; begin it with 1",
    ),
    "words by the name of an input": (
        "vicr",
        {"texts.guidance": {"ids": {"t5_ids": "tokenizers/t5.json"}}},
        "text 'guidance': 't5_ids' is no input of int64 ids [1, length]",
    ),
    "a file by the name of an input": (
        "vicr",
        {"files.guidance": {"tensors": {"a": "context"}}},
        "argument 'guidance': the name is taken; give every argument its own",
    ),
    "a file by the name of an input of more than a number": (
        "vicr",
        {"files.t5_ids": {"tensors": {"a": "context"}}},
        "file 't5_ids': the name is taken; give every argument its own",
    ),
    "a file by the name of a text": (
        "vicr",
        {"files.prompt": {"tensors": {"a": "context"}}},
        "argument 'prompt': the name is taken",
    ),
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
        {"files": {"table": {"tensors": {"table": "modulation"}}}},
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
