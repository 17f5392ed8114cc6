"""What a bundle says that its caller may choose: derived from the program, and refused where it could not be used."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from support.documents import SYSTEMS, document, parsed, surroundings
from tilewright.cli.commands import parser, within
from tilewright.runtime import Restorer
from tilewright.runtime.bundle.arguments import RESERVED, Argument, arguments_of, check_arguments, flag
from tilewright.runtime.bundle.check import check_program
from tilewright.runtime.bundle.program import Input, Program, TensorFile, Text
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.errors import BundleError
from tilewright.runtime.profile import profile

F32, I64 = "float32", "int64"
IDS = {"ids": Input("int64", (1, 4))}


def programme(**fields) -> Program:
    return Program(1, 8, {}, (), **fields)


def test_every_kind_of_argument_is_derived_from_the_program() -> None:
    program = programme(
        inputs={
            "count": Input("int64", default=2, least=1, help="how many"),
            "mode": Input("int64", default=1, choices={"on": 1, "off": 0}),
            "must": Input("float32", most=2.5),
            "strength": Input("float32", default="#usual"),
            "table": Input("float32", (2, 3)),
            **IDS,
        },
        texts={"prompt": Text({"ids": "words.json"}, help="in words")},
        files={"look": TensorFile({"tint": "tint"}, "a look"), "tables": TensorFile({"t": "table"})},
    )
    assert arguments_of(program) == {
        "prompt": Argument("words", "in words", needed=True),
        "look": Argument("tensors", "a look"),
        "tables": Argument("tensors", needed=True),
        "count": Argument("integer", "how many", 2, least=1),
        "mode": Argument("choice", default="on", choices=("off", "on")),
        "must": Argument("number", most=2.5, needed=True),
        "strength": Argument("number"),
    }


@pytest.mark.parametrize(
    ("argument", "takes", "otherwise"),
    [
        (Argument("words", default='a "b" ä'), "words", 'default: "a \\"b\\" ä"'),
        (Argument("words", needed=True), "words", "needed"),
        (Argument("tensors"), "a safetensors file", "default: none"),
        (Argument("number", default=30.0, least=0), "a number of at least 0", "default: 30"),
        (Argument("number", default=0.5, most=1.0), "a number of at most 1", "default: 0.5"),
        (Argument("integer", default=2, least=1, most=2**32 - 1), "a whole number from 1 to 4294967295", "default: 2"),
        (Argument("choice", default="off", choices=("off", "on")), "one of off, on", "default: off"),
    ],
)
def test_an_argument_says_what_it_takes(argument: Argument, takes: str, otherwise: str) -> None:
    assert (argument.takes, argument.otherwise) == (takes, otherwise)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_stored_programs_arguments_can_be_used_and_have_help(system: str) -> None:
    program = parsed(document(system))
    check_arguments(program)
    published = system not in ("private", "steered")
    assert all(a.help or not published for a in arguments_of(program).values())


def test_names_that_our_commands_and_functions_use_are_reserved() -> None:
    ours = set()
    for words in (["runtime", "restore"], ["runtime", "profile"]):
        for action in within(parser(words), words)._actions:
            ours |= {name.removeprefix("--").replace("-", "_") for name in action.option_strings if name[:2] == "--"}
    for function in (Restorer.__call__, Restorer.sitting, profile):
        code = function.__code__
        ours |= set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    assert {"seed", "tile", "json", "image"} <= ours <= set(RESERVED)


def test_the_cpp_library_reserves_the_same_names() -> None:
    source = (Path(__file__).parents[3] / "runtime" / "cpp" / "src" / "arguments.cpp").read_text()
    lists = [re.search(f"{name} = {{(.*?)}};", source, re.DOTALL) for name in ("OPTIONS", "PARAMETERS")]
    assert {name for found in lists if found for name in re.findall(r'"(\w+)"', found[1])} == set(RESERVED)


REFUSED = {
    "an option of ours": (
        {"inputs": {"seed": Input(I64, default=0)}},
        "'seed': the command line has its own --seed;",
    ),
    "an option of two words": (
        {"inputs": {"max_pixels": Input(I64, default=0)}},
        "'max_pixels': the command line has its own --max-pixels; rename the argument",
    ),
    "words by the name of an option": ({"inputs": IDS, "texts": {"tile": Text({"ids": "w"})}}, "its own --tile;"),
    "a file by the name of an option": ({"files": {"json": TensorFile({"t": "x"})}}, "its own --json;"),
    "a parameter": ({"inputs": {"image": Input(F32, default=0.0)}}, "Python has its own 'image';"),
    "a word of Python": ({"inputs": {"lambda": Input(F32, default=0.0)}}, "Python has its own 'lambda';"),
    "capitals": ({"inputs": {"Gain": Input(F32, default=0.0)}}, "use small letters, digits, and single"),
    "two underscores": ({"inputs": {"a__b": Input(F32, default=0.0)}}, "use small letters, digits, and single"),
    "an underscore last": ({"inputs": {"a_": Input(F32, default=0.0)}}, "use small letters, digits, and single"),
    "a name used twice": (
        {"inputs": IDS, "texts": {"a": Text({"ids": "w"})}, "files": {"a": TensorFile({"t": "ids"})}},
        "argument 'a': the name is taken; give every argument its own",
    ),
    "help of two lines": ({"inputs": {"a": Input(F32, default=0.0, help="x\ny")}}, "is not one printable line"),
    "an escape in help": ({"files": {"a": TensorFile({"t": "x"}, "\x1b[2J")}}, "is not one printable line"),
    "a default below the range": (
        {"inputs": {"a": Input(F32, default=-1.0, least=0)}},
        "default -1 is not a number",
    ),
    "a default above the range": (
        {"inputs": {"a": Input(I64, default=9, most=8)}},
        "default 9 is not a whole number",
    ),
    "a range the wrong way round": ({"inputs": {"a": Input(F32, least=2, most=1)}}, "least 2 is above most 1"),
    "a range of choices": (
        {"inputs": {"a": Input(I64, choices={"x": 0}, least=0)}},
        "only a single number without",
    ),
    "a range of many numbers": ({"inputs": {"a": Input(F32, (2,), least=0)}}, "only a single number without"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_argument_that_could_not_be_used_is_refused(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(BundleError) as caught:
        check_arguments(programme(**fields))
    assert str(caught.value).startswith("program: ") and message in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_program_is_checked_for_its_arguments() -> None:
    program, around = parsed(document("vicr")), surroundings("vicr")
    inputs = program.inputs | {"seed": Input("float32", default=1.0)}
    with pytest.raises(BundleError, match="program: argument 'seed': the command line has its own --seed"):
        check_program(replace(program, inputs=inputs), around.components, around.constants)


def test_the_manifest_lists_the_programs_arguments(tinted) -> None:
    listed = json.loads((tinted / "bundle.json").read_text())["arguments"]
    assert listed == {
        "gain": argument("number", help="100% is 1", default=1.0, least=-8, most=8),
        "look": argument("tensors", help="what a prompt becomes"),
        "prompt": argument("words", help="the tint in words", default="bright bright bright"),
    }
    assert read_bundle(tinted).manifest.arguments == read_bundle(tinted).arguments


def argument(kind: str, **fields) -> dict[str, object]:
    none = {"kind": kind, "help": "", "default": None, "choices": [], "least": None, "most": None, "needed": False}
    return none | fields


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gain", {"default": 2.0}, "argument 'gain' differs from program.json; rebuild the bundle"),
        ("gain", {"most": None}, "argument 'gain' differs from program.json; rebuild the bundle"),
        ("prompt", {"help": "else"}, "argument 'prompt' differs from program.json; rebuild the bundle"),
        ("more", argument("words"), "argument 'more' differs from program.json; rebuild the bundle"),
        ("look", None, "argument 'look' differs from program.json; rebuild the bundle"),
        ("gain", {"kind": "colour"}, "kind 'colour' is not one of words, tensors, number, integer, choice"),
        ("gain", {"default": []}, "bundle.json.arguments.gain.default: expected"),
    ],
)
def test_a_manifest_that_says_otherwise_is_refused(tinted, name: str, change, message: str) -> None:
    document = json.loads((tinted / "bundle.json").read_text())
    if change is None:
        del document["arguments"][name]
    else:
        document["arguments"][name] = document["arguments"].get(name, {}) | change
    (tinted / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(BundleError) as caught:
        read_bundle(tinted)
    assert message in str(caught.value)


def test_the_command_lines_name_of_an_argument() -> None:
    assert flag("prompt_embeds") == "--prompt-embeds"
