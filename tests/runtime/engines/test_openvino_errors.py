"""Failures of OpenVINO, each made for real: too little memory, an unknown op, a damaged graph, a wrong size."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("openvino", reason="OpenVINO is not installed")

from tilewright.runtime.engines.openvino import open_graph
from tilewright.runtime.errors import BundleError, EnvironmentMismatch, UsageError

SQUARE = np.ones((4, 4), np.float32)
PICTURE = np.ones((1, 3, 8, 8), np.float32)
THREE = {"x": np.ones((3, 3), np.float32)}


def model(op, *constants, shape=("a", "b"), kind=TensorProto.FLOAT, **attributes) -> bytes:
    """A graph of one node that reads `x` and constants, and gives `y`."""
    names = [f"c{i}" for i, _ in enumerate(constants)]
    x = helper.make_tensor_value_info("x", kind, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    node = helper.make_node(op, ["x", *names], ["y"], **attributes)
    initializers = [numpy_helper.from_array(np.asarray(c), n) for c, n in zip(constants, names, strict=True)]
    graph = helper.make_graph([node], "g", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("tilewright", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def refusal(folder: Path, graph: bytes, feed=None) -> Exception:
    path = folder / "g.onnx"
    path.write_bytes(graph)
    with pytest.raises(Exception) as caught:
        open_graph(path, {}, threads=1).run(feed or {}, ["y"])
    text = str(caught.value)
    assert text.startswith(f"{path}: openvino ") and text.isprintable()
    assert not any(noise in text for noise in ("Exception from", "src/", ".cpp", "docs.openvino.ai"))
    return caught.value


OPENING = {
    "an op of a later version": (model("Nosuch"), EnvironmentMismatch, "pip install -U openvino"),
    "an op of ours": (model("Norm", domain="tilewright"), EnvironmentMismatch, "pip install -U openvino"),
    "nothing": (b"", BundleError, "the graph is damaged"),
    "two types": (model("Add", np.ones(1, np.int64)), BundleError, "the graph is damaged"),
    "no axis": (model("Concat", SQUARE), BundleError, "the graph is damaged"),
}


@pytest.mark.parametrize("case", OPENING)
def test_a_graph_that_does_not_open(tmp_path, case) -> None:
    graph, kind, advice = OPENING[case]
    error = refusal(tmp_path, graph)
    assert type(error) is kind and advice in str(error).rpartition("); ")[2]


CHANNELS = model("Relu", shape=("b", 4, "h", "w"))
RUNNING = {
    "another rank": (CHANNELS, THREE),
    "other channels": (CHANNELS, {"x": PICTURE}),
    "Add": (model("Add", SQUARE), THREE),
    "Concat": (model("Concat", SQUARE, axis=0), THREE),
    "Reshape": (model("Reshape", [4, 4]), THREE),
    "Pad": (model("Pad", [5, 5], shape=["a"], mode="reflect"), {"x": np.ones(2, np.float32)}),
    "Conv": (model("Conv", np.ones((4, 4, 3, 3), np.float32), shape=list("abcd")), {"x": PICTURE}),
}


@pytest.mark.parametrize("case", RUNNING)
def test_a_call_with_another_size(tmp_path, case) -> None:
    graph, feed = RUNNING[case]
    error = refusal(tmp_path, graph, feed)
    assert type(error) is UsageError and "use the bundle's own --tile, or rebuild" in str(error)


def test_a_graph_that_is_no_protocol_buffer(tmp_path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="not an ONNX graph"):
        open_graph(tmp_path / "g.onnx", {})


def test_too_little_memory_is_a_resource_error_with_advice(tmp_path) -> None:
    resource = pytest.importorskip("resource", reason="limits of memory are for Unix")
    assert resource
    (tmp_path / "g.onnx").write_bytes(model("Tile", [1, 40000]))
    code = f"""
import resource
from pathlib import Path
import numpy as np
from tilewright.runtime.engines.openvino import open_graph
engine = open_graph(Path({str(tmp_path / "g.onnx")!r}), {{}}, threads=1)
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    engine.run({{"x": np.ones((40000, 1), np.float32)}}, ["y"])
except Exception as error:
    print(type(error).__name__, error)
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.startswith("ResourceError ") and said.endswith("; use a smaller --tile or --memory low\n")
