"""A system of a package with compiled engines: built, judged, chosen, and refused where it cannot run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support.toy import BUILD, SHAPES, fill, importable
from tilewright.cli.main import main
from tilewright.runtime import load
from tilewright.runtime.bundle.manifest import Needs
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.write import seal
from tilewright.runtime.errors import EnvironmentMismatch

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)
pytestmark = pytest.mark.slow  # two packages, 10 s each


@pytest.fixture(scope="module")
def toy(cache, shared):
    """The toy's bundle with engines of ONNX Runtime and compiled ones. The toy's package can be imported."""
    with importable():
        yield shared("toy-compiled", fill) / "bundle"


@pytest.fixture
def copy(toy, tmp_path):
    """A copy of the bundle whose compiled engines are changed."""

    def make(**changes) -> Path:
        root = shutil.copytree(toy, tmp_path / "copy")
        manifest = read_bundle(root).manifest
        (root / "bundle.json").unlink()
        components = {
            name: replace(c, engines=tuple(replace(s, **changes) if s.backend == "aoti" else s for s in c.engines))
            for name, c in manifest.components.items()
        }
        staged = root.rename(tmp_path / "staged")
        seal(staged, replace(manifest, components=components), root)
        return root

    return make


def doctor(root: Path, capsys, *words: str) -> tuple[int, dict, str]:
    capsys.readouterr()
    code = main(["runtime", "doctor", str(root), "--json", *words])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def reasons(report: dict) -> set[str]:
    engines = (e for c in report["components"].values() for e in c["engines"])
    return {engine["reason"] for engine in engines if engine["backend"] == "aoti"}


def test_both_engines_are_judged_and_restore_the_same_picture(toy, tmp_path):
    report = json.loads((toy / "reports" / "accuracy.json").read_text())
    assert sorted(report["engines"]) == ["aoti-float32", "ort-float32"]
    assert all(engine["fault"] is None for engine in report["engines"].values())
    assert {*report["engines"]["aoti-float32"]["components"]} == {"see", "paint"}
    picture = np.random.default_rng(0).integers(0, 256, (70, 50, 3), np.uint8)
    with load(toy, engine="aoti", tile=48) as compiled, load(toy, engine="ort", tile=48) as usual:
        assert set(compiled.ran["engines"].values()) == {"aoti-float32"}
        one, other = compiled(picture), usual(picture)
        again = compiled(picture)
    assert one.std() > 20 and np.abs(one.astype(int) - other).max() <= 1
    np.testing.assert_array_equal(one, again)
    with load(toy, engine="aoti", devices=("cpu:0",), threads=1, tile=48, batch=3) as restorer:
        assert np.abs(restorer(picture).astype(int) - one).max() <= 1


def test_a_build_with_other_weights_compiles_nothing_anew(toy, tmp_path):
    weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    save_file(weights, tmp_path / "toy.safetensors")
    build = (*BUILD, str(tmp_path), "--target", "aoti,ort", "--verify", "never", "-o", str(tmp_path / "b"))
    assert main([*build]) == 0
    for file in (toy / "engines").rglob("*.pt2"):
        assert (tmp_path / "b" / file.relative_to(toy)).read_bytes() == file.read_bytes()


def test_engines_are_added_to_a_bundle_as_the_build_makes_them(toy, tmp_path, capsys):
    root = tmp_path / "b"
    words = (*BUILD, str(toy.parent), "--verify", "never", "-o", str(root))
    assert main([*words]) == 0
    assert main(["export", "compile", str(root), "--target", "aoti", "--precision", "float32"]) == 0
    built, added = (read_bundle(each).manifest.components for each in (toy, root))
    assert built == added
    assert main(["export", "verify", str(root)]) == 0


def test_the_fastest_measured_engine_is_chosen(toy, tmp_path, capsys):
    root = shutil.copytree(toy, tmp_path / "b")
    file = root / "reports" / "measured.json"
    measured = json.loads(file.read_text())
    for component in measured["measurements"][-1]["components"].values():
        component["aoti-float32"]["seconds_per_megapixel"] = 1e-6
    file.write_text(json.dumps(measured))
    code, report, _ = doctor(root, capsys)
    assert code == 0 and {c["chosen"] for c in report["components"].values()} == {"aoti-float32"}


def test_machine_code_from_elsewhere_runs_only_if_it_is_asked_for(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache of another user"))
    code, report, _ = doctor(toy, capsys)
    assert code == 0 and {c["chosen"] for c in report["components"].values()} == {"ort-float32"}
    said = "is machine code that was not compiled here; if you trust its maker, ask for it: --engine aoti-float32"
    assert reasons(report) == {said}
    assert main(["export", "verify", str(toy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == {"aoti-float32": said}
    for wish, chosen in (("float32", "ort-float32"), ("aoti", "aoti-float32"), ("aoti-float32", "aoti-float32")):
        code, report, _ = doctor(toy, capsys, "--engine", wish)
        assert code == 0 and {c["chosen"] for c in report["components"].values()} == {chosen}


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        (Needs(packages={"torch": "2.11.0"}, exactly=True), "was compiled with torch 2.11.0, and "),
        (Needs(("avx1024",)), "needs avx1024, which this CPU lacks"),
    ],
)
def test_a_package_of_another_pytorch_or_cpu_is_refused(copy, capsys, needs, said):
    root = copy(needs=needs)
    code, report, _ = doctor(root, capsys)
    assert code == 0 and all(reason.startswith(said) for reason in reasons(report))
    with pytest.raises(EnvironmentMismatch) as caught:
        load(root, engine="aoti")
    assert said in str(caught.value) and str(caught.value).isprintable() and caught.value.exit_code == 4


def test_the_key_names_this_pytorch_and_this_cpu(toy):
    spec = next(s for s in read_bundle(toy).manifest.components["see"].engines if s.backend == "aoti")
    assert spec.needs.packages == {"torch": torch.__version__.partition("+")[0]}
    assert spec.needs.instructions and spec.needs.exactly
    assert sorted(spec.files) == ["engines/see.aoti/float32.pt2", "engines/see.aoti/float32.safetensors"]


def test_without_a_compiler_nothing_is_made(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    before = read_bundle(toy).digest
    for words in (
        ("export", "compile", str(toy), "--target", "aoti"),
        (*BUILD, str(toy.parent), "--target", "aoti", "-o", str(tmp_path / "b")),
    ):
        assert main([*words]) == 4
        (line,) = [each for each in capsys.readouterr().err.splitlines() if "compiler" in each]
        assert "needs a C++ compiler" in line and "install g++" in line
    assert not (tmp_path / "b").exists() and read_bundle(toy).digest == before
