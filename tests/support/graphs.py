"""Small graphs as text, run before and after a rewrite."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

HEADER = '<ir_version: 10, opset_import: ["" : 23]>'


def parsed(text: str) -> ir.Model:
    """A graph with the shapes that follow from those in the text."""
    proto = onnx.parser.parse_model(text if text.lstrip().startswith("<") else HEADER + text)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def operators(model: ir.Model) -> list[str]:
    """The operators of the nodes that something reads, sorted."""
    graph = model.graph
    read = {v for node in graph for v in node.inputs} | set(graph.outputs)
    while dead := [node for node in graph if not any(v in read for v in node.outputs)]:
        graph.remove(dead, safe=True)
        read = {v for node in graph for v in node.inputs} | set(graph.outputs)
    return sorted(node.op_type for node in graph)


def run(model: ir.Model, inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """The outputs of a graph whose constants lie inside, without ONNX Runtime's own rewrites."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))  # type: ignore[no-any-return]


def numbers(model: ir.Model, sizes: Mapping[str, int], seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Random inputs of these free sizes."""
    generator = np.random.default_rng(seed)
    shapes = {v.name: [d if isinstance(d, int) else sizes[d.value] for d in v.shape] for v in model.graph.inputs}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def check_rewrite(
    text: str, rewrite: Callable[[ir.Model], int], left: list[str], count: int, sizes: list[dict[str, int]]
) -> ir.Model:
    """A rewrite leaves these operators, reports this number, and gives the results of the graph before."""
    before, after = parsed(text), parsed(text)
    assert rewrite(after) == count
    assert operators(after) == left
    assert rewrite(after) == 0 and operators(after) == left  # a second time there is nothing to do
    for seed, chosen in enumerate(sizes):
        inputs = numbers(before, chosen, seed)
        for new, old in zip(run(after, inputs), run(before, inputs), strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)
            assert new.shape == old.shape and new.dtype == old.dtype
    return after
