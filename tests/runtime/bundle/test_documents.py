"""Documents of a bundle that cannot be meant are refused in one line."""

import copy
import json

import pytest

from support.forged import ABSENT, DOCUMENTS, REQUIRED, put, refusal, reseal
from tilewright.runtime.bundle.read import read_bundle


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


MEMORY = ("components", "sharpen", "engines", 0, "memory")
PROFILE = ("components", "sharpen", "engines", 0, "profile")
NEEDS = ("components", "sharpen", "engines", 0, "needs")
WEIGHT = ("tensors", "sharpen", "weight")


@pytest.mark.parametrize(
    ("name", "keys", "value", "words"),
    [
        ("bundle.json", ("schema_version",), 3, "schema 3, this version reads up to 2; upgrade tilewright"),
        ("bundle.json", ("schema_version",), 10**30, "this version reads up to 2; upgrade tilewright"),
        ("bundle.json", ("schema_version",), 0, "schema 0 is too old, this version reads 2; run tilewright"),
        ("bundle.json", ("schema_version",), -1, "schema -1 is too old, this version reads 2; run tilewright"),
        ("bundle.json", ("schema_version",), True, "schema_version: expected integer, found true"),
        ("bundle.json", ("schema_version",), 2.0, "schema_version: expected integer, found 2.0"),
        ("bundle.json", ("schema_version",), "2", 'schema_version: expected integer, found "2"'),
        ("bundle.json", ("components",), {}, "holds no component; rebuild"),
        ("bundle.json", ("components", "sharpen", "engines"), [], "sharpen: engines must have at least 1"),
        ("bundle.json", ("components", "sharpen", "engines"), {}, "engines: expected a list, found {}"),
        ("bundle.json", ("components", "sharpen", "engines", 0, "files"), [], "engines[0]: files must have at least 1"),
        ("bundle.json", ("components", "sharpen", "engines", 0, "device"), "tpu", "'tpu' is not one of cpu, cuda"),
        ("bundle.json", ("components", "sharpen", "engines", 0, "name"), "a/b", "name 'a/b' does not match "),
        (
            "bundle.json",
            ("components", "sharpen", "engines", 0, "weights"),
            "a",
            "weights.json has no table 'a'; rebuild",
        ),
        ("bundle.json", (*PROFILE, "batch", "most"), 0, "profile.batch: most 0 must be at least 1"),
        ("bundle.json", (*PROFILE, "batch", "least"), 2, "profile: batch.least 2 must be 1"),
        ("bundle.json", (*PROFILE, "side_px", "most"), 0, "profile.side_px: most 0 must be at least 1"),
        ("bundle.json", (*PROFILE, "batch", "least"), 33, "profile.batch: least 33 must not exceed most 32"),
        ("bundle.json", (*NEEDS, "packages"), {"a": "new"}, "needs: least version 'new' of 'a' is not like 1.22"),
        ("bundle.json", ("components", "sharpen", "graph"), "sharpen/a.onnx", "'sharpen/a.onnx' is used but not"),
        (
            "bundle.json",
            ("components", "sharpen", "engines", 0, "files"),
            ["a.plan"],
            "'a.plan' is used but not listed",
        ),
        ("bundle.json", ("program",), "a.json", "'a.json' is used but not listed under files; rebuild"),
        ("bundle.json", ("weights",), "a.json", "'a.json' is used but not listed under files; rebuild"),
        ("bundle.json", ("constants",), "a.safetensors", "'a.safetensors' is used but not listed"),
        ("bundle.json", ("files", "program.json"), ABSENT, "'program.json' is used but not listed under files"),
        ("bundle.json", ("components", "sharpen", "inputs", "image", "dtype"), "float8", "dtype 'float8' is not one"),
        ("bundle.json", ("components", "sharpen", "inputs", "image", "shape"), [0], "shape [0] holds a size below 1"),
        ("bundle.json", ("components", "sharpen", "inputs", "image", "shape"), [1.5], "or string, found 1.5"),
        ("bundle.json", (*MEMORY, "fixed"), float("nan"), "fixed: expected a finite number, found NaN"),
        ("bundle.json", (*MEMORY, "fixed"), 10**400, "fixed: expected a finite number, found 1000"),
        ("bundle.json", (*MEMORY, "per_px"), -1, "memory: per_px -1.0 must lie in 0..9223372036854775807"),
        ("bundle.json", (*MEMORY, "per_px2"), 1e300, "memory: per_px2 1e+300 must lie in 0..9223372036854775807"),
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
        ("weights.json", (*WEIGHT, "offset"), -1, "sharpen.weight: offset -1 must be at least 0"),
        ("weights.json", (*WEIGHT, "length"), -1, "sharpen.weight: length -1 must be at least 0"),
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
        ("components", "sharpen", "engines", 0, "files"),
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
    elif keys[-1] == "files":
        put(bundle, "bundle.json", keys, [path])
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


def test_foreign_text_cannot_break_or_flood_the_line(bundle):
    put(bundle, "program.json", ("passes", 0, "once", 0, "outputs", "sharp"), "\x1b[31m red \n" * 1000)
    text = refusal(read_bundle, bundle)
    assert text.startswith(str(bundle / "program.json"))
    assert "letters, digits and underscores" in text
