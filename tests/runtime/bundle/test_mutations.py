"""Documents of a bundle after random changes are refused in one line or read to what they say."""

import copy
import json
import os
import random

import jsonschema
import pytest

from support.forged import DOCUMENTS, means, overwrite, reseal
from tilewright.runtime.bundle.read import json_schema, read_bundle
from tilewright.runtime.errors import BundleError

STRINGS = [
    "",
    "image",
    "result",
    "../x",
    "/x",
    "a\\b",
    "a\nb",
    "\x1b[31m",
    "\ud800",
    "\0",
    "x" * 300,
    "é" * 2000,
    "h/8",
]
SOURCES = ["#shift", "@sigma", "~image", "$x", "#a\nb", "@", "~", "float32", "ort", "program.json", "input", "noise"]
NUMBERS = [0, 1, -1, 2, 3, 8, 10**30, 10**400, -(10**400), 0.5, -0.0, 1.0, 1e308, float("nan"), float("inf")]
VALUES = [
    *STRINGS,
    *SOURCES,
    *NUMBERS,
    None,
    True,
    False,
    [],
    {},
    [[]],
    {"": 0},
    [1, 2],
    ["x"],
    {"px": 8, "channels": 3},
]


def places(value: object, at: tuple = ()) -> list[tuple]:
    """The path of every value in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here for key, part in items for here in ((*at, key), *places(part, (*at, key)))]


def mutated_values(rng: random.Random, text: bytes) -> bytes:
    """Delete, replace, rename or duplicate one to three values."""
    document = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        *keys, last = rng.choice(places(document) or [("",)])
        parent = document
        for key in keys:
            parent = parent[key]
        kind = rng.choice(["delete", "retype", "replace", "replace", "nudge", "rename", "duplicate"])
        if not document:
            document[last] = rng.choice(VALUES)
        elif kind == "delete":
            del parent[last]
        elif kind == "nudge" and type(parent[last]) is int:
            parent[last] += rng.choice([-1, 1, 8, 2**31])
        elif kind in ("replace", "nudge"):
            alike = [value for value in VALUES if type(value) is type(parent[last])]
            parent[last] = copy.deepcopy(rng.choice(alike or VALUES))
        elif kind == "retype":
            parent[last] = copy.deepcopy(rng.choice(VALUES))
        elif isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[last]))
        else:
            name = rng.choice([*STRINGS, *SOURCES, last + "x", last[:-1]])
            parent[name] = copy.deepcopy(parent[last]) if kind == "duplicate" else parent.pop(last)
    return json.dumps(document).encode()


def mutated_text(rng: random.Random, text: bytes) -> bytes:
    """Change bytes: flip, replace, delete, repeat, cut."""
    start = rng.randrange(len(text))
    end = min(len(text), start + rng.choice([1, 1, 2, 8, 64]))
    kind = rng.choice(["flip", "replace", "digit", "delete", "repeat", "cut"])
    if kind == "flip":
        middle = bytes([text[start] ^ (1 << rng.randrange(8))]) + text[start + 1 : end]
    elif kind == "replace":
        middle = rng.randbytes(end - start)
    elif kind == "digit":
        middle = bytes(rng.choice(b"0123456789") if byte in b"0123456789" else byte for byte in text[start:end])
    else:
        middle = {"delete": b"", "repeat": text[start:end] * 2, "cut": b""}[kind]
    return text[:start] + middle + (b"" if kind == "cut" else text[end:])


def repeated_key(rng: random.Random, text: bytes) -> bytes:
    """Say one key of an object twice."""
    document = json.loads(text)
    *keys, last = rng.choice([place for place in places(document) if isinstance(place[-1], str)])
    parent = document
    for key in keys:
        parent = parent[key]
    parent["<twice>"] = copy.deepcopy(rng.choice([parent[last], *VALUES]))
    return json.dumps(document).replace('"<twice>"', json.dumps(last), 1).encode()


def once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    assert len(dict(pairs)) == len(pairs), "a key appears twice"
    return dict(pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_mutated_document_is_refused_in_one_line_or_read_to_what_it_says(bundle, name, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", os.devnull)  # a note of every digest would cost more than the reading
    text, manifest = (bundle / name).read_bytes(), (bundle / "bundle.json").read_bytes()
    schema = jsonschema.Draft202012Validator(json_schema()[name])
    outcomes = {"refused": 0, "read": 0}
    for seed in range(500):
        rng = random.Random(f"{name} {seed}")
        data = rng.choice([mutated_values] * 6 + [mutated_text] * 2 + [repeated_key])(rng, text)
        overwrite(bundle / "bundle.json", manifest)
        reseal(bundle, name, data)
        try:
            whole = read_bundle(bundle)
        except BundleError as error:
            assert str(error).isprintable(), (seed, str(error))
            assert len(str(error)) <= 500, (seed, str(error))
            outcomes["refused"] += 1
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}: {data!r}") from error
        document = json.loads(data, object_pairs_hook=once_each)
        value = {"bundle.json": whole.manifest, "program.json": whole.program, "weights.json": whole.weights}[name]
        assert means(value, document), (seed, data)
        assert schema.is_valid(document), (seed, data)
        outcomes["read"] += 1
        try:
            whole.folder("sharpen")
        except BundleError as error:
            assert str(error).isprintable(), (seed, str(error))
    assert outcomes["refused"] > 200
    assert outcomes["read"] > 20
