"""OpenVINO in bfloat16: angles and choices stay exact, and a call of one thread does not end the process."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tilewright.runtime.engines.machine import this_machine

pytest.importorskip("openvino", reason="OpenVINO is not installed")

from tilewright.runtime.engines import openvino

pytestmark = pytest.mark.skipif("avx512_bf16" not in this_machine().instructions, reason="this CPU has no avx512_bf16")


@pytest.mark.parametrize("moved", [False, True], ids=["", "behind a reshape and a transposition"])
def test_bfloat16_chooses_among_scores_that_it_would_round_to_one_number(tmp_path, moved):
    deep, wide, shift = 264, 16, 4
    weights = np.zeros((deep, wide), np.float32)
    for column, score in enumerate([3] * 4 + [258, 259, 260, 261] + [3] * 4 + [254, 255, 256, 257]):
        weights[: score - shift * (score > shift), column] = 1  # in bfloat16 260 and 261 are equal, as are 256 and 257
    feed = np.stack([np.ones(deep), -np.ones(deep), 2 * np.ones(deep)]).astype(np.float32)
    scores = feed @ weights + shift
    bias = helper.make_tensor("b", TensorProto.FLOAT, [wide], np.full(wide, shift, np.float32))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["scores"]),
        helper.make_node("Reshape", ["scores", "shape"], ["apart"]),
        helper.make_node("Transpose", ["apart"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("ArgMax", ["turned" if moved else "scores"], ["best"], axis=1, keepdims=0),
    ]
    constants = [
        helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.ravel()),
        bias,
        helper.make_tensor("shape", TensorProto.INT64, [3], [-1, 2, wide // 2]),
    ]
    best = ("best", ["n", *([2] if moved else [])])
    used = nodes if moved else [*nodes[:2], nodes[4]]
    save(tmp_path / "g.onnx", used, ("x", ["n", deep]), best, constants, TensorProto.INT64)
    chosen = openvino.open_graph(tmp_path / "g.onnx", {}, precision="bfloat16").run({"x": feed}, ["best"])["best"]
    expected = scores.reshape(-1, 2, wide // 2).argmax(2) if moved else scores.argmax(1)
    np.testing.assert_array_equal(chosen, expected)


def test_bfloat16_takes_sines_and_cosines_of_angles_that_it_would_round(tmp_path):
    speeds = (1000 ** -np.linspace(0, 1, 32)).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["t", "speeds"], ["angles"]),
        helper.make_node("Cos", ["angles"], ["cos"]),
        helper.make_node("Sin", ["angles"], ["sin"]),
        helper.make_node("Concat", ["cos", "sin"], ["waves"], axis=1),
        helper.make_node("MatMul", ["waves", "same"], ["product"]),  # all behind the last product is float32 anyway
    ]
    constants = [
        helper.make_tensor("speeds", TensorProto.FLOAT, [32], speeds),
        helper.make_tensor("same", TensorProto.FLOAT, [64, 64], np.eye(64, dtype=np.float32).ravel()),
    ]
    times = np.array([[0], [0.3], [30.3], [997]], np.float32)
    save(tmp_path / "g.onnx", nodes, ("t", ["n", 1]), ("product", ["n", 64]), constants)
    engine = openvino.open_graph(tmp_path / "g.onnx", {}, precision="bfloat16")
    angles = times.astype(np.float64) * speeds
    expected = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    np.testing.assert_allclose(engine.run({"t": times}, ["product"])["product"], expected, atol=2**-8)


def test_a_gated_layer_runs_with_one_thread(tmp_path):
    deep, wide = 256, 1024  # sizes that OpenVINO makes one operator of
    random = np.random.default_rng(0)
    shapes = {"up": (wide, deep), "gate": (wide, deep), "down": (deep, wide)}
    weights = {n: (random.standard_normal(s) / 16).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}
    nodes = []
    for name in weights:
        nodes.append(helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Transpose", [f"{name}_wide"], [f"{name}_turned"], perm=[1, 0]))
    nodes += [
        helper.make_node("MatMul", ["x", "gate_turned"], ["gated"]),
        helper.make_node("Sigmoid", ["gated"], ["share"]),
        helper.make_node("Mul", ["gated", "share"], ["open"]),
        helper.make_node("MatMul", ["x", "up_turned"], ["lifted"]),
        helper.make_node("Mul", ["open", "lifted"], ["middle"]),
        helper.make_node("MatMul", ["middle", "down_turned"], ["y"]),
    ]
    constants = [
        helper.make_tensor(n, TensorProto.BFLOAT16, w.shape, w.view(np.uint16).tobytes(), raw=True)
        for n, w in weights.items()
    ]
    save(tmp_path / "g.onnx", nodes, ("x", ["n", "t", deep]), ("y", ["n", "t", deep]), constants)
    x = random.standard_normal((1, 64, deep)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    code = f"""
from pathlib import Path
import numpy as np
from tilewright.runtime.engines import openvino
here = Path({str(tmp_path)!r})
engine = openvino.open_graph(here / "g.onnx", {{}}, precision="bfloat16", threads=1)
np.save(here / "y.npy", engine.run({{"x": np.load(here / "x.npy")}}, ["y"])["y"])
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0  # it was -8
    up, gate, down = (weights[name].astype(np.float64).T for name in ("up", "gate", "down"))
    gated = x @ gate
    expected = gated / (1 + np.exp(-gated)) * (x @ up) @ down
    error = np.linalg.norm(np.load(tmp_path / "y.npy") - expected) / np.linalg.norm(expected)
    assert error < 2**-6


def save(file, nodes, taken, given, constants, kind=TensorProto.FLOAT):
    """Write a graph with one input and one output."""
    ends = [helper.make_tensor_value_info(taken[0], TensorProto.FLOAT, taken[1])]
    graph = helper.make_graph(nodes, "g", ends, [helper.make_tensor_value_info(given[0], kind, given[1])], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
