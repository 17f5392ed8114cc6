"""Matrix products, convolutions and attention in bfloat16, and everything else in float32, with Casts between them.

A backend that takes types as they are written fuses the Casts into its kernels. Norms, sums and angles keep the digits
that bfloat16 has not. Choices from a codebook stay in float32 too.

A product in 8 bits reads numbers behind DequantizeLinear. A Cast there would keep TensorRT from fusing them, so the
scale becomes bfloat16, as the result has the type of the scale.
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
        if not wide and all(_type(value) != FLOAT for value in node.outputs):
            continue
        count += 1
        for i, value in wide:
            if not _dequantised(graph, value, node, short):
                node.replace_input_with(i, _shortened(graph, value, node, short))
        for value in [value for value in node.outputs if _type(value) == FLOAT]:
            short[_widen(graph, node, value)] = value
    return count


def _shortened(graph: Any, value: ir.Value, before: ir.Node, short: dict[ir.Value, ir.Value]) -> ir.Value:
    """The Cast of a value, which all its readers share."""
    if value not in short:
        short[value] = _cast(value, SHORT, f"{value.name}.bfloat16")
        cast, producer = short[value].producer(), value.producer()
        graph.insert_before(before, cast) if producer is None else graph.insert_after(producer, cast)
    return short[value]


def _dequantised(graph: Any, value: ir.Value, before: ir.Node, short: dict[ir.Value, ir.Value]) -> bool:
    """Give a DequantizeLinear, and the QuantizeLinear before it, a scale in bfloat16; whether the value comes from one.

    All readers of the value must compute in bfloat16.
    """
    back = value.producer()
    if back is None or back.op_type != "DequantizeLinear" or not all(_short(use.node) for use in value.uses()):
        return False
    scale, codes = back.inputs[1], back.inputs[0]
    numbers = None if scale is None else ir.convenience.get_const_tensor(scale)
    if scale is None or codes is None or numbers is None:
        return False
    if scale not in short:
        tensor = ir.tensor(numbers.numpy().astype(SHORT.numpy()), name=f"{scale.name}.bfloat16")
        short[scale] = ir.Value(name=tensor.name, const_value=tensor, shape=scale.shape, type=ir.TensorType(SHORT))
        graph.register_initializer(short[scale])
    back.replace_input_with(1, short[scale])
    value.type = ir.TensorType(SHORT)
    there = codes.producer()
    if there is not None and there.op_type == "QuantizeLinear" and there.inputs[0] is not None:
        there.replace_input_with(0, _shortened(graph, there.inputs[0], there, short))
        there.replace_input_with(1, short[scale])
    return True


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
