"""Where a bundle's weights are searched, what is checked of them, and what graphs may read of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from support.forged import ABSENT, overwrite, put, refusal, reseal
from support.scenes import noise
from tilewright.runtime import load
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.write import seal
from tilewright.runtime.errors import BundleError, UsageError

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
    engines = (dataclasses.replace(component.engines[0], files=(file,)),)
    components = {"sharpen": dataclasses.replace(component, engines=engines)}
    seal(staging, dataclasses.replace(manifest, components=components), tmp_path / "b")
    change_graph(tmp_path / "b", says("location", "secret.bin"), file)
    assert refusal(read_bundle, tmp_path / "b").startswith(f"{tmp_path / 'b' / file}: 'weight' is ")


def with_a_table(staged, tmp_path, *, listed: bool) -> Path:
    """A bundle whose engine has a table of weights of its own, which may lack the weight."""
    staging, manifest = staged()
    component = manifest.components["sharpen"]
    engines = (dataclasses.replace(component.engines[0], weights="quantised"),)
    document = json.loads((staging / "weights.json").read_text())
    document["tensors"]["quantised"] = document["tensors"]["sharpen"] if listed else {}
    (staging / "weights.json").write_text(json.dumps(document))
    components = {"sharpen": dataclasses.replace(component, engines=engines)}
    seal(staging, dataclasses.replace(manifest, components=components), tmp_path / "b")
    return tmp_path / "b"


def test_an_engine_may_have_weights_of_its_own(staged, bundle, tmp_path):
    root, image = with_a_table(staged, tmp_path, listed=True), noise(9, 9, 3)
    put(root, "weights.json", ("folders", "sharpen", "path"), str(tmp_path / "models" / "sharpen"))
    with load(root) as restorer, load(bundle) as usual:
        np.testing.assert_array_equal(restorer(image), usual(image))
    with pytest.raises(BundleError, match=r"sharpen\.onnx: 'weight' is float32 .* which weights\.json does not say"):
        with_a_table(lambda: staged("other"), tmp_path, listed=False)


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
