"""TensorRT's code path, over the real bindings: compiling a bundle, opening it, and all that can go wrong.

`test_tensorrt.py` runs this file in a process of its own for each version, where `tensorrt` is the stub's place.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tensorrt as trt
from PIL import Image

from support.bundles import MANIFEST, PROGRAM, staged, weights_dir  # noqa: F401
from support.layered import LAYERS, layered
from support.tensorrt.library import Library
from tilewright.calib import collect, make_recipe, read_observations
from tilewright.cli.main import main
from tilewright.export.build.compile import compile_engines
from tilewright.export.lint.lint import lint
from tilewright.export.plans.build import Options
from tilewright.export.plans.inspector import inspected
from tilewright.export.plans.timing import default_place
from tilewright.runtime.bundle.program import Tiles
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.write import seal
from tilewright.runtime.engines import Opening, backend, driver, machine
from tilewright.runtime.engines.choose import choose, tile_sides
from tilewright.runtime.engines.driver import Gpu, Tensor, first_gpu
from tilewright.runtime.engines.machine import this_machine
from tilewright.runtime.engines.tensorrt import open_engine, open_plan
from tilewright.runtime.errors import (
    BuildError,
    BundleError,
    EnvironmentMismatch,
    InputError,
    ResourceError,
    UsageError,
)
from tilewright.runtime.execute.cuda import CudaDevice
from tilewright.runtime.restore import load

PICTURE = np.random.default_rng(0).random((1, 3, 24, 40), np.float32)
SHARPEN = MANIFEST.components["sharpen"]
TILED = replace(MANIFEST, components={"sharpen": replace(SHARPEN, px={"height": 1, "width": 1})})


@pytest.fixture(scope="session")
def stub() -> Library:
    machine.CUDA = os.environ["STUB_DRIVER"]
    return Library(os.environ["STUB_LIBRARY"], os.environ["STUB_DRIVER"], trt)


@pytest.fixture(autouse=True)
def library(stub: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The library, which must not have met a call that it does not know."""
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    first_gpu.cache_clear()
    stub.calls.clear()
    stub.fails = ""
    yield stub
    assert not [call for call in stub.calls if call.startswith("raised")]


@pytest.fixture
def sealed(tmp_path: Path, staged):  # noqa: F811
    def seal_it(change=lambda model: None, program=PROGRAM) -> Path:
        staging, _ = staged(program=program)
        model = onnx.load(staging / "sharpen.onnx", load_external_data=False)
        change(model)
        (staging / "sharpen.onnx").write_bytes(model.SerializeToString())
        seal(staging, TILED, tmp_path / "sharpen.bundle")
        return tmp_path / "sharpen.bundle"

    return seal_it


@pytest.fixture
def bundle(sealed) -> Path:
    return sealed()


def plan_of(bundle: Path, **options: Any) -> tuple[Path, Any]:
    compile_engines(bundle, ["tensorrt"], ["float32"], options=Options(**options))
    spec = next(s for s in read_bundle(bundle).manifest.components["sharpen"].engines if s.backend == "tensorrt")
    return bundle / spec.graph, spec


def opened(bundle: Path, spec: Any, **options: Any):
    return open_engine(read_bundle(bundle), "sharpen", spec, Opening(**options))


def expected(bundle: Path, picture: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """The same network in ONNX Runtime, with the weight as an initializer."""
    model = onnx.load(bundle / "sharpen.onnx", load_external_data=False)
    read = read_bundle(bundle)
    reference = read.weights.tensors["sharpen"]["weight"]
    file = next(iter(read.files_of("sharpen").values()))
    data = np.fromfile(file, np.uint8)[reference.offset : reference.offset + reference.length]
    for initializer in model.graph.initializer:
        if initializer.name == "weight":
            values = data.view(np.float32).reshape(reference.shape) if weight is None else weight
            initializer.CopyFrom(onnx.numpy_helper.from_array(values, "weight"))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": picture})[0]


def refused(kind: type[Exception], *says: str):
    """One line, of this kind, with these words."""

    class Refused:
        def __enter__(self) -> None:
            self.raises = pytest.raises(kind)
            self.caught = self.raises.__enter__()

        def __exit__(self, *error: Any) -> bool:
            stopped = self.raises.__exit__(*error)
            assert type(self.caught.value) is kind and str(self.caught.value).isprintable()
            for words in says:
                assert words in str(self.caught.value)
            return bool(stopped)

    return Refused()


def test_a_bundle_gets_plans_without_weights_and_runs_with_them(bundle, library):
    before = read_bundle(bundle)
    plan, spec = plan_of(bundle)
    assert (spec.name, spec.device, spec.needs.exactly) == ("tensorrt-float32-sm90", "cuda", True)
    assert spec.needs.compute_capability == (9, 0) and spec.needs.packages == {"tensorrt": trt.__version__}
    told = json.loads(plan.read_bytes().removeprefix(b"plan"))
    assert {"STRIP_PLAN", "REFIT_INDIVIDUAL"} <= set(told["flags"]) and "TF32" not in told["flags"]
    assert told["profiles"] == [{"image": [[1, 3, 8, 8], [1, 3, 64, 64], [1, 3, 64, 64]]}]
    weight = before.weights.tensors["sharpen"]["weight"]
    data = next(iter(before.files_of("sharpen").values())).read_bytes()[weight.offset : weight.offset + weight.length]
    assert data not in plan.read_bytes() and weight.length > 100
    engine = opened(bundle, spec)
    for side in (24, 64):  # twice each, then again: at once, recorded, replayed
        picture = np.random.default_rng(side).random((1, 3, side, 40), np.float32)
        for _ in range(3):
            out = engine.run({"image": picture}, ["sharp"])["sharp"]
            np.testing.assert_allclose(out, expected(bundle, picture), atol=1e-6)
    assert len(library.captured) == 2
    engine.close()
    assert library.driver.stub_used() <= 4096  # the memory that engines share


def test_no_other_thread_puts_work_into_a_recording(library):
    gpu = first_gpu()
    device, got = CudaDevice("cuda:0", {}, gpu), []
    other = Thread(target=lambda: got.append(device.get(device.put(np.arange(4)))))
    before = library.driver.stub_used()

    def work():
        other.start()
        other.join(0.2)
        dropped.clear()

    dropped = [Tensor(gpu, (2**20,), np.float32)]
    with gpu:
        gpu.record(work)
        assert library.driver.stub_used() == before  # what was dropped meanwhile was freed after it
    other.join()
    np.testing.assert_array_equal(got[0], np.arange(4))


def test_a_bundle_keeps_its_other_engines_and_a_second_compilation_uses_the_first(bundle, library):
    _, spec = plan_of(bundle)
    assert library.calls.count("builder.build") == 1
    assert plan_of(bundle)[1] == spec and library.calls.count("builder.build") == 1
    names = [engine.name for engine in read_bundle(bundle).manifest.components["sharpen"].engines]
    assert names == ["ort-float32", "tensorrt-float32-sm90"]


def test_engines_in_bfloat16_have_it_written_in_their_graph(bundle, library):
    compile_engines(bundle, ["tensorrt"], ["bfloat16"])
    spec = read_bundle(bundle).manifest.components["sharpen"].engines[-1]
    graph = onnx.load(bundle / spec.files[1], load_external_data=False)
    assert spec.name == "tensorrt-bfloat16-sm90"
    assert [n.op_type for n in graph.graph.node] == ["Pad", "Cast", "Cast", "Conv", "Cast", "Clip"]


def test_the_tensors_of_a_gpu_stay_there(bundle):
    engine = opened(bundle, plan_of(bundle)[1])
    there = Tensor(engine.gpu, PICTURE.shape, np.float32)
    engine.gpu.fill(there.address, PICTURE)
    first = engine.run_on({"image": there}, ["sharp"])["sharp"]
    second = engine.run_on({"image": first}, ["sharp"])["sharp"]
    once = expected(bundle, PICTURE)
    np.testing.assert_allclose(first.array(), once, atol=1e-6)
    np.testing.assert_allclose(second.array(), expected(bundle, once), atol=1e-6)


def test_a_lora_changes_weights_and_the_next_one_starts_from_the_files(bundle):
    engine = opened(bundle, plan_of(bundle)[1])
    run = lambda: engine.run({"image": PICTURE}, ["sharp"])["sharp"]  # noqa: E731
    other = np.ones((3, 1, 3, 3), np.float32) / 9
    engine.change_weights({"weight": other})
    np.testing.assert_allclose(run(), expected(bundle, PICTURE, other), atol=1e-6)
    engine.change_weights({})
    np.testing.assert_allclose(run(), expected(bundle, PICTURE), atol=1e-6)
    with refused(UsageError, "weight 'wieght' is none of this engine"):
        engine.change_weights({"wieght": other})
    with refused(UsageError, "has 4 bytes, and needs 108 bytes"):
        engine.change_weights({"weight": other[:1, :, 0, 0]})
    np.testing.assert_allclose(run(), expected(bundle, PICTURE), atol=1e-6)


def test_weights_that_do_not_fit_or_are_missing_are_refused(bundle, library):
    plan, spec = plan_of(bundle)
    read = read_bundle(bundle)
    (name, reference), files = *read.weights.tensors["sharpen"].items(), read.files_of("sharpen")
    engine = open_plan(plan, first_gpu())
    with refused(BundleError, "reads a weight 'weight' that weights.json does not list"):
        engine.weights.load({}, files)
    with refused(BundleError, "'weight' is float16 [3, 1, 3, 3], and not 27 numbers of FLOAT"):
        engine.weights.load({name: replace(reference, dtype="float16")}, files)
    engine.weights.prototypes.clear()  # an engine whose weights nobody sets
    with refused(BundleError, "1 weights got no values, the first is 'weight'"):
        engine.weights.load({}, files)
    library.fails = "refit"
    with refused(BundleError, "TensorRT refuses the weights"):
        opened(bundle, spec)


@pytest.mark.parametrize(
    ("damage", "kind", "says"),
    [
        (lambda data: data[: len(data) // 2], BundleError, "the plan is damaged; make it again with"),
        (lambda data: b"", BundleError, "the plan is damaged"),
        (lambda data: data.replace(trt.__version__.encode(), b"9.9.9.9"), EnvironmentMismatch, "Version tag does not"),
    ],
    ids=["cut short", "empty", "of another version"],
)
def test_a_plan_that_does_not_open_is_refused_in_one_line(bundle, damage, kind, says):
    plan, spec = plan_of(bundle)
    data = damage(plan.read_bytes())
    plan.unlink()
    plan.write_bytes(data)
    with refused(kind, f"{plan}: tensorrt {trt.__version__} refuses the plan", says):
        open_plan(plan, first_gpu())
    with refused(BundleError, spec.graph):  # and before that, its digest
        read_bundle(bundle)


def test_a_tile_that_no_profile_takes_is_refused_with_the_sides(bundle):
    engine = opened(bundle, plan_of(bundle, tiles=(32,))[1])
    with refused(UsageError, "image of shape (1, 3, 40, 32) is in no profile", "(1, 3, 8, 8) to (1, 3, 32, 32)"):
        engine.run({"image": np.zeros((1, 3, 40, 32), np.float32)}, ["sharp"])
    with refused(UsageError, "tile=12 must be a positive multiple of 8 for this bundle; its own tiles have 64 px"):
        plan_of(bundle, tiles=(12,))
    component = read_bundle(bundle).manifest.components["sharpen"]
    here = replace(this_machine(), packages={"tensorrt": trt.__version__}, devices=("cuda",))
    assert choose(component.engines, here, side_px=32).spec.name == "tensorrt-float32-sm90"
    assert (
        "takes tiles of 1 to 32 px, and these have 64" in choose(component.engines, here, side_px=64).misfits.values()
    )


def test_one_profile_for_each_side_of_tiles_and_each_number_of_tiles(bundle):
    plan, _ = plan_of(bundle, tiles=(64, 16), batches=(4, 1))
    told = json.loads(plan.read_bytes().removeprefix(b"plan"))["profiles"]
    assert told == [{"image": [[1, 3, 8, 8], [b, 3, s, s], [b, 3, s, s]]} for s in (16, 64) for b in (1, 4)]


@pytest.mark.parametrize("stored", ["another card's", "cut short", "no cache", "no head"])
def test_a_timing_cache_that_is_not_of_this_card_is_refused(bundle, tmp_path, stored):
    cache = tmp_path / "timings"
    plan_of(bundle, timings=cache)
    head, _, timings = cache.read_bytes().partition(b"\n")
    other = {
        "another card's": head.replace(b"Stub GPU", b"Some RTX") + b"\n" + timings,
        "cut short": head + b"\n" + timings[:3],
        "no cache": b"\x00\xff",
        "no head": b'{"gpu": 1}\nx',
    }[stored]
    cache.write_bytes(other)
    kind = EnvironmentMismatch if stored == "another card's" else InputError
    with refused(kind, str(cache), "remove the file, or name another with --timing-cache"):
        plan_of(bundle, timings=cache, tiles=(16,))
    assert cache.read_bytes() == other


def test_timings_lie_in_the_cache_under_the_name_of_the_card(bundle):
    plan_of(bundle)
    from tilewright.export.build.plan import this_card

    card = this_card()
    assert str(card) == f"Stub GPU (sm90) with TensorRT {trt.__version__}"
    assert default_place(card).read_bytes().endswith(b"\ntimings")


def test_a_graph_that_tensorrt_does_not_read_comes_with_commands_that_repeat_it(sealed):
    root = sealed(nosuch)
    with pytest.raises(BuildError) as caught:
        plan_of(root)
    text, (write, put, run) = str(caught.value), caught.value.repeat
    assert "does not read the graph (Nosuch 'odd': Plugin not found" in text and text.isprintable()
    assert write == f"tilewright export onnx {root} -o onnx --component sharpen"
    assert Path(put.split()[1]).is_file() and put.endswith("onnx/sharpen.onnx")
    assert run == (
        "trtexec --onnx=onnx/sharpen.onnx --stronglyTyped --builderOptimizationLevel=3"
        " --minShapes=image:1x3x8x8 --optShapes=image:1x3x64x64 --maxShapes=image:1x3x64x64"
    )
    assert [e.name for e in read_bundle(root).manifest.components["sharpen"].engines] == ["ort-float32"]


def nosuch(model: onnx.ModelProto) -> None:
    clip = model.graph.node[-1]
    clip.op_type, clip.name, clip.domain = "Nosuch", "odd", "other"
    model.opset_import.append(onnx.helper.make_opsetid("other", 1))


@pytest.mark.skipif("STUB_BUNDLE" not in os.environ, reason="the long test of test_tensorrt.py gives a real bundle")
def test_a_real_network_is_read_whole_and_gets_each_of_its_weights(library, tmp_path):
    from tilewright.kernels.forms import PLUGINS

    root = tmp_path / "copy"
    shutil.copytree(os.environ["STUB_BUNDLE"], root)
    assert compile_engines(root, ["tensorrt"], ["bfloat16"]).engines == ("tensorrt-bfloat16-sm90",)
    read = read_bundle(root)
    for name, component in read.manifest.components.items():
        spec = component.engines[-1]
        told = json.loads((root / spec.graph).read_bytes().removeprefix(b"plan"))
        assert told["weights"].keys() == read.weights.tensors[name].keys() and len(told["weights"]) > 5
        open_engine(read, name, spec, Opening()).close()
        graph = onnx.load(root / spec.files[1], load_external_data=False)
        ours = {node.op_type for node in graph.graph.node if node.domain == "tilewright"}
        assert ours <= PLUGINS.keys()
    report = lint(root, "tensorrt")
    assert not report["findings"] and len(report["graphs"]) == 2 * len(read.manifest.components)


@pytest.mark.skipif("STUB_CACHE" not in os.environ, reason="the long test of test_tensorrt.py gives a cache of builds")
def test_a_build_for_tensorrt_has_plans_and_an_engine_for_any_machine(library, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", os.environ["STUB_CACHE"])
    words = ["export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "0", "-o", str(tmp_path / "b")]
    for _ in range(2):
        assert main([*words, "--target", "tensorrt"]) == 0, capsys.readouterr().err
        components = read_bundle(tmp_path / "b").manifest.components.values()
        assert {e.name for c in components for e in c.engines} == {"ort-float32", "tensorrt-float32-sm90"}
        assert library.calls.count("builder.build") == len(components)  # the second time there is nothing to compile


def test_a_build_that_fails_says_what_to_do_and_leaves_the_bundle_as_it_was(bundle, library, capsys):
    digest, library.fails = read_bundle(bundle).digest, "build"
    assert main(["export", "compile", str(bundle), "--target", "tensorrt", "--precision", "float32"]) == 5
    told = capsys.readouterr().err.strip()
    assert "makes no plan (Error Code 10: Could not find any implementation" in told and "trtexec" in told
    assert "\n" not in told and read_bundle(bundle).digest == digest
    assert [p.name for p in bundle.parent.iterdir() if p.name.startswith(f".{bundle.name}")] == []


def test_a_gpu_that_is_too_small_is_refused_before_anything_is_compiled(bundle, library, monkeypatch, capsys):
    monkeypatch.setattr(Gpu, "memory", lambda self: (10**8, 10**9))
    assert main(["export", "compile", str(bundle), "--target", "tensorrt", "--precision", "float32"]) == 5
    told = capsys.readouterr().err.strip()
    assert "needs about 1.5 GB of GPU memory, and such a card has 1.0 GB" in told and "\n" not in told
    assert "builder.build" not in library.calls


def test_a_full_disk_leaves_the_bundle_as_it_was(bundle, monkeypatch, capsys):
    digest = read_bundle(bundle).digest

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["export", "compile", str(bundle), "--target", "tensorrt", "--precision", "float32"]) == 5
    monkeypatch.undo()
    assert "\n" not in capsys.readouterr().err.strip() and read_bundle(bundle).digest == digest


def test_a_picture_is_restored_on_a_gpu_as_on_the_cpu(bundle, library):
    plan_of(bundle)
    pixels = np.random.default_rng(1).integers(0, 256, (70, 90, 3), np.uint8)
    on_gpu = load(bundle, devices=["cuda:0"]).restore(pixels)
    on_cpu = load(bundle).restore(pixels)
    assert on_gpu.engines == {"sharpen": "tensorrt-float32-sm90"} and on_gpu.devices == ("cuda:0",)
    assert on_cpu.engines == {"sharpen": "ort-float32"} and sum(on_gpu.tiles.values()) > 4
    np.testing.assert_array_equal(on_gpu.image, on_cpu.image)
    assert "context.run" in library.calls
    with refused(UsageError, "a GPU runs alone, and it must be the first; use cuda:0"):
        load(bundle, devices=["cuda:0", "cpu:0"])
    with refused(UsageError, "use cuda:0"):
        load(bundle, devices=["cuda:1"])


@pytest.mark.parametrize(
    "words", ["export inspect", "export space", "export explain", "runtime plan 64 64", "export lint"]
)
def test_other_verbs_know_plans(bundle, words, capsys):
    plan_of(bundle)
    group, verb, *more = words.split()
    more = [*more, "--bundle", str(bundle), "--devices", "cuda:0"] if verb == "plan" else [str(bundle)]
    more += ["--target", "tensorrt"] if verb == "lint" else []
    assert main([group, verb, *more]) == 0
    assert ("tensorrt-float32-sm90" in capsys.readouterr().out) == (verb not in ("space", "plan"))


def test_an_image_that_would_be_taken_whole_is_cut_where_the_plan_takes_tiles_only(sealed, library):
    whole = Tiles(64, 16, whole_up_to_px=(256, 256))
    bundle = sealed(program=replace(PROGRAM, passes=(replace(PROGRAM.passes[0], tiles=whole),)))
    plan_of(bundle)
    pixels = np.zeros((50, 60, 3), np.uint8)
    assert load(bundle).restore(pixels).tiles == {"restore": 1}
    assert load(bundle, devices=["cuda:0"]).restore(pixels).tiles["restore"] > 1


def test_weights_stay_with_the_host_if_that_is_asked_for(bundle, library):
    spec = plan_of(bundle, stream=True)[1]
    opened(bundle, spec, memory="low")
    assert "engine.budget" in library.calls
    library.calls.clear()
    opened(bundle, spec)
    assert "engine.budget" not in library.calls


def test_the_report_of_the_inspector_is_kept(bundle):
    plan_of(bundle)
    report = json.loads((bundle / "reports" / "tensorrt.sharpen.float32.sm90.json").read_text())
    assert report["layers"] == 3 and report["precisions"] == {"float32": 3} and report["fused_attention"] == 0
    assert report["tensors"] == ["image", "sharp"]


def test_doctor_knows_the_backend_and_says_that_it_never_ran(bundle, capsys):
    plan_of(bundle)
    assert main(["runtime", "doctor", str(bundle), "--engine", "tensorrt"]) == 0
    told = capsys.readouterr().out
    assert f"backend tensorrt: tensorrt {trt.__version__} (never run on a GPU" in told
    assert "tensorrt-float32-sm90  cuda  chosen" in told


def test_a_gpu_that_is_full_is_a_lack_of_memory(bundle):
    with refused(ResourceError, "GPU memory is full (cuMemAlloc_v2)"):
        Tensor(first_gpu(), (2**50,), np.float32)


def test_memory_of_the_gpu_goes_back():
    gpu = Gpu()
    used = gpu.driver.stub_used()
    free, total = gpu.memory()
    tensor = Tensor(gpu, (1000,), np.float32)
    assert gpu.memory() == (free - 4000, total) and gpu.driver.stub_used() == used + 4000
    del tensor
    assert gpu.memory() == (free, total)


def test_both_forms_of_the_report_are_read():
    layer = {"Name": "a_mha", "LayerType": "kgen", "TacticName": "_gemm_mha_v2"}
    old = {"Layers": [layer | {"Outputs": [{"Format/Datatype": "Row major linear BF16"}]}], "Bindings": ["x", "y"]}
    new = {"Layers": [layer | {"Outputs": [{"Datatype": "BFloat16"}]}], "I/O Tensors": [{"Name": "x"}, {"Name": "y"}]}
    one, other = inspected(json.dumps(old)), inspected(json.dumps(new))
    assert one == other and one.precisions == {"bfloat16": 1} and one.fused_attention == 1 and one.tensors == ("x", "y")


def test_the_backend_opens_by_its_name(bundle):
    assert backend("tensorrt").version().startswith("tensorrt ")
    assert driver.first_gpu().name == "Stub GPU" and tile_sides(read_bundle(bundle).program) == {"sharpen": 64}


@pytest.mark.parametrize(("precision", "capability"), [("int8", "sm90"), ("fp8", "sm90")])
def test_plans_in_8_bits_read_weights_of_their_own_and_compute_nearly_the_same(
    precision, capability, library, tmp_path
):
    root, recipe = layered(tmp_path / "layers.bundle"), tmp_path / "r.yaml"
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 230, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    collect(root, tmp_path / "pictures", tmp_path / "s.safetensors", images=2)
    make_recipe(read_bundle(root), *read_observations(tmp_path / "s.safetensors"), precision).write(recipe)
    words = ["export", "compile", str(root), "--target", "tensorrt", "--precision", precision, "--recipe", str(recipe)]
    for _ in range(2):  # the second time there is nothing to compile
        assert main([*words, "--tile", "16"]) == 0
        assert library.calls.count("builder.build") == 1
    bundle = read_bundle(root)
    exact, spec = bundle.manifest.components["show"].engines
    assert (spec.name, spec.weights) == (f"tensorrt-{precision}-sm90", f"show.tensorrt-{precision}")
    graph = onnx.load(root / spec.files[1], load_external_data=False).graph
    told = json.loads((root / spec.graph).read_bytes().removeprefix(b"plan"))
    stored = {"int8": "INT8", "fp8": "FP8"}[precision]
    assert sum(kind == stored for kind, _ in told["weights"].values()) == len(LAYERS) + 1  # one reads two inputs
    back = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
    scales = {w.name: w.data_type for w in graph.initializer}
    assert {scales[n.input[1]] for n in back.values()} == {onnx.TensorProto.BFLOAT16}
    products = [n for n in graph.node if n.op_type in ("MatMul", "Conv")]
    assert len(products) == len(LAYERS) + 1 and all(name in back for n in products for name in n.input[:2])
    report = lint(root, "tensorrt")
    assert report["findings"] == [] and f"show {spec.name}" in report["graphs"]
    picture = np.random.default_rng(9).random((1, 3, 16, 16), np.float32)
    ours, theirs = (
        backend(each.backend).open_engine(bundle, "show", each, Opening()).run({"image": picture}, ["picture"])
        for each in (spec, exact)
    )
    error = np.linalg.norm(ours["picture"] - theirs["picture"]) / np.linalg.norm(theirs["picture"])
    assert 0 < error < 0.1, error
