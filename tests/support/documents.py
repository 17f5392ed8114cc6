"""Documents of the systems' programs, changes of them, and the line in which they must be refused."""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest

from tilewright.runtime.bundle.check import check_program
from tilewright.runtime.bundle.program import (
    Program,
    Signature,
    TensorSpec,
)
from tilewright.runtime.bundle.strict import from_json, schema
from tilewright.runtime.errors import BundleError

__all__ = [
    "EACH",
    "GONE",
    "OWN_STEPS",
    "PROGRAMS",
    "SCHEMA",
    "STEPS",
    "SYSTEMS",
    "TILES",
    "Surroundings",
    "changed",
    "checked",
    "document",
    "meaning",
    "parsed",
    "refusal",
    "surroundings",
]

PROGRAMS = Path(__file__).parents[1] / "programs"
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
    no_input = {"shape": [], "default": None, "choices": {}, "help": "", "least": None, "most": None}
    inputs = {name: no_input | value for name, value in tree.get("inputs", {}).items()}
    texts = {name: {"default": None, "help": ""} | text for name, text in tree.get("texts", {}).items()}
    files = {name: {"help": ""} | file for name, file in tree.get("files", {}).items()}
    grids = {name: {"init": "none"} | grid for name, grid in tree["grids"].items()}
    full = {"any_scale": False} | tree | {"inputs": inputs, "texts": texts, "files": files}
    # as text, which tells 1 from 1.0 and from true
    return json.dumps(full | {"grids": grids, "passes": passes}, sort_keys=True)


EACH = "passes.3.each.0"  # In-Token's and VICR's step, the steered one's preview


TILES, STEPS, OWN_STEPS = "passes.3.tiles", "passes.3.steps", "passes.1.steps"  # In-Token's, and the private one's
