"""OpenVINO's engines of the five systems give ONNX Runtime's numbers, built with the bundle or added to it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from support.recorded import recorded
from support.systems import EVERY_SYSTEM
from tilewright.cli.main import main
from tilewright.export.build.compile import compile_engines
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.engines import Opening, backend
from tilewright.runtime.engines.machine import this_machine
from tilewright.runtime.errors import BundleError, UsageError

pytest.importorskip("openvino", reason="OpenVINO is not installed")

NAMES = ["openvino-float32", "openvino-bfloat16"]
ROUNDING = {"float32": 2e-5, "bfloat16": 5e-2}  # relative L2 against ONNX Runtime in float32
BRAIN = {"avx512_bf16"} <= set(this_machine().instructions) and this_machine().cores >= 2


@pytest.fixture(scope="module")
def several(cache, tmp_path_factory):
    """Build a system's tiny bundle with all engines of two backends, once."""
    built = {}

    def bundle(system: str) -> Path:
        if system not in built:
            built[system] = tmp_path_factory.mktemp("several") / system
            both = ("float32", "bfloat16")
            options = {"verify": "never", "targets": ("ort", "openvino"), "precisions": both}
            build(Request(system, "tiny", built[system], seed=0, **options))
        return built[system]

    return bundle


def run(
    bundle: Bundle, component: str, name: str, feeds: list[dict], outputs: list[str]
) -> list[dict[str, np.ndarray]]:
    spec = next(spec for spec in bundle.manifest.components[component].engines if spec.name == name)
    engine = backend(spec.backend).open_engine(bundle, component, spec, Opening(threads=2))
    answers = [engine.run(inputs, outputs) for inputs in feeds]
    engine.close()
    return answers


def twice(bundle: Bundle, component: str, inputs: dict) -> dict[str, np.ndarray]:
    """The inputs for two tiles, the second with other values."""
    shapes = {name: spec.shape for name, spec in bundle.manifest.components[component].inputs.items()}
    return {
        name: np.concatenate([array, array[..., ::-1] if array.ndim > 1 else array])
        if shapes[name][0] == "batch"
        else array
        for name, array in inputs.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("system", EVERY_SYSTEM)
def test_every_component_gives_the_numbers_of_onnx_runtime_for_one_tile_and_for_two(several, system, precision):
    if precision == "bfloat16" and not BRAIN:
        pytest.skip("this CPU has no avx512_bf16")
    bundle = read_bundle(several(system))
    for component, (inputs, first) in recorded(bundle.root).items():
        if f"openvino-{precision}" not in {spec.name for spec in bundle.manifest.components[component].engines}:
            assert precision == "bfloat16" and component not in bundle.weights.tensors  # it has no weights
            continue
        feeds = [inputs, twice(bundle, component, inputs)]
        engines = ("ort-float32", f"openvino-{precision}")
        for ours, theirs in zip(*(run(bundle, component, name, feeds, list(first)) for name in engines), strict=True):
            for name, array in ours.items():
                assert theirs[name].dtype == array.dtype and theirs[name].shape == array.shape
                if array.dtype.kind == "f" and (precision == "float32" or "codes" not in name):
                    error = np.linalg.norm((theirs[name] - array).astype(np.float64))
                    assert error <= ROUNDING[precision] * np.linalg.norm(array.astype(np.float64)) + 1e-7, component
                elif precision == "float32":
                    np.testing.assert_array_equal(theirs[name], array)


@pytest.mark.slow
def test_engines_side_by_side_share_graphs_and_copy_no_weights(several):
    root = several("hitoksr")
    bundle = read_bundle(root)
    for component in bundle.manifest.components.values():
        assert [spec.name for spec in component.engines] == ["ort-float32", *NAMES]
        assert component.engines[1].files == component.engines[2].files
    files = [file for file in (root / "engines").rglob("*") if file.is_file()]
    assert files and sum(file.stat().st_size for file in files) < 2_000_000


@pytest.mark.slow
def test_engines_are_added_to_a_bundle_and_its_weights_stay_where_they_are(hitoksr_tiny, several, tmp_path, capsys):
    root = shutil.copytree(hitoksr_tiny, tmp_path / "b")
    weights = {file: file.stat().st_ino for file in (root / "weights").rglob("*") if file.is_file()}
    before = read_bundle(root)
    assert main(["export", "compile", str(root), "--target", "openvino", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    after = read_bundle(root)
    assert told["engines"] == NAMES and told["digest_before"] == before.digest != told["digest"] == after.digest
    assert {file: file.stat().st_ino for file in weights} == weights
    assert "- engines: openvino-bfloat16, openvino-float32, ort-float32" in (root / "README.md").read_text()
    built = read_bundle(several("hitoksr"))
    for component, (inputs, outputs) in recorded(root).items():
        specs = after.manifest.components[component].engines
        assert [spec.name for spec in specs] == ["ort-float32", *NAMES]
        (one,), (other,) = (run(each, component, NAMES[0], [inputs], list(outputs)) for each in (after, built))
        for name in outputs:
            np.testing.assert_array_equal(one[name], other[name])
    assert compile_engines(root, ("openvino",), ("float32", "bfloat16")).digest == after.digest  # again


def test_a_bundle_stays_as_it_is_if_engines_cannot_be_added(hitoksr_tiny, tmp_path):
    root = shutil.copytree(hitoksr_tiny, tmp_path / "b")
    with pytest.raises(
        UsageError, match=r"^target='ort' needs the traced graph; use tilewright export build --target ort"
    ):
        compile_engines(root, ("ort",), ("float32",))
    (root / "decode.onnx").write_bytes(b"damaged")
    with pytest.raises(BundleError):
        compile_engines(root, ("openvino",), ("float32",))
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
