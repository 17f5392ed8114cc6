"""Linear layers as a Gemm that reads the weight as it lies in the file.

The exporter writes MatMul(x, Transpose(weight)). Gemm has a flag for the transposition, and it takes matrices. So
Reshapes stand around it where x has more axes; `rows` removes most of them.
"""

from typing import Any

import onnx_ir as ir

from tilewright.export.graph.sizes import Sizes, constant, rows_of, sizes_of, target_of

__all__ = ["linear"]


def linear(model: ir.Model) -> int:
    """Rewrite in place; returns the number of new Gemms. The transpositions stay, without readers."""
    leading: dict[Sizes, ir.Value] = {}  # sizes of all axes before the last -> a value that holds them
    return sum(_rewrite(model.graph, node, leading) for node in list(model.graph) if node.op_type == "MatMul")


def _rewrite(graph: ir.Graph, product: ir.Node, leading: dict[Sizes, ir.Value]) -> bool:
    inputs: Any = product.inputs
    x, transposed = inputs
    transpose, sizes = transposed.producer(), sizes_of(x)
    if transpose is None or transpose.op_type != "Transpose" or sizes is None or len(sizes) < 2:
        return False
    weight = transpose.inputs[0]
    shape = sizes_of(weight)
    if shape is None or len(shape) != 2 or "perm" not in transpose.attributes:
        return False
    if list(transpose.attributes["perm"].as_ints()) != [1, 0] or not all(isinstance(d, int) for d in shape):
        return False
    outs, width = (int(d) for d in shape)
    nodes, old = [], product.outputs[0]

    def op(kind: str, inputs: list[ir.Value], sizes: Sizes, **attributes: int) -> ir.Value:
        nodes.append(ir.node(kind, inputs, attributes=attributes, num_outputs=1))
        value = nodes[-1].outputs[0]
        value.name, value.type, value.shape = f"{old.name}.{kind.lower()}_{len(nodes)}", old.type, ir.Shape(sizes)
        return value

    result, rows = (*sizes[:-1], outs), rows_of(sizes)
    flat = x if len(sizes) == 2 else op("Reshape", [x, constant(graph, [-1, width])], (rows, width))
    y = op("Gemm", [flat, weight], (rows_of(result), outs), transB=1)
    if len(sizes) > 2:
        target = target_of((rows, outs), result)
        if target is None and sizes[:-1] not in leading:
            leading[sizes[:-1]] = op("Shape", [x], (len(sizes) - 1,), start=0, end=-1)
            leading[sizes[:-1]].type = ir.TensorType(ir.DataType.INT64)
        if target is None:
            to = op("Concat", [leading[sizes[:-1]], constant(graph, [outs])], (len(sizes),), axis=0)
            to.type = ir.TensorType(ir.DataType.INT64)
        else:
            to = constant(graph, target)
        y = op("Reshape", [y, to], result)
    graph.insert_before(product, nodes)
    y.name, old.name = old.name, None
    old.replace_all_uses_with(y, replace_graph_outputs=True)
    graph.remove(product, safe=True)
    return True
