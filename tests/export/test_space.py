"""`export space`: its sums are those of the files, and of byte maps drawn with NumPy."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.cli.main import main
from tilewright.export.onnx_folder import onnx_folder
from tilewright.export.space import _covered, space
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.strict import from_json, to_json
from tilewright.runtime.bundle.weights import Weights
from tilewright.runtime.bundle.write import seal
from tilewright.runtime.errors import BundleError

pytest_plugins = ("support.bundles",)
SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda s: (s[0], s[0] + s[1])), max_size=6)


def size_on_disk(root: Path) -> int:
    return sum(file.stat().st_size for file in root.rglob("*") if file.is_file())


def tensor_bytes(folder: Path) -> int:
    """The bytes of all tensors in the safetensors files of a folder, without headers."""
    return sum(length for f in folder.rglob("*.safetensors") for _, _, length in safetensors_header(f).values())


@given(st.lists(SPANS, max_size=4))
def test_bytes_that_several_read_count_once(readers: list[list[tuple[int, int]]]) -> None:
    drawn = np.zeros((len(readers), 80), bool)
    for row, spans in zip(drawn, readers, strict=True):
        for start, stop in spans:
            row[start:stop] = True
    assert _covered(readers) == ((drawn.sum(0) >= 1).sum(), (drawn.sum(0) >= 2).sum())


def test_weights_elsewhere_are_told_apart_from_the_bundle(two_folder_bundle, tmp_path) -> None:
    root = two_folder_bundle()
    report = space(root)
    folders = [tmp_path / "models", tmp_path / "other"]
    outside = sum(map(tensor_bytes, folders))
    assert report["bytes"] == {
        "in_bundle": size_on_disk(root),
        "elsewhere": outside,
        "shared": 0,
        "copy": outside,
    }
    graph = (root / "add.onnx").stat().st_size
    assert report["components"] == {"add": {"files": graph, "weights": outside, "elsewhere": outside, "shared": 0}}
    elsewhere = {file for file, f in report["files"].items() if f["elsewhere"]}
    assert elsewhere == {str(file) for folder in folders for file in folder.rglob("*.safetensors")}
    assert sum(f["bytes"] for f in report["files"].values() if not f["elsewhere"]) == size_on_disk(root)


def test_packed_weights_lie_in_the_bundle(two_folder_bundle) -> None:
    root = two_folder_bundle(packed=True)
    report = space(root)
    assert report["bytes"] == {"in_bundle": size_on_disk(root), "elsewhere": 0, "shared": 0, "copy": 0}
    assert report["components"]["add"]["weights"] == tensor_bytes(root)
    assert report["files"]["weights/base/weights.safetensors"]["components"] == ["add"]


def test_a_copy_takes_the_tensors_that_are_read_and_no_others(bundle, weights_dir, tmp_path) -> None:
    report = space(bundle)
    onnx_folder(bundle, tmp_path / "copy")
    assert report["bytes"]["copy"] == tensor_bytes(tmp_path / "copy") < tensor_bytes(weights_dir)


def test_what_two_components_read_is_shared_and_counts_once(staged, tmp_path) -> None:
    staging, manifest = staged()
    shutil.copyfile(staging / "sharpen.onnx", staging / "again.onnx")
    spec = manifest.components["sharpen"]
    engines = tuple(replace(engine, files=("again.onnx",)) for engine in spec.engines)
    again = replace(spec, graph="again.onnx", engines=engines)
    weights = from_json(Weights, (staging / "weights.json").read_bytes(), "weights.json")
    tables = weights.tensors | {"again": weights.tensors["sharpen"]}
    (staging / "weights.json").write_text(to_json(replace(weights, tensors=tables)))
    seal(staging, replace(manifest, components=manifest.components | {"again": again}), tmp_path / "b")
    report = space(tmp_path / "b")
    read = sum(r.length for r in read_bundle(tmp_path / "b").weights.tensors["again"].values())
    assert report["bytes"]["elsewhere"] == report["bytes"]["shared"] == report["bytes"]["copy"] == read > 0
    assert {name: c["shared"] for name, c in report["components"].items()} == {"again": read, "sharpen": read}


def test_weights_that_are_gone_are_an_error_and_those_that_moved_are_counted(bundle, weights_dir, tmp_path) -> None:
    before = space(bundle)["bytes"]
    weights_dir.rename(tmp_path / "moved")
    with pytest.raises(BundleError, match="pass --weights-dir"):
        space(bundle)
    assert space(bundle, tmp_path / "moved")["bytes"] == before


def test_the_command_answers_in_json_and_as_two_tables(two_folder_bundle, capsys) -> None:
    root = two_folder_bundle()
    assert main(["export", "space", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == space(root)
    assert main(["export", "space", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("component") and lines[1].startswith("add")
    assert lines[-2].startswith("in the bundle: ") and lines[-1].endswith(" bytes")
