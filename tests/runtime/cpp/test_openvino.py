"""The C++ library with OpenVINO: the pixels of the Python runtime with OpenVINO, and its refusals."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.pages import ROOT
from support.scenes import scene
from tilewright.runtime import load

pytest.importorskip("openvino", reason="the library is then built without OpenVINO")
pytestmark = [
    pytest.mark.slow,  # the compiler takes a while
    pytest.mark.skipif("TILEWRIGHT_SANITIZE" in os.environ, reason="OpenVINO's library is built without sanitizers"),
]


@pytest.fixture
def command(built: Path) -> Path:
    """tilewright-restore, of a build with OpenVINO where that is installed."""
    return built / "tilewright-restore"


@pytest.fixture
def bundle(build: Callable[[], Path]) -> Path:
    """A bundle with engines of OpenVINO beside that of ONNX Runtime."""
    bundle = build()
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    engines = manifest["components"]["sharpen"]["engines"]
    engines.append(engines[0] | {"name": "openvino-float32", "backend": "openvino"})
    engines.append(engines[0] | {"name": "openvino-bfloat16", "backend": "openvino", "precision": "bfloat16"})
    path.write_text(json.dumps(manifest))
    return bundle


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_it_has_pythons_pixels(command: Path, bundle: Path, tmp_path: Path, memory: str) -> None:
    Image.fromarray(scene(70, 53)).save(tmp_path / "in.png")
    words = ["--engine", "openvino-float32", "--json", *(["--memory", "low"] if memory == "low" else [])]
    files = [tmp_path / "in.png", tmp_path / "out.png"]
    done = subprocess.run([command, "--bundle", bundle, *files, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with load(bundle, engine="openvino-float32", memory=memory) as restorer:
        right = restorer(tmp_path / "in.png")
    difference = np.abs(np.asarray(Image.open(tmp_path / "out.png")).astype(int) - right)
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.999


def test_it_refuses_what_it_does_not_run(command: Path, bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(scene(8, 8)).save(tmp_path / "in.png")
    words = ["--bundle", bundle, tmp_path / "in.png", tmp_path / "out.png", "--engine", "openvino-bfloat16"]
    done = subprocess.run([command, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "this library runs OpenVINO in float32 only; choose an engine in float32" in done.stderr


def test_a_project_finds_the_installed_package_and_runs_it(
    prefix: Path, cmake: str, bundle: Path, tmp_path: Path
) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    engines = manifest["components"]["sharpen"]["engines"]
    engines[:] = [engine for engine in engines if engine["name"] == "openvino-float32"]
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    source, build = ROOT / "examples" / "cpp_minimal", tmp_path / "minimal"
    for words in ([cmake, "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}"], [cmake, "--build", build]):
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    Image.fromarray(scene(40, 24)).save(tmp_path / "in.ppm")
    with (tmp_path / "in.ppm").open("rb") as source_file, (tmp_path / "out.ppm").open("wb") as result_file:
        subprocess.run([build / "minimal", bundle], stdin=source_file, stdout=result_file, check=True)
    with load(bundle) as restorer:
        right = restorer(tmp_path / "in.ppm")
        assert restorer.specs["sharpen"].backend == "openvino"
    difference = np.abs(np.asarray(Image.open(tmp_path / "out.ppm")).astype(int) - right)
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.999
