"""GroupNormalization as two reductions and one scale and shift, for backends without a kernel for it.

ONNX Runtime on the CPU runs the operator's function: normalise, reshape, scale and shift, each over the whole
activation. Here only two reductions, a multiplication and an addition read the whole activation:

    y = x * a + b    with a = weight / sqrt(var + eps), b = bias - mean * a, var = E[x^2] - E[x]^2
"""

from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["group_norm"]


def group_norm(model: ir.Model) -> int:
    """Rewrite every GroupNormalization in place; returns their number."""
    nodes = [node for node in model.graph if node.op_type == "GroupNormalization"]
    for number, node in enumerate(nodes):
        _rewrite(model.graph, node, f"group_norm_{number}")
    return len(nodes)


def _rewrite(graph: ir.Graph, node: ir.Node, prefix: str) -> None:
    inputs: Any = node.inputs
    x, weight, bias = inputs
    groups, epsilon = node.attributes["num_groups"].as_int(), node.attributes.get_float("epsilon", 1e-5)
    channels = int(weight.shape[0])
    nodes: list[ir.Node] = []

    def constant(name: str, values: list[float], dtype: type = np.int64) -> ir.Value:
        tensor = ir.tensor(np.array(values, dtype), name=f"{prefix}.{name}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(value)
        return value

    def op(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(kind, inputs, attributes=attributes, num_outputs=1))
        nodes[-1].outputs[0].name = f"{prefix}.{kind.lower()}_{len(nodes)}"
        return nodes[-1].outputs[0]

    # first rows, then groups: a running sum over the whole group of a 1024 px tile loses three digits
    row, rows = constant("row", [3]), constant("rows", [2])
    per_group = constant("per_group", [0, groups, -1, 1])
    mean = op("ReduceMean", op("Reshape", op("ReduceMean", x, row), per_group), rows)  # [B, G, 1, 1]
    of_rows = op("ReduceMean", op("Reshape", op("ReduceSumSquare", x, row), per_group), rows)
    square = op("Div", of_rows, op("Cast", op("Shape", x, start=3), to=ir.DataType.FLOAT.value))
    variance = op("Sub", square, op("Mul", mean, mean))
    least = constant("least", [0.0], np.float32)
    deviation = op("Sqrt", op("Add", op("Max", variance, least), constant("epsilon", [epsilon], np.float32)))
    split = constant("split", [1, groups, channels // groups, 1])
    scale = op("Div", op("Reshape", weight, split), deviation)  # [B, G, C/G, 1]
    shift = op("Sub", op("Reshape", bias, split), op("Mul", mean, scale))
    batch_channel = constant("batch_channel", [-1, channels, 1, 1])
    scaled = op("Mul", x, op("Reshape", scale, batch_channel))
    shifted = op("Add", scaled, op("Reshape", shift, batch_channel))
    output = node.outputs[0]
    for whole in (scaled, shifted):
        whole.shape, whole.type = output.shape, output.type
    shifted.name, output.name = output.name, None  # graph outputs are found by name
    graph.insert_before(node, nodes)
    output.replace_all_uses_with(shifted, replace_graph_outputs=True)
    graph.remove(node, safe=True)
