"""Engines in 8 bits in a bundle: added, restored with, judged, and chosen only if they are worth it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.html import Page
from support.layered import LAYERS, layered
from tilewright.calib import add_engines, collect, gate, make_recipe, read_observations, read_recipe
from tilewright.calib.judge.gates import CROPS, held_out, measurement, original_of, require
from tilewright.calib.judge.likeness import psnr
from tilewright.calib.recipe import Recipe
from tilewright.cli.main import main
from tilewright.runtime import load
from tilewright.runtime.bundle.measured import on_processor, remember
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.engines.machine import processor
from tilewright.runtime.errors import AccuracyError, InputError


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A folder with two pictures that nothing was calibrated on."""
    folder = tmp_path / "held"
    folder.mkdir()
    for place in (50, 51):
        pixels = np.random.default_rng(place).integers(0, 230, (16, 16, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{place}.png")
    return folder


@pytest.fixture
def made(tmp_path: Path, pictures: Path) -> tuple[Path, Recipe]:
    """A bundle, and a recipe for it."""
    root = layered(tmp_path / "layers.bundle")
    collect(root, pictures, tmp_path / "s.safetensors", images=2)
    return root, make_recipe(read_bundle(root), *read_observations(tmp_path / "s.safetensors"), "int8")


@pytest.mark.slow
def test_engines_are_added_beside_the_others_and_restore_nearly_the_same_picture(
    made: tuple[Path, Recipe], held: Path
) -> None:
    root, recipe = made
    before = read_bundle(root)
    added = add_engines(root, recipe, threads=1)
    bundle = read_bundle(root, fresh=True)
    assert added.engines == ("ort-int8", "openvino-int8") and added.digest == bundle.digest != before.digest
    specs = {spec.name: spec for spec in bundle.manifest.components["show"].engines}
    assert list(specs) == ["ort-float32", "ort-int8", "openvino-int8"]
    assert specs["ort-int8"].form and not specs["ort-int8"].form.convolutions
    assert specs["openvino-int8"].form and specs["openvino-int8"].form.convolutions
    tables = bundle.weights.tensors
    assert tables["show"] == before.weights.tensors["show"]
    eight = {r.dtype for r in tables["show.openvino-int8"].values() if r.folder == "int8"}
    assert eight == {"int8"}
    assert {n for n, r in tables["show.openvino-int8"].items() if r.folder != "int8"} == {
        "norm.scale", "norm.shift", "up.bias"}  # fmt: skip
    with load(root, engine="ort-float32") as exact:
        picture = exact(held / "50.png")
    for name in ("ort-int8", "openvino-int8"):
        with load(root, engine=name) as restorer:
            assert restorer.specs["show"].name == name
            likeness = psnr(restorer(held / "50.png") / 255, picture / 255)
            assert 25 < likeness < 60


def test_engines_of_a_format_are_replaced_and_a_recipe_of_another_bundle_is_refused(
    made: tuple[Path, Recipe], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root, recipe = made
    add_engines(root, recipe, ("ort",), threads=1)
    fewer = recipe.only(["show/down.weight"])
    add_engines(root, fewer, ("ort",), threads=1)
    bundle = read_bundle(root, fresh=True)
    assert [spec.name for spec in bundle.manifest.components["show"].engines] == ["ort-float32", "ort-int8"]
    assert read_recipe(root / "reports" / "recipe.int8.yaml") == fewer
    replace(recipe, networks="0" * 64).write(tmp_path / "r.yaml")
    code = main(["export", "compile", str(root), "--precision", "int8", "--recipe", str(tmp_path / "r.yaml")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tilewright:")]
    assert code == 8 and len(lines) == 1 and "the recipe is of another bundle" in lines[0]
    assert read_bundle(root).digest == bundle.digest


@pytest.mark.slow
def test_a_bundle_that_is_not_the_expected_one_gets_no_engines(
    made: tuple[Path, Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, recipe = made
    recipe.write(tmp_path / "r.yaml")
    digest = read_bundle(root).digest
    words = [
        "export",
        "compile",
        str(root),
        "--precision",
        "int8",
        "--target",
        "ort",
        "--recipe",
        str(tmp_path / "r.yaml"),
    ]
    assert main([*words, "--expect", "0" * 64, "-q"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "0" * 12 in lines[0] and read_bundle(root, fresh=True).digest == digest
    assert main([*words, "--expect", digest, "-q"]) == 0
    assert read_bundle(root, fresh=True).digest != digest


@pytest.mark.slow
def test_the_gate_judges_on_pictures_that_were_held_out_and_says_what_ran_in_8_bits(
    made: tuple[Path, Recipe], held: Path
) -> None:
    root, recipe = made
    add_engines(root, recipe, threads=1)
    seen = [path for path in (root.parent / "pictures").glob("*.png") if path.name in ("0.png", "2.png")]
    for path in seen:
        shutil.copy(path, held)
    originals = root.parent / "originals"
    originals.mkdir()
    for name in ("50", "51"):
        Image.open(held / f"{name}.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(originals / f"{name}.PNG")
    report = gate(root, held, budget_db=25.0, threads=1, originals=originals, crops=root / CROPS)
    assert report["images"] == ["50.png", "51.png"]
    engines = report["engines"]
    assert engines["ort-float32"]["mean_db"] == 200
    assert engines["ort-int8"]["low_share"] == engines["openvino-int8"]["low_share"] == 1
    convolutions = engines["openvino-int8"]["low_share_of_all"] - engines["ort-int8"]["low_share_of_all"]
    assert convolutions > 0.2  # ONNX Runtime has them in float
    for name in ("ort-int8", "openvino-int8"):
        with load(root, engine=name, threads=1) as restorer, load(root, engine="ort-float32", threads=1) as exact:
            pairs = [(restorer(held / n) / 255, exact(held / n) / 255) for n in report["images"]]
        rounded = [psnr(*pair) for pair in pairs]  # of pictures in 8 bits a colour
        assert np.allclose(rounded, engines[name]["psnr_db"], atol=1.0)
        truths = [np.asarray(Image.open(originals / f"{n}.PNG")) / 255 for n in ("50", "51")]
        losses = [psnr(e, t) - psnr(o, t) for (o, e), t in zip(pairs, truths, strict=True)]
        assert np.isclose(engines[name]["lost_db"], np.mean(losses), atol=0.02)
        assert 0.5 < engines[name]["ssim"] < 1 and engines[name]["drift"] == {}
        assert 2**24 < engines[name]["peak_bytes"] < 2**30
        slower = engines["ort-float32"]["seconds"] < engines[name]["seconds"]
        assert engines[name]["slower_than"] == ("ort-float32" if slower else None)
    require(report)
    parts = {part["name"]: np.asarray(Image.open(root / CROPS / part["file"])) for part in report["crops"]}
    worst = min(("50.png", "51.png"), key=lambda n: engines["openvino-int8"]["psnr_db"][report["images"].index(n)])
    assert list(parts) == ["input", "float32", "original", "openvino-int8", "ort-int8"]
    assert np.array_equal(parts["input"], np.asarray(Image.open(held / worst)))
    with load(root, engine="ort-float32", threads=1) as exact:
        assert np.abs(exact(held / worst) - parts["float32"].astype(int)).max() <= 1


def test_a_picture_without_its_original_is_refused(held: Path) -> None:
    with pytest.raises(InputError, match=r"holds no original of 60\.jpg; name it 60\.png"):
        original_of(held / "60.jpg", held)


@pytest.mark.slow
def test_a_missed_budget_is_an_error_with_the_best_that_was_reached(
    made: tuple[Path, Recipe], held: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, recipe = made
    add_engines(root, recipe, ("ort",), threads=1)
    report = gate(root, held, budget_db=90.0, threads=1)
    with pytest.raises(
        AccuracyError, match=r"ort-int8, the best in 8 bits: \d+\.\d dB against float32, the budget is 90"
    ):
        require(report)
    assert main(["calib", "gate", str(root), str(held), "--budget-psnr", "90", "--json", "-q"]) == 7
    told = json.loads(capsys.readouterr().out)
    assert told["error"]["code"] == 7 and told["engines"]["ort-int8"]["fault"]
    assert json.loads((root / "reports" / "quantised.json").read_text())["budget_db"] == 90


@pytest.mark.slow
def test_an_engine_that_is_slower_is_not_chosen(made: tuple[Path, Recipe], held: Path) -> None:
    root, recipe = made
    add_engines(root, recipe, ("ort",), threads=1)
    report = gate(root, held, budget_db=25.0, threads=1)
    for seconds, chosen in ((2.0, "ort-float32"), (0.5, "ort-int8")):
        engine = report["engines"]["ort-int8"]
        engine["mean_db"], engine["seconds_per_megapixel"] = 50.0, {"show": seconds}
        report["engines"]["ort-float32"]["seconds_per_megapixel"] = {"show": 1.0}
        remember(root, measurement(report))
        assert on_processor(root, processor())["show"]["ort-int8"].seconds_per_megapixel == seconds
        with load(root, threads=1) as restorer:
            assert restorer.specs["show"].name == chosen


@pytest.mark.slow
def test_the_commands_lead_from_a_bundle_to_a_judged_engine(
    tmp_path: Path, pictures: Path, held: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = layered(tmp_path / "layers.bundle"), tmp_path
    words = (
        ["calib", "collect", root, pictures, "-o", out / "s.st", "--images", 2],
        ["calib", "sensitivity", root, out / "s.st", "--format", "int8", "--smooth", 0.5, "-o", out / "s.json"],
        ["calib", "recipe", root, out / "s.st", "--format", "int8", "--sens", out / "s.json", "--budget-psnr", 20,
         "-o", out / "r.yaml"],
        ["export", "compile", root, "--precision", "int8", "--target", "ort", "--recipe", out / "r.yaml"],
        ["calib", "gate", root, held, "--budget-psnr", 20],
        ["calib", "report", root, "--html", out / "report.html"],
    )  # fmt: skip
    for command in words:
        assert main([*map(str, command), "-q"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "5 of 5 layers in int8, 100.0% of the work of linear layers, 1 inputs smoothed" in told
    assert "100.0%" in told and "all in 8 bits" in told and "ort-int8" in told
    assert read_recipe(out / "r.yaml").quantised == set(LAYERS)
    assert "<- this recipe" in told and told.count("2 held-out images") == 2  # the gate's and the report's
    text = (out / "report.html").read_text()
    shown = Page(text)
    assert shown.titles == ["Engines", "Before and after", "Frontier", "Sensitivity", "Scale per step", "Plan"]
    frontier = read_recipe(out / "r.yaml").evidence.frontier
    assert (shown.classes["dot line-0"], shown.classes["dot line-0 chosen"]) == (len(frontier) - 1, 1)
    assert shown.classes["cell"] == len(read_recipe(out / "r.yaml").inputs) and shown.images == 4
    assert not shown.elsewhere and "<script" not in text and "prefers-color-scheme: dark" in text
    assert main(["calib", "report", str(root), "--json", "-q"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["recipes"]["int8"]["chosen"] == 0 and not facts["stale"]
    assert facts["gate"] == json.loads((root / "reports" / "quantised.json").read_text())


REFUSED = [  # words, the code, a part of the line
    (["export", "compile", "BUNDLE", "--precision", "int8"], 2, "--precision int8 needs --recipe FILE"),
    (["export", "compile", "BUNDLE", "--recipe", "r.yaml"], 2, "--recipe is for --precision int8 or fp8"),
    (["export", "compile", "BUNDLE", "--precision", "int8,fp8", "--recipe", "r.yaml"], 2, "one 8-bit format"),
    (["export", "compile", "BUNDLE", "--precision", "fp8", "--target", "openvino", "--recipe", "f.yaml"], 2, "fp8"),
    (["export", "build", "hitoksr", "-o", "o", "--precision", "int8"], 2, "needs --recipe FILE or --calibrate"),
    (["export", "build", "hitoksr", "-o", "o", "--calibrate", "x"], 2, "are for --precision int8 or fp8"),
    (["calib", "recipe", "BUNDLE", "s.st", "--format", "int8", "-o", "r", "--budget-psnr", "9"], 2, "belong together"),
    (["calib", "recipe", "BUNDLE", "no.st", "--format", "int8", "-o", "r"], 8, "no.st cannot be read"),
    (["calib", "sensitivity", "BUNDLE", "s.st", "--format", "int8", "-o", "r", "--images-dir", "."], 8, "observed"),
    (["calib", "gate", "BUNDLE", "pictures"], 2, "has no engine in int8 or fp8"),
]


def test_what_cannot_be_done_is_refused_in_one_line(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = layered(tmp_path / "layers.bundle")
    collect(root, pictures, tmp_path / "s.st", images=2)
    seen = read_observations("s.st")
    make_recipe(read_bundle(root), *seen, "int8").write(Path("r.yaml"))
    make_recipe(read_bundle(root), *seen, "fp8").write(Path("f.yaml"))
    for words, code, said in REFUSED:
        got = main([str(root) if word == "BUNDLE" else word for word in words] + ["-q"])
        err = capsys.readouterr().err.splitlines()
        assert (got, len(err)) == (code, 1) and said in err[0], (words, err)
    assert not Path("o").exists() and not Path("r").exists()


def test_pictures_that_were_calibrated_on_are_no_judges(made: tuple[Path, Recipe], pictures: Path) -> None:
    _, recipe = made
    assert [path.name for path in held_out(pictures, recipe)] == ["1.png", "3.png", "4.png"]
    assert [path.name for path in held_out(pictures, recipe, 1)] == ["1.png"]
