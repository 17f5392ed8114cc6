"""A build with engines in 8 bits that is asked for again."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tilewright.calib import collect, make_recipe, read_observations
from tilewright.calib.inputs import inputs_of
from tilewright.cli.main import main
from tilewright.runtime.bundle.read import read_bundle

SIDE = 8  # one tile of 32 px
BUILD = ["export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "0", "--verify", "never", "-o"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for place in range(4):
        pixels = np.random.default_rng(place).integers(0, 256, (SIDE, SIDE, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{place}.png")
    return folder


@pytest.mark.slow
def test_a_second_build_by_the_same_recipe_does_nothing(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "b", tmp_path / "r.yaml"
    assert main([*BUILD, str(tmp_path / "float"), "-q"]) == 0
    collect(tmp_path / "float", photos, tmp_path / "s.st", images=2, tile=4 * SIDE)
    whole = make_recipe(read_bundle(tmp_path / "float"), *read_observations(tmp_path / "s.st"), "int8")
    some = sorted(whole.quantised)
    whole.only(some[:1]).write(recipe)
    words = [*BUILD, str(out), "--precision", "int8", "--target", "ort", "--recipe", str(recipe), "-q"]
    digests = []
    for layers, says in ((some[:1], "has ort-int8"), (some[:1], "up to date"), (some[:2], "has ort-int8")):
        whole.only(layers).write(recipe)
        capsys.readouterr()
        assert main(words) == 0
        assert says in capsys.readouterr().out
        digests.append(read_bundle(out).digest)
    assert digests[0] == digests[1] != digests[2]
    assert main([*BUILD, str(out), "-q"]) == 0  # without engines in 8 bits
    assert read_bundle(out).digest == read_bundle(tmp_path / "float").digest
    assert main(words) == 0 and read_bundle(out).digest == digests[2]


def test_other_pictures_budgets_and_targets_are_no_repetition(photos: Path) -> None:
    options = {"folder": photos, "budget_db": 45.0}
    first = inputs_of("int8", ["ort"], **options)  # type: ignore[arg-type]
    assert first == inputs_of("int8", ["ort"], **options)  # type: ignore[arg-type]
    others = {
        inputs_of("fp8", ["ort"], folder=photos, budget_db=45.0),
        inputs_of("int8", ["openvino"], folder=photos, budget_db=45.0),
        inputs_of("int8", ["ort"], folder=photos, budget_db=40.0),
    }
    Image.new("RGB", (SIDE, SIDE)).save(photos / "0.png")
    others.add(inputs_of("int8", ["ort"], folder=photos, budget_db=45.0))
    assert len(others) == 4 and first not in others


def test_to_tell_whether_something_changed_loads_no_framework_and_no_engine() -> None:
    heavy = ["torch", "onnx", "onnx_ir", "onnxruntime", "openvino"]
    code = f"import sys, tilewright.calib.inputs; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
