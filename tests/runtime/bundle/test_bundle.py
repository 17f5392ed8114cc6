"""The bundle as an adversary would hand it over: what is damaged is refused in one line, what is whole is read."""

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.runtime import load
from tilewright.runtime.bundle import digests, write
from tilewright.runtime.bundle.digests import cache_dir, sha256_of_bytes, sha256_of_file, writing
from tilewright.runtime.bundle.manifest import File, Manifest
from tilewright.runtime.bundle.program import Program
from tilewright.runtime.bundle.read import json_schema, read_bundle
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.weights import Weights
from tilewright.runtime.bundle.write import seal
from tilewright.runtime.errors import BundleError, EnvironmentMismatch, UsageError

DOCUMENTS = {"bundle.json": Manifest, "program.json": Program, "weights.json": Weights}
SEALED = ["constants.safetensors", "program.json", "sharpen.onnx", "weights.json"]
ABSENT = object()
TICKS = itertools.count(10**18, 10**9)  # modification times: no two writes of this module look alike


def refusal(act, *arguments, longest: int = 500) -> str:
    """The line in which a bundle is refused."""
    with pytest.raises(BundleError) as caught:
        act(*arguments)
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert text.isprintable(), f"more than one line: {text!r}"
    assert len(text) <= longest
    return text


def overwrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    tick = next(TICKS)
    os.utime(path, ns=(tick, tick))


def reseal(root: Path, name: str, data: bytes) -> None:
    """Write a document and, as a forger would, its size and digest into the manifest."""
    overwrite(root / name, data)
    if name != "bundle.json":
        manifest = json.loads((root / "bundle.json").read_text())
        manifest["files"][name] = {"size": len(data), "sha256": sha256_of_bytes(data)}
        overwrite(root / "bundle.json", json.dumps(manifest).encode())


def put(root: Path, name: str, keys: tuple, value: object) -> None:
    """Set, or take away, one value of a document."""
    document = json.loads((root / name).read_text())
    parent = document
    for key in keys[:-1]:
        parent = parent[key]
    if value is ABSENT:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = value
    reseal(root, name, json.dumps(document).encode())


def means(value: object, document: object) -> bool:
    """Whether a value that was read says what the JSON says, and nothing else."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: f for f in dataclasses.fields(value)}
        return (
            isinstance(document, dict)
            and document.keys() <= fields.keys()
            and all(
                means(getattr(value, name), document[name]) if name in document else is_default(value, field)
                for name, field in fields.items()
            )
        )
    if isinstance(value, Mapping):
        same = isinstance(document, dict) and value.keys() == document.keys()
        return same and all(means(value[key], document[key]) for key in value)
    if isinstance(value, tuple):
        same = isinstance(document, list) and len(value) == len(document)
        return same and all(map(means, value, document))
    if isinstance(value, bool) or isinstance(document, bool):
        return value is document
    if isinstance(value, float) and isinstance(document, int):
        return value == float(document)
    return type(value) is type(document) and value == document


def is_default(value: object, field: dataclasses.Field) -> bool:
    made = field.default_factory is not dataclasses.MISSING
    return getattr(value, field.name) == (field.default_factory() if made else field.default)


# Reading what is whole


@pytest.mark.parametrize("packed", [False, True])
def test_a_whole_bundle_reads_to_what_its_documents_say(build, packed):
    root = build(packed=packed)
    whole = read_bundle(root)
    assert whole.root == root
    for name, value in {
        "bundle.json": whole.manifest,
        "program.json": whole.program,
        "weights.json": whole.weights,
    }.items():
        assert means(value, json.loads((root / name).read_text()))
    assert sorted(whole.manifest.files) == SEALED
    assert whole.path("program.json") == root / "program.json"
    assert whole.digest == hashlib.sha256((root / "bundle.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("packed", [False, True])
def test_a_bundle_that_is_moved_still_reads_and_finds_its_weights(build, tmp_path, packed):
    before = build(packed=packed)
    moved = tmp_path / "else" / "where"
    moved.parent.mkdir()
    before.rename(moved)
    whole = read_bundle(moved)
    folder = whole.folder("sharpen")
    assert (folder / "sharpen.safetensors").is_file()
    assert folder.is_relative_to(moved) == packed


def test_a_bundle_reads_through_a_link_a_string_and_a_relative_path(bundle, tmp_path, monkeypatch):
    (tmp_path / "latest").symlink_to(bundle)
    assert read_bundle(tmp_path / "latest").manifest == read_bundle(str(bundle)).manifest
    monkeypatch.chdir(tmp_path)
    assert read_bundle(bundle.name).folder("sharpen") == read_bundle(bundle).folder("sharpen")


def test_a_link_that_stays_in_the_bundle_is_followed(bundle):
    (bundle / "sharpen.onnx").rename(bundle / "kept.onnx")
    (bundle / "sharpen.onnx").symlink_to("kept.onnx")
    read_bundle(bundle)


def test_reports_and_card_are_not_sealed(bundle):
    (bundle / "README.md").write_text("rewritten")
    (bundle / "reports").mkdir()
    (bundle / "reports" / "latency.json").write_text("{}")
    read_bundle(bundle)


# Refusing what is not: the directory and its files


def test_a_place_without_a_bundle_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert refusal(read_bundle, place) == (
            f"{place}: no bundle.json there; give the directory that 'tilewright export build' made"
        )
    assert refusal(read_bundle, tmp_path / ("x" * 300)).startswith(f"{tmp_path}/xxx")


def test_a_bundle_without_its_manifest_is_refused(bundle):
    (bundle / "bundle.json").unlink()
    assert str(bundle) in refusal(read_bundle, bundle)
    (bundle / "bundle.json").mkdir()
    assert str(bundle) in refusal(read_bundle, bundle)


@pytest.mark.parametrize("name", SEALED)
def test_a_missing_file_is_refused(bundle, name):
    (bundle / name).unlink()
    assert refusal(read_bundle, bundle) == f"{bundle / name}: missing; rebuild the bundle, or copy it again"
    (bundle / name).mkdir()
    assert refusal(read_bundle, bundle) == f"{bundle / name}: missing; rebuild the bundle, or copy it again"


@pytest.mark.parametrize("name", SEALED)
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\n", lambda data: b""])
def test_a_file_of_another_size_is_refused(bundle, name, change):
    data = (bundle / name).read_bytes()
    overwrite(bundle / name, change(data))
    text = refusal(read_bundle, bundle)
    assert text.startswith(f"{bundle / name}: {len(change(data))} bytes, sealed with {len(data)}; ")


@pytest.mark.parametrize("name", SEALED)
@pytest.mark.parametrize("position", [0, -1])
def test_a_file_with_one_changed_bit_is_refused(bundle, name, position):
    data = bytearray((bundle / name).read_bytes())
    data[position] ^= 1
    overwrite(bundle / name, bytes(data))
    assert refusal(read_bundle, bundle).startswith(f"{bundle / name}: SHA-256 differs from the sealed ")


def test_a_link_that_leaves_the_bundle_is_refused(bundle, tmp_path):
    (bundle / "sharpen.onnx").rename(tmp_path / "outside.onnx")
    for target in (tmp_path / "outside.onnx", "../outside.onnx"):
        (bundle / "sharpen.onnx").symlink_to(target)
        assert f"{bundle / 'bundle.json'}: 'sharpen.onnx' leaves the bundle" in refusal(read_bundle, bundle)
        (bundle / "sharpen.onnx").unlink()


def test_a_folder_that_is_a_link_out_of_the_bundle_is_refused(packed_bundle, tmp_path):
    (packed_bundle / "weights").rename(tmp_path / "outside")
    (packed_bundle / "weights").symlink_to("../outside")
    assert "'weights/sharpen' leaves the bundle" in refusal(read_bundle, packed_bundle)


def test_a_link_to_nothing_or_to_itself_is_refused(bundle):
    (bundle / "program.json").unlink()
    (bundle / "program.json").symlink_to("gone.json")
    assert f"{bundle / 'program.json'}: missing" in refusal(read_bundle, bundle)
    (bundle / "program.json").unlink()
    (bundle / "program.json").symlink_to("program.json")
    assert str(bundle) in refusal(read_bundle, bundle)


# Refusing what is not: the text of the documents


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("kept", [0, 1, 0.5, -2])
def test_a_truncated_document_is_refused(bundle, name, kept):
    data = (bundle / name).read_bytes().rstrip()
    reseal(bundle, name, data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    text = refusal(read_bundle, bundle)
    assert text.startswith(f"{bundle / name}: not valid JSON (")
    assert text.endswith("; rebuild the bundle")


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe\xfa", b"\0" * 64, b"[" * 200_000, b'{"a":' * 200_000, b"1" * 5000, b"{} {}"],
    ids=["not text", "zeros", "deep lists", "deep objects", "long number", "two documents"],
)
def test_a_document_that_is_no_json_is_refused(bundle, name, data):
    reseal(bundle, name, data)
    assert refusal(read_bundle, bundle).startswith(f"{bundle / name}: not valid JSON (")


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("data", [b"[]", b"null", b"3", b'"text"', b"NaN"])
def test_a_document_of_another_kind_is_refused(bundle, name, data):
    reseal(bundle, name, data)
    assert refusal(read_bundle, bundle).startswith(f"{bundle / name}: expected an object, found {data.decode()}")


@pytest.mark.parametrize(("name", "key"), [("bundle.json", "system"), ("program.json", "px"), ("weights.json", "size")])
def test_a_key_that_appears_twice_is_refused(bundle, name, key):
    text = (bundle / name).read_text()
    reseal(bundle, name, text.replace(f'"{key}":', f'"{key}": 1, "{key}":', 1).encode())
    assert (
        refusal(read_bundle, bundle) == f"{bundle / name}: key {key!r} appears twice in one object; rebuild the bundle"
    )


REQUIRED = {
    "bundle.json": [
        *((key,) for key in ("schema_version", "system", "preset", "precision", "licence", "components", "files")),
        ("made_with",),
        *(("components", "sharpen", key) for key in ("graph", "inputs", "outputs", "engines", "memory")),
        *(("components", "sharpen", "engines", 0, key) for key in ("backend", "precision", "file")),
        *(("components", "sharpen", "memory", key) for key in ("fixed", "per_px", "per_px2")),
        *(("components", "sharpen", "inputs", "image", key) for key in ("dtype", "shape")),
        *(("files", "program.json", key) for key in ("size", "sha256")),
    ],
    "program.json": [
        *((key,) for key in ("scale", "multiple_px", "grids", "passes")),
        *(("grids", "result", key) for key in ("px", "channels")),
        *(("passes", 0, "once", 0, key) for key in ("run", "inputs", "outputs")),
        *(("passes", 0, "tiles", key) for key in ("px", "overlap_px")),
        ("passes", 0, "name"),
    ],
    "weights.json": [
        *((key,) for key in ("folders", "tensors")),
        *(("folders", "sharpen", key) for key in ("path", "files")),
        *(("tensors", "sharpen", "weight", key) for key in ("file", "dtype", "shape", "offset", "length")),
    ],
}


@pytest.mark.parametrize(("name", "keys"), [(name, keys) for name, places in REQUIRED.items() for keys in places])
def test_a_missing_key_is_refused(bundle, name, keys):
    put(bundle, name, keys, ABSENT)
    text = refusal(read_bundle, bundle)
    assert text.startswith(str(bundle / name))
    assert text.endswith(f"key {keys[-1]!r} is missing; rebuild the bundle")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("bundle.json", ()),
        ("bundle.json", ("components", "sharpen")),
        ("bundle.json", ("components", "sharpen", "engines", 0)),
        ("bundle.json", ("files", "program.json")),
        ("program.json", ()),
        ("program.json", ("passes", 0, "once", 0)),
        ("weights.json", ()),
        ("weights.json", ("tensors", "sharpen", "weight")),
    ],
)
def test_an_unknown_key_is_refused(bundle, name, keys):
    put(bundle, name, (*keys, "surprise"), 1)
    text = refusal(read_bundle, bundle)
    assert text.startswith(str(bundle / name))
    assert "unknown key 'surprise'; known are " in text


MEMORY = ("components", "sharpen", "memory")
WEIGHT = ("tensors", "sharpen", "weight")


@pytest.mark.parametrize(
    ("name", "keys", "value", "words"),
    [
        ("bundle.json", ("schema_version",), 2, "schema 2, this version reads up to 1; upgrade tilewright"),
        ("bundle.json", ("schema_version",), 10**30, "this version reads up to 1; upgrade tilewright"),
        ("bundle.json", ("schema_version",), 0, "schema 0 is unknown, not 1; rebuild"),
        ("bundle.json", ("schema_version",), -1, "schema -1 is unknown, not 1; rebuild"),
        ("bundle.json", ("schema_version",), True, "schema_version: expected integer, found true"),
        ("bundle.json", ("schema_version",), 1.0, "schema_version: expected integer, found 1.0"),
        ("bundle.json", ("schema_version",), "1", 'schema_version: expected integer, found "1"'),
        ("bundle.json", ("components",), {}, "holds no component; rebuild"),
        ("bundle.json", ("components", "sharpen", "engines"), [], "component 'sharpen' has no engine; rebuild"),
        ("bundle.json", ("components", "sharpen", "engines"), {}, "engines: expected a list, found {}"),
        ("bundle.json", ("components", "sharpen", "engines", 0, "batch"), [1], "batch: expected a list of 2"),
        ("bundle.json", ("components", "sharpen", "graph"), "sharpen/a.onnx", "'sharpen/a.onnx' is used but not"),
        ("bundle.json", ("components", "sharpen", "engines", 0, "file"), "a.plan", "'a.plan' is used but not listed"),
        ("bundle.json", ("program",), "a.json", "'a.json' is used but not listed under files; rebuild"),
        ("bundle.json", ("weights",), "a.json", "'a.json' is used but not listed under files; rebuild"),
        ("bundle.json", ("constants",), "a.safetensors", "'a.safetensors' is used but not listed"),
        ("bundle.json", ("files", "program.json"), ABSENT, "'program.json' is used but not listed under files"),
        ("bundle.json", ("components", "sharpen", "inputs", "image", "dtype"), "float8", "dtype 'float8' is not one"),
        ("bundle.json", ("components", "sharpen", "inputs", "image", "shape"), [0], "shape [0] holds a size below 1"),
        ("bundle.json", ("components", "sharpen", "inputs", "image", "shape"), [1.5], "or string, found 1.5"),
        ("bundle.json", (*MEMORY, "fixed"), float("nan"), "fixed: expected a finite number, found NaN"),
        ("bundle.json", (*MEMORY, "fixed"), 10**400, "fixed: expected a finite number, found 1000"),
        ("bundle.json", (*MEMORY, "per_px"), -1, "memory 1000000.0, -1.0, 0.0 must lie between 0 and 2**63"),
        ("bundle.json", (*MEMORY, "per_px2"), 1e300, "memory 1000000.0, 24.0, 1e+300 must lie between 0 and 2**63"),
        ("bundle.json", ("files", "program.json", "size"), "518", 'size: expected integer, found "518"'),
        ("program.json", ("scale",), 0, "scale 0 must lie in 1..16"),
        ("program.json", ("grids", "result"), ABSENT, "grid 'result' must be there"),
        ("program.json", ("passes",), [], "no pass writes the grid 'result'"),
        ("program.json", ("passes", 0, "once", 0, "run"), "blur", "runs 'blur': no such component; there are sharpen"),
        ("program.json", ("passes", 0, "once", 0, "inputs"), {}, "input 'image' is missing"),
        ("program.json", ("passes", 0, "tiles", "px"), 60, "must be multiples of multiple_px 8"),
        ("program.json", ("passes", 0, "tiles", "overlap_px"), 40, "overlap_px 40 must lie between 0 and half"),
        ("weights.json", (*WEIGHT, "length"), 109, "sharpen.weight reaches past the end of 'sharpen.safetensors'"),
        ("weights.json", (*WEIGHT, "offset"), 185, "sharpen.weight reaches past the end of 'sharpen.safetensors'"),
        ("weights.json", (*WEIGHT, "offset"), -1, "sharpen.weight reaches past the end of 'sharpen.safetensors'"),
        ("weights.json", (*WEIGHT, "length"), -1, "sharpen.weight reaches past the end of 'sharpen.safetensors'"),
        ("weights.json", (*WEIGHT, "file"), "a.safetensors", "lies in 'a.safetensors', which is not listed"),
        ("weights.json", (*WEIGHT, "folder"), "a", "lies in 'sharpen.safetensors', which is not listed"),
        ("weights.json", (*WEIGHT, "folder"), ABSENT, "lies in 'sharpen.safetensors', which is not listed"),
        ("weights.json", ("tensors", "blur"), {}, "weights of 'blur', which is no component"),
        ("weights.json", ("folders", "sharpen", "path"), "models", "folder 'sharpen': path 'models' is not absolute"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(bundle, name, keys, value, words):
    put(bundle, name, keys, value)
    text = refusal(read_bundle, bundle)
    assert text.startswith(str(bundle / name))
    assert words in text


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../b", "..", ".", "./a", "a//b", "a/", "", "a\\b", "a\nb"])
@pytest.mark.parametrize(
    "keys",
    [
        ("components", "sharpen", "graph"),
        ("components", "sharpen", "engines", 0, "file"),
        ("program",),
        ("weights",),
        ("constants",),
        ("files",),
    ],
    ids=lambda keys: keys[-1],
)
def test_a_path_that_is_not_plain_relative_and_posix_is_refused(bundle, keys, path):
    if keys == ("files",):
        put(bundle, "bundle.json", ("files", path), {"size": 0, "sha256": ""})
    else:
        put(bundle, "bundle.json", keys, path)
    assert f"{bundle / 'bundle.json'}: path {path!r} is not a plain relative POSIX path" in refusal(read_bundle, bundle)


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../b", "..", ".", "./a", "a//b", "a/", "", "a\\b", "a\nb"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_weights_path_that_is_not_plain_relative_and_posix_is_refused(bundle, kind, path):
    document = json.loads((bundle / "weights.json").read_text())
    names = document["folders"]["sharpen"]["files"] if kind == "file" else document["folders"]
    names[path] = copy.deepcopy(next(iter(names.values())))
    reseal(bundle, "weights.json", json.dumps(document).encode())
    text = refusal(read_bundle, bundle)
    assert text.startswith(f"{bundle / 'weights.json'}: path '")
    assert "is not a plain relative POSIX path" in text


@pytest.mark.parametrize("place", ["files", "weights"])
def test_a_name_too_long_for_the_disk_is_missing(bundle, place):
    entry = {"size": 0, "sha256": sha256_of_bytes(b"")}
    if place == "files":
        put(bundle, "bundle.json", ("files", "x" * 300), entry)
        assert "xxx: missing; rebuild the bundle" in refusal(read_bundle, bundle)
    else:
        put(bundle, "weights.json", ("folders", "sharpen", "files", "x" * 300), entry)
        text = refusal(read_bundle(bundle).folder, "sharpen", longest=2000)
        assert "xxx of 'sharpen' are in none of " in text


def test_foreign_text_cannot_break_or_flood_the_line(bundle):
    put(bundle, "program.json", ("passes", 0, "once", 0, "outputs", "sharp"), "\x1b[31m red \n" * 1000)
    text = refusal(read_bundle, bundle)
    assert text.startswith(str(bundle / "program.json"))
    assert "letters, digits and underscores" in text


# Weights


def test_weights_are_searched_in_the_bundle_then_in_the_given_folder_then_where_they_were(build, tmp_path):
    root, given_dir = build(), tmp_path / "given"
    recorded = tmp_path / "models" / "sharpen"
    one_down = [given_dir / "a" / "sharpen", given_dir / "b" / "sharpen"]
    places = [root / "weights" / "sharpen", given_dir / "sharpen", given_dir, *one_down, recorded]
    for place in places[:-1]:
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(recorded / "sharpen.safetensors", place)
    whole = read_bundle(root)
    for place in places:
        assert whole.folder("sharpen", given_dir) == place
        (place / "sharpen.safetensors").unlink()
    text = refusal(whole.folder, "sharpen", given_dir, longest=2000)  # it names six places
    assert text == (
        f"{root}: weights sharpen.safetensors of 'sharpen' are in none of {', '.join(map(str, places))};"
        " pass --weights-dir, or rebuild with --pack"
    )


def test_files_of_the_same_names_that_are_another_folders_do_not_end_the_search(build, tmp_path):
    whole, right = read_bundle(build()), tmp_path / "models" / "sharpen"
    for place in ("given", "given/sharpen", "given/a/sharpen"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        overwrite(tmp_path / place / "sharpen.safetensors", b"another's")
        assert whole.folder("sharpen", tmp_path / "given") == right
    (tmp_path / "given" / "b").mkdir()
    right.rename(tmp_path / "given" / "b" / "sharpen")
    assert whole.folder("sharpen", tmp_path / "given") == tmp_path / "given" / "b" / "sharpen"
    (tmp_path / "given" / "b" / "sharpen" / "sharpen.safetensors").unlink()
    said = refusal(whole.folder, "sharpen", tmp_path / "given")
    assert said.startswith(f"{tmp_path / 'given' / 'sharpen' / 'sharpen.safetensors'}: 9 bytes, sealed with ")


def test_without_a_given_folder_weights_are_searched_in_the_bundle_and_where_they_were(bundle, weights_dir):
    (weights_dir / "sharpen.safetensors").unlink()
    text = refusal(read_bundle(bundle).folder, "sharpen")
    assert f"in none of {bundle / 'weights' / 'sharpen'}, {weights_dir};" in text


def test_packed_weights_that_are_missing_are_refused(packed_bundle):
    (packed_bundle / "weights" / "sharpen" / "sharpen.safetensors").unlink()
    assert f"are in none of {packed_bundle / 'weights' / 'sharpen'};" in refusal(
        read_bundle(packed_bundle).folder, "sharpen"
    )


@pytest.mark.parametrize("packed", [False, True])
def test_changed_weights_are_refused_and_named(build, weights_dir, packed):
    root = build(packed=packed)
    path = (root / "weights" / "sharpen" if packed else weights_dir) / "sharpen.safetensors"
    data = path.read_bytes()
    overwrite(path, data[:-1] + bytes([data[-1] ^ 1]))
    assert refusal(read_bundle(root).folder, "sharpen").startswith(f"{path}: SHA-256 differs from the sealed ")
    overwrite(path, data + b"\0")
    assert refusal(read_bundle(root).folder, "sharpen").startswith(f"{path}: {len(data) + 1} bytes, sealed with")


def test_packed_weights_behind_a_link_that_leaves_the_bundle_are_refused(packed_bundle, tmp_path):
    packed = packed_bundle / "weights" / "sharpen"
    for inside in (packed / "sharpen.safetensors", packed):
        inside.rename(tmp_path / "outside")
        inside.symlink_to(tmp_path / "outside")
        text = refusal(read_bundle, packed_bundle)
        assert text.startswith(f"{packed_bundle / 'weights.json'}: 'weights/sharpen")
        assert "leaves the bundle through a link" in text
        inside.unlink()
        (tmp_path / "outside").rename(inside)
    read_bundle(packed_bundle)


def test_a_component_without_weights_has_no_folder_and_no_file(tinted):
    assert read_bundle(tinted).weights.folders_of("see") == []
    assert read_bundle(tinted).files_of("see") == {}


EXTRA = ("tensors", "add", "half")


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        ((*EXTRA, "folder"), "elsewhere", "add.half lies in 'weights.safetensors', which is not listed"),
        ((*EXTRA, "folder"), "", "add.half lies in 'weights.safetensors', which is not listed"),
        ((*EXTRA, "folder"), 1, "half.folder: expected string, found 1"),
        ((*EXTRA, "file"), "other.safetensors", "add.half lies in 'other.safetensors', which is not listed"),
        ((*EXTRA, "offset"), 10_000, "add.half reaches past the end of 'weights.safetensors'"),
        (("folders", "extra"), ABSENT, "lies in 'weights.safetensors', which is not listed"),
        (("folders", "extra", "files"), {}, "lies in 'weights.safetensors', which is not listed"),
        (("folders", "extra", "path"), "other/extra", "folder 'extra': path 'other/extra' is not absolute"),
    ],
)
def test_a_weight_in_a_second_folder_is_checked_as_one_in_the_first(two_folder_bundle, keys, value, words):
    root = two_folder_bundle()
    put(root, "weights.json", keys, value)
    assert words in refusal(read_bundle, root)


@pytest.mark.parametrize("packed", [False, True], ids=["external", "packed"])
def test_a_graph_names_its_files_as_they_lie_in_a_packed_bundle(two_folder_bundle, tmp_path, packed):
    root = two_folder_bundle(packed=packed)
    whole = read_bundle(root)
    base, extra = "weights/base/weights.safetensors", "weights/extra/weights.safetensors"
    graph = onnx.load(root / "add.onnx", load_external_data=False)
    assert {e.value for t in graph.graph.initializer for e in t.external_data if e.key == "location"} == {base, extra}
    there = [tmp_path / "models" / "base", tmp_path / "other" / "extra"]
    places = {base: there[0] / "weights.safetensors", extra: there[1] / "weights.safetensors"}
    assert whole.files_of("add") == ({name: root / name for name in places} if packed else places)
    assert whole.weights.folders_of("add") == ["base", "extra"] and whole.files_of("nothing") == {}


# Tokenizers


def test_a_bundles_tokenizers_are_sealed(tinted):
    whole = read_bundle(tinted)
    assert whole.manifest.tokenizers == ("tokenizers/words.json",)
    assert "tokenizers/words.json" in whole.manifest.files
    path = tinted / "tokenizers" / "words.json"
    overwrite(path, path.read_bytes().replace(b"warm", b"cold"))
    assert refusal(read_bundle, tinted).startswith(f"{path}: SHA-256 differs from the sealed ")
    path.unlink()
    assert refusal(read_bundle, tinted).startswith(f"{path}: missing; ")


@pytest.mark.parametrize(
    ("name", "keys", "value", "words"),
    [
        ("bundle.json", ("tokenizers",), [], "program.json: tokenizer 'tokenizers/words.json' is not listed; rebuild"),
        ("bundle.json", ("tokenizers",), ["a.json"], "bundle.json: 'a.json' is used but not listed under files"),
        ("bundle.json", ("tokenizers",), ["../a.json"], "path '../a.json' is not a plain relative POSIX path"),
        ("bundle.json", ("tokenizers",), "a.json", 'tokenizers: expected a list, found "a.json"'),
        ("bundle.json", ("files", "tokenizers/words.json"), ABSENT, "is used but not listed under files; rebuild"),
        ("program.json", ("texts", "prompt", "ids", "ids"), "a.json", "tokenizer 'a.json' is not listed; rebuild"),
    ],
)
def test_a_tokenizer_that_is_not_sealed_is_refused(tinted, name, keys, value, words):
    put(tinted, name, keys, value)
    assert words in refusal(read_bundle, tinted)


# Sealing


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_sealing_moves_the_staged_directory_and_lists_every_file(staged, tmp_path):
    staging, manifest = staged()
    before = entries(tmp_path)
    seal(staging, manifest, tmp_path / "out" / "deep" / "x.bundle")
    assert entries(tmp_path) == before - {"staging"} | {"out"}
    assert entries(tmp_path / "out" / "deep") == {"x.bundle"}
    root = tmp_path / "out" / "deep" / "x.bundle"
    assert entries(root) == {"README.md", "bundle.json", *(name.split("/")[0] for name in SEALED)}
    files = read_bundle(root).manifest.files
    assert sorted(files) == SEALED
    for name, file in files.items():
        data = (root / name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_files_that_the_caller_lists_are_listed_anew(staged, tmp_path):
    staging, manifest = staged()
    seal(staging, dataclasses.replace(manifest, files={"stale": File(1, "")}), tmp_path / "x.bundle")
    assert sorted(read_bundle(tmp_path / "x.bundle").manifest.files) == SEALED


def test_identical_inputs_give_an_identical_manifest_with_sorted_keys(build):
    one, other = build("one"), build("other")
    text = (one / "bundle.json").read_bytes()
    assert text == (other / "bundle.json").read_bytes()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True).encode() + b"\n"


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchanged", "renamed twice"])
def test_an_existing_bundle_is_replaced_and_nothing_is_left_beside_it(
    build, staged, tmp_path, monkeypatch, can_exchange
):
    target = build("x.bundle")
    (target / "old").touch()
    staging, manifest = staged()
    (staging / "new").touch()
    before = entries(tmp_path)
    if not can_exchange:
        monkeypatch.setattr(write.ctypes, "CDLL", lambda *_, **__: object())
    seal(staging, manifest, target)
    assert entries(tmp_path) == before - {"staging"}
    assert "new" in entries(target)
    assert "old" not in entries(target)
    read_bundle(target)


def test_a_reader_finds_a_whole_bundle_at_every_moment_of_a_replacement(build, staged, tmp_path):
    target, done, read_times, faults = build("x.bundle"), threading.Event(), [], []

    def watch():
        while not done.is_set():
            try:
                assert json.loads((target / "bundle.json").read_bytes())["system"] == "sharpen"
            except (OSError, ValueError, AssertionError) as fault:
                faults.append(fault)
            read_times.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for turn in range(20):
        seal(*staged(f"staging{turn}"), target)
    done.set()
    watcher.join()
    assert len(read_times) > 20
    assert not faults


def test_the_old_bundle_is_deleted_only_when_the_new_one_is_in_place(build, staged, monkeypatch):
    target = build("x.bundle")
    (target / "old").touch()
    staging, manifest = staged()
    seen = []
    delete = shutil.rmtree

    def watched(path, *rest, **more):
        seen.append(((path / "old").exists(), (target / "old").exists(), read_bundle(target).root))
        delete(path, *rest, **more)

    monkeypatch.setattr(write.shutil, "rmtree", watched)
    seal(staging, manifest, target)
    assert seen == [(True, False, target)]


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_all_is_on_disk_before_a_bundle_appears_and_its_name_soon_after(build, staged, tmp_path, monkeypatch, there):
    target = build("x.bundle") if there else tmp_path / "x.bundle"
    staging, manifest = staged()
    synced, before = [], []
    sync, exchange, rename = os.fsync, write._exchange, Path.rename

    def appearing(act, *arguments):
        if arguments[0] == staging:
            inodes = {path.stat().st_ino: path for path in [staging, *staging.rglob("*")]}
            before.extend(path for inode, path in inodes.items() if inode not in synced)
            synced.clear()
        return act(*arguments)

    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino) or sync(fd))
    monkeypatch.setattr(write, "_exchange", lambda *arguments: appearing(exchange, *arguments))
    monkeypatch.setattr(Path, "rename", lambda *arguments: appearing(rename, *arguments))
    seal(staging, manifest, target)
    assert before == []
    assert target.parent.stat().st_ino in synced


def test_an_empty_directory_can_be_the_target(staged, tmp_path):
    (tmp_path / "x.bundle").mkdir()
    seal(*staged(), tmp_path / "x.bundle")
    read_bundle(tmp_path / "x.bundle")
    assert "staging" not in entries(tmp_path)


def test_a_link_to_a_bundle_keeps_pointing_at_it_when_it_is_replaced(build, staged, tmp_path):
    target = build("x.bundle")
    (target / "old").touch()
    (tmp_path / "latest").symlink_to("x.bundle")
    before = entries(tmp_path)
    seal(*staged(), tmp_path / "latest")
    assert entries(tmp_path) == before
    assert (tmp_path / "latest").readlink() == Path("x.bundle")
    assert "old" not in entries(target)
    read_bundle(tmp_path / "latest")


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_target_that_is_something_else_is_refused_untouched(staged, tmp_path, kind):
    target = tmp_path / "photos"
    if kind == "directory":
        target.mkdir()
    holiday = target / "holiday.png" if kind == "directory" else target
    holiday.write_bytes(b"irreplaceable")
    staging, manifest = staged()
    with pytest.raises(UsageError, match=rf"^{target}: exists and is not a bundle of tilewright; choose another -o$"):
        seal(staging, manifest, target)
    assert holiday.read_bytes() == b"irreplaceable"
    assert entries(tmp_path) == {"models", "photos", "staging"}


def test_a_bundle_that_does_not_check_never_reaches_the_target(build, staged, tmp_path):
    target = build("x.bundle")
    before = (target / "bundle.json").read_bytes()
    staging, manifest = staged()
    reseal_free = json.loads((staging / "program.json").read_text()) | {"passes": []}
    (staging / "program.json").write_text(json.dumps(reseal_free))
    assert "no pass writes the grid 'result'" in refusal(seal, staging, manifest, target)
    assert (target / "bundle.json").read_bytes() == before
    read_bundle(target)


# JSON Schema


def test_the_published_schemas_are_valid_and_fit_a_bundle(packed_bundle):
    schemas = json_schema()
    assert set(schemas) == set(DOCUMENTS)
    for name, schema in schemas.items():
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema)
        document = json.loads((packed_bundle / name).read_text())
        validator.validate(document)
        assert not validator.is_valid(document | {"surprise": 1})
        assert not validator.is_valid([])
        for keys in REQUIRED[name]:
            lacking = copy.deepcopy(document)
            parent = lacking
            for key in keys[:-1]:
                parent = parent[key]
            del parent[keys[-1]]
            assert not validator.is_valid(lacking), keys


def test_the_published_schemas_say_the_default_of_all_that_may_be_left_out():
    for schema in json_schema().values():
        for name, definition in schema["$defs"].items():
            for key, value in definition["properties"].items():
                assert ("default" in value) != (key in definition["required"]), (name, key)
                if "default" in value:
                    whole = {**value, "$defs": schema["$defs"]}
                    jsonschema.Draft202012Validator(whole).validate(value["default"])
    assert json_schema()["program.json"]["$defs"]["Tiles"]["properties"]["batch"] == {"type": "integer", "default": 1}


# Digests


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_a_digest_is_that_of_hashlib(tmp_path, size):
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    for _ in range(2):
        assert sha256_of_file(tmp_path / "file") == hashlib.sha256(data).hexdigest() == sha256_of_bytes(data)


def test_a_change_that_keeps_the_size_is_noticed_by_its_time(tmp_path):
    overwrite(tmp_path / "file", b"one")
    first = sha256_of_file(tmp_path / "file")
    overwrite(tmp_path / "file", b"two")
    assert sha256_of_file(tmp_path / "file") == sha256_of_bytes(b"two") != first


def test_a_file_put_in_the_place_of_another_is_noticed_even_with_its_time(tmp_path):
    for name, data in {"file": b"one", "other": b"two"}.items():
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    assert sha256_of_file(tmp_path / "file") == sha256_of_bytes(b"one")
    (tmp_path / "other").rename(tmp_path / "file")
    assert sha256_of_file(tmp_path / "file") == sha256_of_bytes(b"two")


def test_a_change_in_place_is_noticed_even_with_the_time_put_back(tmp_path):
    seen = []
    for data in (b"one", b"two"):  # in place, so with the same inode
        (tmp_path / "file").write_bytes(data)
        os.utime(tmp_path / "file", ns=(10**18, 10**18))
        status = (tmp_path / "file").stat()
        seen.append((status.st_size, status.st_mtime_ns, status.st_ino))
        assert sha256_of_file(tmp_path / "file") == sha256_of_bytes(data)
        time.sleep(0.02)  # the clock of a disk ticks every few milliseconds
    assert seen[0] == seen[1]


def note_of(path: Path) -> Path:
    """Where the digest of a file as it is now is remembered."""
    return cache_dir() / "digests" / sha256_of_bytes(json.dumps(digests._seen(path)).encode())


def test_a_file_that_looks_unchanged_is_not_read_again_but_when_asked(tmp_path):
    (tmp_path / "file").write_bytes(b"one")
    right = sha256_of_file(tmp_path / "file")
    note_of(tmp_path / "file").write_text("0" * 64)
    assert sha256_of_file(tmp_path / "file") == "0" * 64
    assert sha256_of_file(tmp_path / "file", fresh=True) == right == sha256_of_bytes(b"one")
    assert sha256_of_file(tmp_path / "file") == right  # what was read takes the place of what was remembered


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "file").write_bytes(b"one")
    read_whole = digests._sha256

    def changing(path):
        found = read_whole(path)
        overwrite(path, b"two")
        return found

    monkeypatch.setattr(digests, "_sha256", changing)
    sha256_of_file(tmp_path / "file")
    assert not (tmp_path / "cache").exists()


def test_a_fresh_reading_reads_every_sealed_file_and_weights_once(bundle, weights_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    read_files, read_whole = [], digests._sha256
    monkeypatch.setattr(digests, "_sha256", lambda path: read_files.append(path.name) or read_whole(path))
    for fresh in (False, False, True):
        read_files.clear()
        whole = read_bundle(bundle, fresh=fresh)
        for _ in range(3):
            whole.folder("sharpen")
    assert sorted(read_files) == sorted([Path(name).name for name in SEALED] + ["sharpen.safetensors"])


def test_weights_that_a_wrong_note_vouches_for_are_noticed_by_a_fresh_reading(bundle, weights_dir):
    path = weights_dir / "sharpen.safetensors"
    sealed = sha256_of_file(path)
    overwrite(path, b"x" + path.read_bytes()[1:])
    sha256_of_file(path)
    note_of(path).write_text(sealed)
    assert read_bundle(bundle).folder("sharpen") == weights_dir
    assert "SHA-256 differs" in refusal(read_bundle(bundle, fresh=True).folder, "sharpen")


def test_without_a_home_a_bundle_reads_and_a_build_is_told_what_to_set(bundle, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TILEWRIGHT_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert read_bundle(bundle).folder("sharpen").is_dir()
    with pytest.raises(EnvironmentMismatch, match="; set TILEWRIGHT_CACHE_DIR"):
        cache_dir()


@pytest.mark.parametrize("note", [b"", b"0", b"g" * 64, b"\xff" * 64, b"\0" * 64, b"0" * 63 + b"\n", b"0" * 65, None])
def test_a_corrupt_note_is_ignored_and_written_anew(tmp_path, monkeypatch, note):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "file").write_bytes(b"data")
    right = sha256_of_bytes(b"data")
    assert sha256_of_file(tmp_path / "file") == right
    (path,) = (tmp_path / "cache" / "digests").iterdir()
    path.unlink()
    if note is None:
        path.mkdir()
    else:
        path.write_bytes(note)
    assert sha256_of_file(tmp_path / "file") == right
    assert note is None or path.read_bytes() == right.encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_bundle_reads_where_the_cache_cannot_be_written(bundle, tmp_path, monkeypatch):
    (tmp_path / "cache").write_bytes(b"a file in the way")
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    assert read_bundle(bundle).folder("sharpen").is_dir()
    overwrite(bundle / "sharpen.onnx", b"\0" * (bundle / "sharpen.onnx").stat().st_size)
    assert "SHA-256 differs" in refusal(read_bundle, bundle)
    assert (tmp_path / "cache").read_bytes() == b"a file in the way"


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", "/chosen")
    assert cache_dir() == Path("/chosen")
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/tilewright")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "tilewright"


def test_writers_of_one_file_never_meet_in_a_temporary_one(tmp_path):
    with writing(tmp_path / "file") as one, writing(tmp_path / "file") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one"
    assert entries(tmp_path) == {"file"}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), writing(tmp_path / "file") as temporary:
        temporary.write_text("new")
        raise RuntimeError("halfway")
    assert (tmp_path / "file").read_text() == "old"
    assert entries(tmp_path) == {"file"}


# Headers of safetensors files

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda t: t != "__metadata__"),
    st.tuples(st.sampled_from(list(WIDTHS)), st.lists(st.integers(1, 4), max_size=4)),
    max_size=6,
)
METADATA = st.dictionaries(st.text(max_size=3), st.text(max_size=3), min_size=1, max_size=2)


@settings(deadline=None, max_examples=100)
@given(tensors=TENSORS, metadata=st.none() | METADATA)
def test_a_header_says_what_the_safetensors_package_says(tmp_path_factory, tensors, metadata):
    arrays = {n: np.frombuffer(os.urandom(WIDTHS[d] * math.prod(shape)), np.uint8) for n, (d, shape) in tensors.items()}
    fed = {
        name: safetensors.TensorSpec(
            dtype=dtype, shape=shape, data_ptr=arrays[name].ctypes.data, data_len=arrays[name].nbytes
        )
        for name, (dtype, shape) in tensors.items()
    }
    data = safetensors.serialize(fed, metadata)
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(data)
    header = safetensors_header(path)
    wanted = dict(safetensors.deserialize(data))
    assert header.keys() == wanted.keys()
    for name, (spec, offset, length) in header.items():
        assert (spec.dtype, list(spec.shape)) == (tensors[name][0], wanted[name]["shape"])
        assert data[offset : offset + length] == bytes(wanted[name]["data"]) == arrays[name].tobytes()


def safetensors_file(path: Path, header: object, body: bytes = b"\0" * 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["two"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": "08"},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"shape": [2], "data_offsets": [0, 8]},
        [],
        None,
    ],
    ids=json.dumps,
)
def test_a_header_that_lies_is_refused(tmp_path, entry):
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert safetensors_header(safetensors_file(tmp_path / "good", {"a": good}))["a"][2] == 8
    path = safetensors_file(tmp_path / "bad", {"b": good, "a": entry})
    assert refusal(safetensors_header, path).startswith(f"{path}: unreadable safetensors header (")


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ([], None),
        (3, None),
        (b"", None),
        (b"{", None),
        (b"\xff\xff", None),
        (b"[" * 200_000, None),
        (b"{}", 11),
        (b"{}", 2**63),
        (b"{}", 2**64 - 1),
        ({"x" * 10_000: 3}, None),
        ({"a": {"dtype": "F32", "shape": [1] * 1000 + [0], "data_offsets": [0, 0]}}, None),
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path, header, length):
    path = safetensors_file(tmp_path / "bad", header, length=length)
    assert refusal(safetensors_header, path).startswith(str(path))


def test_a_truncated_safetensors_file_is_refused_at_every_length(weights_dir, tmp_path):
    data = (weights_dir / "sharpen.safetensors").read_bytes()
    path = tmp_path / "cut"
    for kept in range(len(data)):
        path.write_bytes(data[:kept])
        assert refusal(safetensors_header, path).startswith(str(path))
    path = safetensors_file(path, b"{}", body=b"", length=3)
    assert refusal(safetensors_header, path) == f"{path}: not a safetensors file, or cut short; copy it again"


def test_a_bundle_whose_constants_are_damaged_is_refused(bundle):
    reseal(bundle, "constants.safetensors", b"\xff" * 64)
    assert refusal(read_bundle, bundle).startswith(f"{bundle / 'constants.safetensors'}: not a safetensors file")


# Mutations

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


# What graphs read outside


def change_graph(root: Path, change, file: str = "sharpen.onnx") -> None:
    """Change the first weight of a sealed graph."""
    model = onnx.load(root / file, load_external_data=False)
    weight = next(t for t in model.graph.initializer if t.external_data)
    change(weight)
    reseal(root, file, model.SerializeToString())


def says(key: str, value: object):
    def change(weight):
        next(entry for entry in weight.external_data if entry.key == key).value = str(value)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (says("location", "secret.bin"), "of 'secret.bin', which weights.json does not say"),
        (says("location", "/etc/passwd"), "of '/etc/passwd', which"),
        (
            says("location", "../models/sharpen/sharpen.safetensors"),
            "of '../models/sharpen/sharpen.safetensors', which",
        ),
        (says("offset", 8), "108 bytes at 8 of 'weights/sharpen/sharpen.safetensors'"),
        (says("length", 4), "is float32 [3, 1, 3, 3], 4 bytes at "),
        (lambda weight: setattr(weight, "name", "other"), "'other' is float32"),
        (lambda weight: setattr(weight, "data_type", 6), "is int32 [3, 1, 3, 3]"),
        (lambda weight: weight.dims.append(1), "is float32 [3, 1, 3, 3, 1]"),
        (lambda weight: weight.external_data.add(key="checksum", value="0"), "not an ONNX graph ('weight' says its"),
    ],
)
def test_a_graph_that_reads_what_its_weights_do_not_say_is_refused(bundle, change, words):
    change_graph(bundle, change)
    text = refusal(read_bundle, bundle)
    assert text.startswith(f"{bundle / 'sharpen.onnx'}: ")
    assert words in text


def test_an_engines_own_graph_is_checked_as_the_portable_one(staged, tmp_path):
    staging, manifest = staged()
    file = "engines/sharpen.ort-float32/model.onnx"
    (staging / file).parent.mkdir(parents=True)
    shutil.copy(staging / "sharpen.onnx", staging / file)
    component = manifest.components["sharpen"]
    engines = (dataclasses.replace(component.engines[0], file=file),)
    components = {"sharpen": dataclasses.replace(component, engines=engines)}
    seal(staging, dataclasses.replace(manifest, components=components), tmp_path / "b")
    change_graph(tmp_path / "b", says("location", "secret.bin"), file)
    assert refusal(read_bundle, tmp_path / "b").startswith(f"{tmp_path / 'b' / file}: 'weight' is ")


def test_weights_may_say_more_than_graphs_read(bundle):
    document = json.loads((bundle / "weights.json").read_text())
    put(bundle, "weights.json", ("tensors", "sharpen", "dropped"), document["tensors"]["sharpen"]["weight"])
    assert set(read_bundle(bundle).weights.tensors["sharpen"]) == {"weight", "dropped"}


# The folder that is asked for


def test_a_folder_used_instead_of_the_one_asked_for_is_said_once(bundle, weights_dir, tmp_path, caplog):
    (tmp_path / "given").mkdir()
    whole = read_bundle(bundle)
    for _ in range(2):
        assert whole.folder("sharpen", tmp_path / "given") == weights_dir
    (said,) = caplog.records
    assert (said.name, said.levelname) == ("tilewright", "WARNING")
    assert said.message == f"weights of 'sharpen': {weights_dir} is used, not {tmp_path / 'given'}; see --weights-dir"


def test_packed_weights_used_instead_of_the_folder_asked_for_are_said(build, weights_dir, caplog):
    root = build(packed=True)
    assert read_bundle(root).folder("sharpen", weights_dir) == root / "weights" / "sharpen"
    assert f"{root / 'weights' / 'sharpen'} is used, not {weights_dir}" in caplog.text


def test_the_folder_asked_for_is_used_without_a_word(bundle, weights_dir, caplog):
    for asked in (weights_dir, weights_dir.parent, weights_dir.parent.parent, None):
        read_bundle(bundle).folder("sharpen", asked)
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["nothing", "file"])
def test_a_folder_that_is_none_is_refused(bundle, weights_dir, tmp_path, kind):
    given = tmp_path / "nowhere" if kind == "nothing" else weights_dir / "sharpen.safetensors"
    for act in (lambda: read_bundle(bundle).folder("sharpen", given), lambda: load(bundle, weights_dir=given)):
        with pytest.raises(UsageError, match=rf"^--weights-dir {given} is no folder; give"):
            act()


# The bundle that is expected


@pytest.mark.parametrize("digits", [12, 20, 64])
def test_a_bundle_is_pinned_by_its_digest(bundle, digits):
    digest = sha256_of_bytes((bundle / "bundle.json").read_bytes())
    assert (
        read_bundle(bundle, expect=digest[:digits]).digest
        == digest
        == read_bundle(bundle, expect=digest.upper()).digest
    )
    with load(bundle, expect=digest[:digits]) as restorer:
        assert restorer.bundle.digest == digest
    other = ("0" if digest[digits - 1] != "0" else "1").join([digest[: digits - 1], ""])
    for act in (read_bundle, load):
        with pytest.raises(BundleError) as caught:
            act(bundle, expect=other)
        assert str(caught.value) == (
            f"{bundle / 'bundle.json'}: SHA-256 {digest} is not the expected {other}; get the bundle you pinned"
        )


@pytest.mark.parametrize("expect", ["", "0" * 11, "0" * 65, "g" * 12, "0" * 12 + "\n", "sha256:" + "0" * 64])
def test_a_pin_that_is_no_digest_is_refused(bundle, expect):
    with pytest.raises(UsageError, match=r"^--expect .* is no digest; give 12 to 64 hexadecimal digits") as caught:
        read_bundle(bundle, expect=expect)
    assert str(caught.value).isprintable()
