"""Bundles with several engines: which one runs, what the doctor says of it, and how a wish is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from support.scenes import noise
from tilewright.cli.main import main
from tilewright.runtime import load
from tilewright.runtime.bundle.manifest import EngineSpec, Needs
from tilewright.runtime.bundle.write import seal
from tilewright.runtime.engines import ort
from tilewright.runtime.errors import EnvironmentMismatch, UsageError
from tilewright.runtime.profile import profile

HALF = EngineSpec("ort-half", "ort", "cpu", "bfloat16", ("engines/sharpen.ort-half/model.onnx",))
CUDA = EngineSpec("cuda-float16", "cuda", "cuda", "float16", ("sharpen.onnx",), Needs((), (8, 0)))
WISHES = ["ort-half", "bfloat16"]


@pytest.fixture
def sealed(staged, tmp_path):
    """Seal the bundle `sharpen` with these engines instead of its own; ort-half gives half of what the other gives."""

    def make(*specs: EngineSpec) -> Path:
        staging, manifest = staged()
        model = onnx.load(staging / "sharpen.onnx", load_external_data=False)
        model.graph.node[-1].output[0] = "whole"
        model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "one half"))
        model.graph.node.append(helper.make_node("Mul", ["whole", "one half"], ["sharp"]))
        (staging / HALF.graph).parent.mkdir(parents=True)
        onnx.save(model, staging / HALF.graph)
        component = manifest.components["sharpen"]
        engines = tuple(specs or (HALF, component.engines[0], CUDA))
        components = {"sharpen": replace(component, engines=engines)}
        seal(staging, replace(manifest, components=components), tmp_path / "b")
        return tmp_path / "b"

    return make


def command(*words: object, capsys) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("wish", WISHES)
def test_a_wish_runs_the_engine_it_names(sealed, wish):
    root, image = sealed(), {"image": (noise(1, 3, 16, 24) / 255).astype(np.float32)}
    with load(root) as usual, load(root, engine=wish) as half:
        whole, halved = (r.engines["sharpen"].run(image, ["sharp"])["sharp"] for r in (usual, half))
        np.testing.assert_array_equal(halved, whole / 2)
        assert whole.max() > 0.5
        assert usual.restore(noise(9, 9, 3)).engines == {"sharpen": "ort-float32"}
        answer = half.restore(noise(9, 9, 3))
        assert (answer.engines, answer.devices) == ({"sharpen": "ort-half"}, ("cpu:0",))


def test_a_backend_may_be_asked_for_and_accuracy_still_comes_first(sealed):
    with load(sealed(), engine="ort") as restorer:
        assert restorer.specs["sharpen"].name == "ort-float32"


def test_a_restoration_and_a_profile_say_what_ran_where(sealed, tmp_path, capsys):
    Image.fromarray(noise(9, 9, 3)).save(tmp_path / "in.png")
    words = (
        "runtime",
        "restore",
        tmp_path / "in.png",
        tmp_path / "o.png",
        "--bundle",
        sealed(),
        "--engine",
        "ort-half",
    )
    code, out, _ = command(*words, capsys=capsys)
    assert code == 0
    assert "engines: ort-half on cpu:0" in out
    code, out, _ = command(*words, "--json", capsys=capsys)
    answer = json.loads(out)
    assert (answer["engines"], answer["devices"]) == ({"sharpen": "ort-half"}, ["cpu:0"])
    with load(tmp_path / "b", engine="bfloat16") as restorer:
        measured = profile(restorer, [(32, 32)])
    assert (measured["engines"], measured["devices"]) == ({"sharpen": "ort-half"}, ["cpu:0"])


def test_an_engine_that_is_not_there_is_exit_2_with_a_list(sealed, tmp_path, capsys):
    root = sealed()
    with pytest.raises(UsageError, match=r"^engine='int4' is none of this bundle's engines: cuda-float16, ort-float32"):
        load(root, engine="int4")
    Image.fromarray(noise(9, 9, 3)).save(tmp_path / "in.png")
    restore = ("runtime", "restore", tmp_path / "in.png", tmp_path / "o.png", "--bundle", root)
    for words in (restore, ("runtime", "profile", "--bundle", root), ("runtime", "doctor", root)):
        code, out, err = command(*words, "--engine", "int4", capsys=capsys)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(
            "tilewright: --engine 'int4' is none of this bundle's engines: cuda-float16, ort-float32,"
        )
    assert not (tmp_path / "o.png").exists()


UNFIT = (
    replace(HALF, needs=Needs(("abacus_beads",))),
    CUDA,
    EngineSpec("ort-next", "ort", "cpu", "float32", ("sharpen.onnx",), Needs(packages={"onnxruntime": "99"})),
)


def test_a_machine_that_fits_no_engine_is_refused_before_anything_is_opened(sealed, monkeypatch):
    opened = []
    monkeypatch.setattr(ort, "open_graph", lambda *arguments, **options: opened.append(arguments))
    with pytest.raises(EnvironmentMismatch) as caught:
        load(sealed(*UNFIT))
    text = str(caught.value)
    assert text.startswith("no engine of sharpen can run here: cuda-float16 runs on cuda, and here is cpu only; ")
    assert "ort-half needs abacus_beads, which this CPU lacks; ort-next needs onnxruntime 99 or later, " in text
    assert text.isprintable() and not opened and caught.value.exit_code == 4


def test_the_doctor_says_of_every_engine_whether_it_would_run(sealed, capsys):
    root = sealed()
    code, out, err = command("runtime", "doctor", root, "--json", capsys=capsys)
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["machine"]["backends"]["ort"] == ort.version()
    component = report["components"]["sharpen"]
    assert component["chosen"] == "ort-float32"
    half, usual, cuda = component["engines"]
    assert (half["runs"], half["reason"]) == (
        True,
        "ort-float32 is more accurate (not measured); --engine ort-half asks for this one",
    )
    assert (usual["runs"], usual["reason"]) == (True, None)
    assert not cuda["runs"] and "cuda" in cuda["reason"]
    code, out, err = command("runtime", "doctor", root, capsys=capsys)
    lines = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert ["ort-float32", "cpu", "chosen"] in lines
    assert any(line[:6] == ["ort-half", "cpu", "would", "run,", "but", "ort-float32"] for line in lines)


def test_the_doctor_follows_a_wish(sealed, capsys):
    code, out, _ = command("runtime", "doctor", sealed(), "--engine", "bfloat16", "--json", capsys=capsys)
    component = json.loads(out)["components"]["sharpen"]
    assert (code, component["chosen"]) == (0, "ort-half")
    assert component["engines"][1]["reason"] == "--engine bfloat16 asks for another"


def test_the_doctor_ends_with_exit_4_where_a_component_has_no_engine(sealed, capsys):
    root = sealed(*UNFIT)
    code, out, err = command("runtime", "doctor", root, "--json", capsys=capsys)
    report = json.loads(out)
    assert code == report["error"]["code"] == 4
    assert report["components"]["sharpen"]["chosen"] is None
    assert [engine["runs"] for engine in report["components"]["sharpen"]["engines"]] == [False] * 3
    code, out, err = command("runtime", "doctor", root, capsys=capsys)
    assert code == 4
    assert "abacus_beads" in out and err.startswith("tilewright: no engine of sharpen can run here: ")


def test_the_doctor_without_a_bundle_tells_of_the_machine_alone(capsys):
    code, out, err = command("runtime", "doctor", capsys=capsys)
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "machine",
        "devices",
        "instructions",
        "backend ort",
        "backend openvino",
        "backend aoti",
        "backend tensorrt",
        "backend cuda",
    ]
    code, out, err = command("runtime", "doctor", "--engine", "ort", capsys=capsys)
    assert (code, out, err) == (2, "", "tilewright: --engine ort needs a bundle; name its directory\n")
