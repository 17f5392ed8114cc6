"""A bundle that is whole is read; one with a file missing, changed or elsewhere is refused in one line."""

import hashlib
import json

import pytest

from support.forged import ABSENT, SEALED, means, overwrite, put, refusal
from tilewright.runtime import load
from tilewright.runtime.bundle.digests import sha256_of_bytes
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.errors import BundleError, UsageError

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
