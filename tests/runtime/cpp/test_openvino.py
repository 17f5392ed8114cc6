"""The C++ library with OpenVINO: the pixels of the Python runtime with OpenVINO, and its refusals."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.scenes import scene
from tilewright.runtime import load

pytest.importorskip("openvino")
pytestmark = [
    pytest.mark.slow,  # the compiler takes a while
    pytest.mark.skipif("TILEWRIGHT_SANITIZE" in os.environ, reason="OpenVINO's library is built without sanitizers"),
]


@pytest.fixture(scope="module")
def command(built: Path, cmake: str) -> Path:
    """tilewright-restore with OpenVINO."""
    done = subprocess.run([cmake, "--build", built, "--target", "restore_openvino"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning:" not in done.stdout + done.stderr
    return built / "tests" / "restore_openvino"


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
