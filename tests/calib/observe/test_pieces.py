"""Graphs in pieces: which tensors are looked at, and that pieces compute what the whole graph computes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tilewright.calib.observe.pieces import observed_tensors, pieces
from tilewright.calib.observe.watch import WatchedEngine
from tilewright.export.verify.eager import eager_network
from tilewright.runtime.bundle.read import read_bundle

GENERATOR = np.random.default_rng(0)


def layers() -> onnx.ModelProto:
    """Layers of every kind, some with weights that are turned or cast first, and a branch."""
    node = helper.make_node
    then = helper.make_graph(
        [node("Add", ["attended", "two"], ["then_out"])], "then", [], [helper.make_empty_tensor_value_info("then_out")]
    )
    other = helper.make_graph(
        [node("Identity", ["attended"], ["else_out"])], "else", [], [helper.make_empty_tensor_value_info("else_out")]
    )
    nodes = [
        node("Transpose", ["w1"], ["w1.turned"], perm=[1, 0]),
        node("MatMul", ["x", "w1.turned"], ["hidden"]),
        node("Cast", ["half"], ["half.wide"], to=TensorProto.FLOAT),
        node("Gemm", ["hidden", "half.wide", "bias"], ["y"], transB=1),
        node("Gemm", ["hidden", "y"], ["square"], transA=1),
        node("MatMul", ["wide", "square"], ["left"]),
        node("Transpose", ["hidden"], ["keys"], perm=[1, 0]),
        node("MatMul", ["hidden", "keys"], ["scores"]),
        node("Softmax", ["scores"], ["shares"]),
        node("MatMul", ["shares", "hidden"], ["attended"]),
        node("ReduceMax", ["attended"], ["top"], keepdims=0),
        node("Greater", ["top", "two"], ["large"]),
        node("If", ["large"], ["chosen"], then_branch=then, else_branch=other),
        node("Unsqueeze", ["chosen", "ends"], ["image"]),
        node("Conv", ["image", "kernel"], ["filtered"]),
        node("Relu", ["filtered"], ["result"]),
        node("Shape", ["result"], ["sizes"]),
        node("Mul", ["two", "two"], ["four"]),
        node("Identity", ["four"], ["fixed"]),
    ]
    arrays: dict[str, np.ndarray] = {
        "w1": GENERATOR.normal(0, 1, (6, 4)).astype(np.float32),
        "half": GENERATOR.normal(0, 1, (6, 6)).astype(np.float16),
        "bias": GENERATOR.normal(0, 1, 6).astype(np.float32),
        "wide": GENERATOR.normal(0, 1, (2, 6)).astype(np.float32),
        "kernel": GENERATOR.normal(0, 1, (1, 1, 3, 3)).astype(np.float32),
        "ends": np.array([0, 1]),
        "two": np.array(2, np.float32),
    }
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])]
    kinds = {"result": TensorProto.FLOAT, "left": TensorProto.FLOAT, "sizes": TensorProto.INT64}
    kinds["fixed"] = TensorProto.FLOAT
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_the_numbers_that_enter_layers_are_looked_at_and_weights_are_not() -> None:
    assert observed_tensors(layers().graph) == {
        "x": -1,
        "hidden": -1,
        "y": None,
        "square": -2,
        "keys": None,
        "shares": None,
        "image": 1,
    }


def test_the_factors_of_our_ops_and_of_attention_are_looked_at_too() -> None:
    nodes = [
        helper.make_node("ConcatProject_without_c", ["x", "w", "h"], ["a"], domain="tilewright"),
        helper.make_node("ConcatProject", ["x", "c", "w", "h"], ["a2"], domain="tilewright"),
        helper.make_node(
            "QkvNormRope_without_c_hq", ["a", "w", "w", "w", "cos", "sin"], ["q", "k", "v"], domain="tilewright"
        ),
        helper.make_node("JointAttention", ["q", "k", "v", "q2", "k2", "v2"], ["b", "b2"], domain="tilewright"),
        helper.make_node("SiluConv_without_bias", ["b", "kernel"], ["d"], domain="tilewright"),
        helper.make_node("CodebookNearest", ["d", "w"], ["indices", "codes"], domain="tilewright"),
        helper.make_node("Attention", ["q3", "k3", "v3", "mask"], ["e"]),
        helper.make_node("FusedMatMul", ["e", "w"], ["f"], domain="com.microsoft"),
    ]
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [1], [0]) for name in ("w", "kernel")]
    factors = dict.fromkeys(("q", "k", "v", "q2", "k2", "v2", "q3", "k3", "v3"))
    expected = {"x": -1, "c": -1, "a": -1, "b": 1} | factors
    assert observed_tensors(helper.make_graph(nodes, "ours", [], [], weights)) == expected


class Seen(dict[str, Any]):
    """Tensor -> its numbers, each seen once."""

    def look(self, tensor: str, numbers: Any, channels: int | None) -> None:
        assert tensor not in self
        self[tensor] = np.array(numbers)


def watched(graph: Path, files: dict[str, Path], seen: Seen) -> WatchedEngine:
    return WatchedEngine(graph, files, seen.look, memory="fast", threads=1)


def whole(graph: Path, files: dict[str, Path], feed: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """These tensors of a graph that runs as one, with its weights inside, and without any optimisation."""
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            start, length = int(place.get("offset", 0)), int(place["length"])
            tensor.raw_data = files[place["location"]].read_bytes()[start : start + length]
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    there = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in {*there, *feed})
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [name for name in names if name not in feed]
    return feed | dict(zip(outputs, session.run(outputs, feed), strict=True))


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_pieces_compute_what_the_whole_graph_computes(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tilewright.calib.observe.watch.AT_ONCE", at_once)
    path = tmp_path / "layers.onnx"
    onnx.save(layers(), path)
    for rows in (5, 7):  # the sessions of the first call serve other sizes too
        feed, seen = {"x": GENERATOR.normal(0, 3, (rows, 4)).astype(np.float32)}, Seen()
        engine = watched(path, {}, seen)
        outputs = engine.run(feed, ["result", "left", "sizes", "fixed"])
        assert len(engine.pieces) == {1: 7, 3: 3, 1000: 1}[at_once]  # six tensors, and what follows the last
        expected = whole(path, {}, feed, [*outputs, *engine.observed])
        assert seen.keys() == engine.observed.keys()
        for name, array in {**outputs, **seen}.items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
        engine.close()


def test_a_piece_ends_with_the_tensors_it_hands_out_and_keeps_no_other() -> None:
    graph = layers().graph
    cut = pieces(graph, observed_tensors(graph), 2)
    made = [name for piece in cut for node in piece.nodes for name in node.output]
    assert {name for node in graph.node for name in node.output} >= set(made)
    alive = {"x"}
    for piece in cut:
        assert set(piece.reads) <= alive
        assert len(set(piece.writes) & observed_tensors(graph).keys()) <= 2
        alive = (alive | set(piece.writes)) - piece.ended
    assert alive == {"result", "left", "sizes", "fixed"}


@pytest.mark.slow
def test_the_graphs_of_a_real_bundle_compute_the_same_in_pieces(hitoksr_tiny: Path) -> None:
    bundle = read_bundle(hitoksr_tiny)
    codes: dict[str, Any] = {}
    for name in ("generate", "decode"):
        component, seen = bundle.manifest.components[name], Seen()
        graph, files = bundle.path(component.graph), bundle.files_of(name)
        feed = codes if name == "decode" else {"image": GENERATOR.random((1, 3, 64, 64), np.float32)}
        engine = watched(graph, files, seen)
        outputs = engine.run(feed, list(component.outputs))
        expected = whole(graph, files, feed, [*outputs, *engine.observed])
        assert len(engine.pieces) > 3 and len(seen) > 8
        for tensor, array in {**outputs, **seen}.items():
            np.testing.assert_allclose(array, expected[tensor], rtol=1e-3, atol=1e-4, err_msg=tensor)
        codes = {"codes": outputs["codes"]} if name == "generate" else {}
        engine.close()


def weight_behind(graph: onnx.GraphProto, name: str) -> str:
    """The initializer that a tensor is made of."""
    makers = {output: node for node in graph.node for output in node.output}
    while name in makers:
        name = makers[name].input[0]
    return name


@pytest.mark.slow
def test_layers_are_seen_with_the_numbers_that_enter_the_eager_networks_modules(hitoksr_tiny: Path) -> None:
    bundle = read_bundle(hitoksr_tiny)
    component, seen = bundle.manifest.components["generate"], Seen()
    engine = watched(bundle.path(component.graph), bundle.files_of("generate"), seen)
    feed = {"image": GENERATOR.random((1, 3, 64, 64), np.float32)}
    engine.run(feed, list(component.outputs))

    eager, entered = eager_network(bundle, "generate", None), dict[str, np.ndarray]()
    for name, module in eager.network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_hook(lambda _, args, out, name=name: entered.update({name: args[0].numpy()}))
    eager.run(feed, list(component.outputs))

    graph, compared = engine.model.graph, set()
    for node in graph.node:
        layer = weight_behind(graph, node.input[1]).removesuffix(".weight") if len(node.input) > 1 else ""
        if node.op_type in ("Conv", "MatMul", "Gemm") and layer in entered:
            ours, theirs = seen[node.input[0]], entered[layer]
            assert ours.size == theirs.size
            np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=1e-3, atol=1e-4, err_msg=layer)
            compared.add(layer)
    assert len(compared) > 0.8 * len(entered), entered.keys() - compared
    engine.close()
