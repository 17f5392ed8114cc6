"""Matrix products, convolutions and attention in bfloat16, and everything else in float32, with Casts between them.

A backend that takes types as they are written fuses the Casts into its kernels. Norms, sums and angles keep the digits
that bfloat16 has not. Choices from a codebook stay in float32 too.
"""

from typing import Any

import onnx_ir as ir

from tilewright.kernels.face import DOMAIN

__all__ = ["bfloat16"]

PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"}
OURS = ("ConcatProject", "JointAttention", "QkvNormRope")
TABLES = {"cos", "sin"}  # inputs of ours that may stay in float32
FLOAT, SHORT = ir.DataType.FLOAT, ir.DataType.BFLOAT16


def bfloat16(model: ir.Model) -> int:
    """Rewrite a graph in place, and return the number of nodes that compute in bfloat16 now."""
    graph: Any = model.graph
    short: dict[ir.Value, ir.Value] = {}  # a value -> its Cast
    count = 0
    for node in list(graph):
        if not _short(node):
            continue
        formal = _names(model, node)
        wide = [
            (i, value)
            for i, value in enumerate(node.inputs)
            if value is not None and _type(value) == FLOAT and formal.get(i) not in TABLES
        ]
        if not wide:
            continue
        count += 1
        for i, value in wide:
            if value not in short:
                short[value] = _cast(value, SHORT, f"{value.name}.bfloat16")
                producer = value.producer()
                graph.insert_before(node, short[value].producer()) if producer is None else graph.insert_after(
                    producer, short[value].producer()
                )
            node.replace_input_with(i, short[value])
        for value in [value for value in node.outputs if _type(value) == FLOAT]:
            short[_widen(graph, node, value)] = value
    return count


def _short(node: ir.Node) -> bool:
    return (node.domain in ("", "ai.onnx") and node.op_type in PRODUCTS) or (
        node.domain == DOMAIN and node.op_type.startswith(OURS)
    )


def _names(model: ir.Model, node: ir.Node) -> dict[int, str]:
    """The inputs of one of our nodes by place, as its function names them."""
    function = model.functions.get(node.op_identifier())
    return {} if function is None else {i: str(value.name) for i, value in enumerate(function.inputs)}


def _type(value: ir.Value) -> ir.DataType | None:
    return value.dtype if value.dtype is not None or value.const_value is None else value.const_value.dtype


def _cast(value: ir.Value, kind: ir.DataType, name: str) -> ir.Value:
    node = ir.node("Cast", [value], attributes={"to": kind.value}, num_outputs=1)
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(kind)
    return node.outputs[0]


def _widen(graph: Any, node: ir.Node, value: ir.Value) -> ir.Value:
    """Let a node write bfloat16, and all readers of its value read a Cast of it, which is returned."""
    name, uses = value.name, tuple(value.uses())
    wide = _cast(value, FLOAT, str(name))
    value.name, value.type = f"{name}.bfloat16", ir.TensorType(SHORT)
    for use in uses:
        use.node.replace_input_with(use.idx, wide)
    for i, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[i] = wide
    graph.insert_after(node, wide.producer())
    return wide
