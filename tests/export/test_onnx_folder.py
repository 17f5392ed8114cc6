"""`export onnx`: a folder that any ONNX tool opens, from bundles whose weights lie anywhere."""

import json
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import quantize_dynamic
from safetensors.numpy import load_file

from support.readers import QUANTIZED, onnx_checker, onnx_runtime
from support.recorded import recorded
from support.systems import EVERY_SYSTEM
from tilewright.export.onnx_folder import onnx_folder
from tilewright.runtime.errors import BundleError, ResourceError, UsageError

pytest_plugins = ("support.bundles",)
CONSTANT = {"Cast", "Concat", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


@pytest.fixture(scope="module", params=EVERY_SYSTEM)
def tiny(request, unverified):
    """A system's tiny bundle and its components' calls; do not change it."""
    root = unverified(request.param)
    return root, recorded(root)


def moved_weights(graph):
    """The MatMuls and Gemms of a graph that multiply by a weight behind other nodes."""
    makers = {output: node for node in graph.node for output in node.output}
    initializers = {tensor.name for tensor in graph.initializer}

    def constant(name):
        maker = makers.get(name)
        return name in initializers if maker is None else maker.op_type in CONSTANT and all(map(constant, maker.input))

    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    return [n.name for n in products if any(constant(name) and name not in initializers for name in n.input)]


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True], ids=["as it is", "folded"])
def test_the_folder_of_every_system_gives_the_engines_numbers(tiny, tmp_path, fold):
    root, calls = tiny
    written = onnx_folder(root, tmp_path / "onnx", fold=fold)
    assert written["graphs"] == sorted(f"{component}.onnx" for component in calls)
    assert {f: (tmp_path / "onnx" / f).stat().st_size for f in written["files"]} == written["files"]
    for component, (inputs, outputs) in calls.items():
        graph = tmp_path / "onnx" / f"{component}.onnx"
        onnx_checker(graph, inputs, tmp_path)
        theirs = onnx_runtime(graph, inputs, tmp_path)
        for name, ours in outputs.items():
            if ours.dtype.kind == "f":
                assert np.linalg.norm(theirs[name] - ours) <= 2e-5 * np.linalg.norm(ours) + 1e-7
            else:
                np.testing.assert_array_equal(theirs[name], ours)


@pytest.mark.slow
def test_after_folding_a_quantizer_finds_the_weight_of_every_product(tiny, tmp_path):
    root, calls = tiny
    before = [onnx.load(root / f"{component}.onnx", load_external_data=False).graph for component in calls]
    for graph in before:
        weights = {tensor.name for tensor in graph.initializer}
        assert not [node.name for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]
    onnx_folder(root, tmp_path / "onnx", fold=True)
    for component in calls:
        graph = tmp_path / "onnx" / f"{component}.onnx"
        model = onnx.load(graph, load_external_data=False)
        assert moved_weights(model.graph) == [] and not model.functions
        weights = {tensor.name for tensor in model.graph.initializer}
        products = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and set(n.input) & weights]
        quantize_dynamic(str(graph), str(tmp_path / "q.onnx"), op_types_to_quantize=QUANTIZED)
        quantized = [n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node]
        assert quantized.count("MatMulInteger") == len(products)


@pytest.mark.parametrize("packed", [False, True], ids=["external", "packed"])
def test_weights_of_two_folders_are_copied_and_their_neighbours_are_not(two_folder_bundle, tmp_path, packed):
    root = two_folder_bundle(packed=packed)
    onnx_folder(root, tmp_path / "onnx")
    shutil.rmtree(root)
    assert load_file(tmp_path / "onnx" / "weights" / "base" / "weights.safetensors").keys() == {"scale"}
    image = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)
    scale, rest = (0.5, 0.25, 0.125), (0.21875, 0.125, 0.4453125)  # the sums of the three types' numbers
    expected = image * np.reshape(scale, (3, 1, 1)) + np.reshape(rest, (3, 1, 1))
    answer = onnx_runtime(tmp_path / "onnx" / "add.onnx", {"image": image}, tmp_path)["sum"]
    np.testing.assert_allclose(answer, expected, atol=1e-6)


def test_only_the_tensors_that_a_graph_reads_are_copied(bundle, weights_dir, tmp_path):
    assert load_file(weights_dir / "sharpen.safetensors").keys() == {"before", "conv.weight"}
    onnx_folder(bundle, tmp_path / "onnx")
    assert load_file(tmp_path / "onnx" / "weights" / "sharpen" / "sharpen.safetensors").keys() == {"conv.weight"}
    assert not [path for path in (tmp_path / "onnx").rglob("*") if path.is_symlink()]


def test_weights_that_moved_are_found_where_the_caller_says(bundle, weights_dir, tmp_path):
    weights_dir.rename(tmp_path / "moved")
    with pytest.raises(BundleError, match="are in none of"):
        onnx_folder(bundle, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    onnx_folder(bundle, tmp_path / "onnx", weights_dir=tmp_path / "moved")
    assert (tmp_path / "onnx" / "sharpen.onnx").is_file()


def test_an_unknown_component_is_refused_with_those_there_are(tinted, tmp_path):
    with pytest.raises(UsageError, match=r"^--component 'blur' is not in .*; there are paint, see, words$") as caught:
        onnx_folder(tinted, tmp_path / "onnx", component="blur")
    assert caught.value.exit_code == 2 and not (tmp_path / "onnx").exists()


def test_one_component_is_written_alone(tinted, tmp_path):
    assert onnx_folder(tinted, tmp_path / "onnx", component="see")["graphs"] == ["see.onnx"]
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["see.onnx"]


def test_an_empty_folder_is_filled_and_any_other_place_is_refused(bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    onnx_folder(bundle, tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for place in ("empty", "file"):
        with pytest.raises(UsageError, match=r"is not an empty folder; choose another$"):
            onnx_folder(bundle, tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_does_not_fit_on_the_disk_is_refused_before_anything_is_written(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10))
    with pytest.raises(ResourceError, match=r"make room$") as caught:
        onnx_folder(bundle, tmp_path / "onnx")
    assert caught.value.exit_code == 5 and not (tmp_path / "onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fold", [[], ["--fold"]], ids=["as it is", "folded"])
def test_a_file_that_cannot_grow_leaves_nothing_behind(bundle, tmp_path, fold):
    def limit() -> None:  # as a disk that fills up while we write
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    command = [sys.executable, "-m", "tilewright.cli.main", "export", "onnx", bundle, "-o", tmp_path / "new" / "onnx"]
    environment = os.environ | {"TILEWRIGHT_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, *fold, "--quiet"], preexec_fn=limit, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 5 and not done.stdout
    assert [line.startswith("tilewright: ") for line in done.stderr.splitlines()][-1:] == [True]
    assert list((tmp_path / "new").iterdir()) == []


def test_the_command_answers_in_json_and_as_a_line(tinted, tmp_path):
    command = [sys.executable, "-m", "tilewright.cli.main", "export", "onnx", tinted, "--component", "see", "-o"]
    done = subprocess.run([*command, tmp_path / "a", "--json"], check=True, capture_output=True, text=True)
    answer = json.loads(done.stdout)
    assert answer == onnx_folder(tinted, tmp_path / "b", component="see") | {"folder": str(tmp_path / "a")}
    done = subprocess.run([*command, tmp_path / "c"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"{tmp_path / 'c'}: see.onnx; ")
