"""Failures of ONNX Runtime, each made for real: out of memory, wrong machine, damaged graph, wrong input."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tilewright.runtime.engines.ort import OrtEngine, open_graph
from tilewright.runtime.errors import BundleError, EnvironmentMismatch, ResourceError, UsageError

SQUARE = np.ones((4, 4), np.float32)
PICTURE = np.ones((1, 3, 8, 8), np.float32)


def model(op, *constants, shape=("a", "b"), kind=TensorProto.FLOAT, opset=20, ir=10, domain="", **attributes):
    """A graph of one node that reads `x` and constants, and gives `y`."""
    names = [f"c{i}" for i, _ in enumerate(constants)]
    x = helper.make_tensor_value_info("x", kind, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    node = helper.make_node(op, ["x", *names], ["y"], domain=domain, **attributes)
    initializers = [numpy_helper.from_array(np.asarray(c), n) for c, n in zip(constants, names, strict=True)]
    graph = helper.make_graph([node], "g", [x], [y], initializers)
    sets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=sets, ir_version=ir)


def refusal(folder: Path, graph, feed=None, outputs=("y",)) -> Exception:
    path = folder / "g.onnx"
    path.write_bytes(graph if isinstance(graph, bytes) else graph.SerializeToString())
    with pytest.raises(Exception) as caught:
        open_graph(path, {}, threads=1).run(feed or {}, outputs)
    text = str(caught.value)
    assert text.startswith(f"{path}: onnxruntime ") and text.isprintable()
    assert not any(noise in text for noise in ("[ONNXRuntimeError]", "onnxruntime_src", "Non-zero status", ".cc:"))
    return caught.value


OPENING = {
    "a later opset": (model("Relu", opset=99), EnvironmentMismatch, "pip install -U onnxruntime"),
    "a later format": (model("Relu", ir=99), EnvironmentMismatch, "pip install -U onnxruntime"),
    "an op of a later version": (model("Nosuch"), EnvironmentMismatch, "pip install -U onnxruntime"),
    "an op of ONNX Runtime": (model("Nosuch", domain="com.microsoft", name="n"), EnvironmentMismatch, "-U onnxruntime"),
    "an op with a name": (model("Nosuch", name="layer.1/op"), EnvironmentMismatch, "pip install -U onnxruntime"),
    "an op of ours": (model("Norm", domain="tilewright"), EnvironmentMismatch, "run make native in a clone"),
    "nothing": (b"", BundleError, "the graph is damaged"),
    "no graph": (b"not a graph", BundleError, "the graph is damaged"),
    "half a graph": (model("Relu").SerializeToString()[:-9], BundleError, "the graph is damaged"),
    "two types": (model("Add", np.ones(1, np.int64)), BundleError, "the graph is damaged"),
    "no axis": (model("Concat", SQUARE), BundleError, "the graph is damaged"),
}


@pytest.mark.parametrize("case", OPENING)
def test_a_graph_that_does_not_open(tmp_path, case) -> None:
    graph, kind, advice = OPENING[case]
    error = refusal(tmp_path, graph)
    assert type(error) is kind and advice in str(error).rpartition("); ")[2]


THREE = {"x": np.ones((3, 3), np.float32)}
SIZE = "use the bundle's own --tile, or rebuild"
CHANNELS = model("Relu", shape=("b", 4, "h", "w"))
RUNNING = {
    "another rank": (CHANNELS, THREE, UsageError, SIZE),
    "other channels": (CHANNELS, {"x": PICTURE}, UsageError, SIZE),
    "MatMul": (model("MatMul", SQUARE), THREE, UsageError, SIZE),
    "Add": (model("Add", SQUARE), THREE, UsageError, SIZE),
    "Concat": (model("Concat", SQUARE, axis=0), THREE, UsageError, SIZE),
    "Reshape": (model("Reshape", [4, 4]), THREE, UsageError, SIZE),
    "Expand": (model("Expand", [4, 4]), THREE, UsageError, SIZE),
    "Pad": (model("Pad", [5, 5], shape=["a"], mode="reflect"), {"x": np.ones(2, np.float32)}, UsageError, SIZE),
    "Conv": (model("Conv", np.ones((4, 4, 3, 3), np.float32), shape=list("abcd")), {"x": PICTURE}, UsageError, SIZE),
    "another type": (model("Relu"), {"x": np.ones((3, 3))}, BundleError, "not the one that bundle.json describes"),
    "no input": (model("Relu"), {}, BundleError, "not the one that bundle.json describes"),
    "another input": (model("Relu"), THREE | {"z": SQUARE}, BundleError, "not the one that bundle.json describes"),
}


@pytest.mark.parametrize("case", RUNNING)
def test_a_call_with_wrong_inputs(tmp_path, case) -> None:
    graph, feed, kind, advice = RUNNING[case]
    error = refusal(tmp_path, graph, feed)
    assert type(error) is kind and advice in str(error).rpartition("); ")[2]


def test_an_output_that_the_graph_lacks(tmp_path) -> None:
    error = refusal(tmp_path, model("Relu"), THREE, ["z"])
    assert type(error) is BundleError and "bundle.json describes" in str(error)


def test_an_id_beyond_the_vocabulary(tmp_path) -> None:
    graph = model("Neg", shape=["a"], kind=TensorProto.INT64)
    del graph.graph.node[:]
    graph.graph.initializer.append(numpy_helper.from_array(SQUARE, "words"))
    graph.graph.node.append(helper.make_node("Gather", ["words", "x"], ["y"]))
    error = refusal(tmp_path, graph, {"x": np.array([9])})
    assert type(error) is UsageError and "give ids of this bundle's own tokenizers" in str(error)


@pytest.mark.parametrize("count", [2**40, 2**62])
@pytest.mark.parametrize("op", ["ConstantOfShape", "Tile"])
def test_too_little_memory(tmp_path, op, count) -> None:
    graph = model("ConstantOfShape", shape=[1], kind=TensorProto.INT64)
    if op == "Tile":
        graph.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "one"))
        del graph.graph.node[:]
        graph.graph.node.append(helper.make_node("Tile", ["one", "x"], ["y"]))
    error = refusal(tmp_path, graph, {"x": np.array([count])})
    assert type(error) is ResourceError and str(error).endswith("; use a smaller --tile or --memory low")


def test_numpy_without_memory_is_out_of_memory_too() -> None:
    class Session:
        def run(self, names, inputs, options):
            raise MemoryError("Unable to do it")

    with pytest.raises(ResourceError, match="use a smaller --tile"):
        OrtEngine(Session(), Path("g.onnx")).run({}, ["y"])


def test_a_failure_that_nobody_knows_asks_to_verify_the_bundle() -> None:
    class Session:
        def run(self, names, inputs, options):
            raise RuntimeError("something else")

    with pytest.raises(BundleError, match=r"\(something else\); verify the bundle with 'tilewright export verify'"):
        OrtEngine(Session(), Path("g.onnx")).run({}, ["y"])


def test_onnx_runtime_writes_nothing_itself(tmp_path, capfd) -> None:
    refusal(tmp_path, model("MatMul", SQUARE), THREE)
    refusal(tmp_path, model("Relu", ir=99))
    onnx.save(model("Relu"), tmp_path / "g.onnx")
    open_graph(tmp_path / "g.onnx", {}).run(THREE, ["y"])
    assert capfd.readouterr() == ("", "")
