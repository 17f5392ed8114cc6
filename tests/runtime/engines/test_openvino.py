"""OpenVINO as an engine: right answers from mapped weights in float32 and bfloat16, and calls that can be stopped."""

import importlib.util
import struct
import subprocess
import sys
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from support.loops import filtered
from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.engines import Opening, backend
from tilewright.runtime.engines.machine import this_machine
from tilewright.runtime.errors import BundleError, EnvironmentMismatch

pytest.importorskip("openvino", reason="OpenVINO is not installed")

from tilewright.runtime.engines import openvino

SPEC = EngineSpec("openvino-float32", "openvino", "cpu", "float32", ("sharpen.onnx",))
BRAIN = EngineSpec("openvino-bfloat16", "openvino", "cpu", "bfloat16", ("sharpen.onnx",))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def opened(root: Path, spec: EngineSpec = SPEC, component: str = "sharpen", **options) -> openvino.OpenvinoEngine:
    whole = read_bundle(root)
    spec = EngineSpec(spec.name, "openvino", "cpu", spec.precision, (f"{component}.onnx",))
    return openvino.open_engine(whole, component, spec, Opening(**options))


@pytest.mark.parametrize("packed", [False, True], ids=["external", "packed"])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_the_answer_is_that_of_a_convolution_in_loops_at_any_size(build, kernels, packed, memory):
    engine = opened(build(packed=packed), memory=memory)
    for shape in ((1, 3, 8, 8), (2, 3, 8, 24), (1, 3, 8, 8)):
        image = noise(*shape)
        outputs = engine.run({"image": image}, ["sharp"])
        assert list(outputs) == ["sharp"] and outputs["sharp"].dtype == np.float32
        np.testing.assert_allclose(outputs["sharp"], filtered(image, kernels), atol=1e-6)
    engine.close()
    assert engine.compiled is None


def test_an_answer_stays_as_it_is_while_the_engine_computes_others(bundle, kernels):
    engine, image = opened(bundle), noise(1, 3, 8, 8)
    first = engine.run({"image": image}, ["sharp"])["sharp"]
    engine.run({"image": noise(1, 3, 8, 8, seed=1)}, ["sharp"])
    np.testing.assert_allclose(first, filtered(image, kernels), atol=1e-6)


@pytest.mark.skipif("avx512_bf16" not in this_machine().instructions, reason="this CPU has no avx512_bf16")
def test_bfloat16_is_as_exact_as_bfloat16_and_no_more(bundle, kernels):
    image = noise(1, 3, 64, 64)
    error = np.abs(opened(bundle, BRAIN).run({"image": image}, ["sharp"])["sharp"] - filtered(image, kernels)).max()
    assert 1e-4 < error < 3e-2  # 8 bits of a sum of 9 products that reach 1.4


@pytest.mark.parametrize("calls", [1, 2])
def test_four_threads_at_once_get_each_its_own_answer(bundle, calls):
    engine = opened(bundle, threads=1, calls=calls)
    images = [noise(1, 3, 32, 32, seed=seed) for seed in range(50)]
    alone = [engine.run({"image": image}, ["sharp"])["sharp"] for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: engine.run({"image": image}, ["sharp"])["sharp"], images))
    np.testing.assert_array_equal(together, alone)
    assert not engine.running and len(engine.free) <= 4


@pytest.mark.parametrize(("threads", "calls"), [(1, 1), (1, 2), (2, 1)])
def test_the_number_of_threads_and_calls_is_the_one_asked_for(bundle, threads, calls):
    compiled = opened(bundle, threads=threads, calls=calls).compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == threads * calls
    assert compiled.get_property("NUM_STREAMS") == calls


def test_weights_of_two_folders_and_three_types_meet_in_one_graph(two_folder_bundle, two_folders):
    engine = opened(two_folder_bundle(), component="add")
    scale, *rest = (
        np.float64(two_folders[f][n][1]) for f, n in (("base", "scale"), *(("extra", n) for n in two_folders["extra"]))
    )
    for image in (noise(1, 3, 8, 8), noise(2, 3, 16, 8)):
        expected = image * scale[:, None, None] + sum(rest)[:, None, None]
        np.testing.assert_allclose(engine.run({"image": image}, ["sum"])["sum"], expected, atol=1e-6)


def test_weights_at_an_odd_place_in_a_file_are_read(bundle, kernels, tmp_path):
    whole = read_bundle(bundle)
    ((place, path),) = whole.files_of("sharpen").items()
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    graph = onnx.load(bundle / "sharpen.onnx", load_external_data=False)
    weight = next(t for t in graph.graph.initializer if t.name == "weight")
    entry = next(e for e in weight.external_data if e.key == "offset")
    data = path.read_bytes()
    (tmp_path / "odd.bin").write_bytes(b"x" + data)
    entry.value = str(int(entry.value) + 1)
    onnx.save(graph, tmp_path / "odd.onnx")
    assert length
    engine = openvino.open_graph(tmp_path / "odd.onnx", {place: tmp_path / "odd.bin"})
    image = noise(1, 3, 8, 8)
    np.testing.assert_allclose(engine.run({"image": image}, ["sharp"])["sharp"], filtered(image, kernels), atol=1e-6)


def test_files_of_weights_are_mapped_and_not_read_before_the_graph_is_compiled(tmp_path):
    side = 4096
    (tmp_path / "weights.bin").write_bytes(bytes(4 * side * side))
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[side, side], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "weights.bin", "offset": "0", "length": str(4 * side * side)}.items():
        weight.external_data.add(key=key, value=value)
    ends = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, side])] for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", *ends, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    code = f"""
from pathlib import Path
from tilewright.runtime.engines import openvino
import sys
def held():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
here = Path({str(tmp_path)!r})
engine = openvino.open_graph(here / "g.onnx", {{"weights.bin": here / "weights.bin"}})
before = held()
engine.close()
print(before, "torch" in sys.modules)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells what a process holds of its own")
    before = {path: path.stat().st_size for path in tmp_path.iterdir()}
    held, torch = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert {path: path.stat().st_size for path in tmp_path.iterdir()} == before  # nothing is written
    assert int(held) < 4 * side * side / 1024 * 2.5  # one packed copy, and OpenVINO itself
    assert torch == "False"


@pytest.mark.slow
def test_a_call_is_stopped_from_another_thread_between_two_nodes(tmp_path):
    side, count = 1024, 2000  # about a minute
    ends = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side])] for name in ("v0", f"v{count}"))
    nodes = [helper.make_node("MatMul", [f"v{i}", "v0"], [f"v{i + 1}"]) for i in range(count)]
    graph = helper.make_graph(nodes, "products", *ends)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    engine, raised = openvino.open_graph(tmp_path / "g.onnx", {}, threads=1), []

    def call() -> None:
        try:
            engine.run({"v0": np.zeros((side, side), np.float32)}, [f"v{count}"])
        except CancelledError as error:
            raised.append(error)

    thread = Thread(target=call)
    thread.start()
    while not engine.running:
        time.sleep(0.01)
    engine.stop(thread.ident)
    thread.join()
    assert len(raised) == 1 and not engine.running
    engine.stop(thread.ident)  # a thread without a call


def test_without_openvino_the_line_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else find(name, *rest)
    )
    with pytest.raises(EnvironmentMismatch, match=r"needs OpenVINO: pip install 'tilewright\[openvino\]'$") as caught:
        backend("openvino")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("inputs", "outputs", "said"),
    [
        ({}, ["sharp"], "input 'image' is missing"),
        ({"image": noise(1, 3, 8, 8), "z": noise(1)}, ["sharp"], "has no input 'z'"),
        ({"image": noise(1, 3, 8, 8).astype(np.float64)}, ["sharp"], "'image' is float64, not float32"),
        ({"image": noise(1, 3, 8, 8)}, ["blunt"], "has no output 'blunt'"),
    ],
)
def test_inputs_and_outputs_that_the_graph_does_not_have_are_refused(bundle, inputs, outputs, said):
    with pytest.raises(BundleError, match=f"{said}; the graph is not the one that bundle.json describes"):
        opened(bundle).run(inputs, outputs)
