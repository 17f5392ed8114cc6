"""Work that sees one token at a time, done on a matrix with a row for each token.

`linear` gives its result the axes that its input had, [B, N, C]. An activation, a sum or a LayerNormalization does not
need them. Here it reads the matrix [B * N, C], and the Reshape comes after it. Before the next Gemm two Reshapes meet,
and `reshape` removes both.
"""

from typing import Any

import onnx_ir as ir

from tilewright.export.graph.sizes import Sizes, constant, rows_of, sizes_of, static

__all__ = ["rows"]

ONE = {"Abs", "Cast", "Erf", "Exp", "Gelu", "Neg", "Relu", "Sigmoid", "Sqrt", "Tanh"}
TWO = {"Add", "Div", "Mul", "Sub"}
LAST_AXIS = {"LayerNormalization": -1, "RMSNormalization": -1, "Split": 0}  # and the axis where they name none


def rows(model: ir.Model) -> int:
    """Rewrite in place; returns the number of nodes that read a matrix now. Reshapes without readers stay."""
    scales: dict[tuple[Any, Sizes], ir.Value] = {}
    return sum(_rewrite(model.graph, node, scales) for node in list(model.graph) if not node.domain)


def _rewrite(graph: ir.Graph, node: ir.Node, scales: dict[tuple[Any, Sizes], ir.Value]) -> bool:
    spread = next((v for v in node.inputs if _matrix(v) is not None), None)
    sizes = sizes_of(spread)
    if spread is None or sizes is None or any(v.is_graph_output() for v in node.outputs):
        return False
    new: list[ir.Node] = []
    if node.op_type in TWO and sizes_of(node.outputs[0]) == sizes:
        matrices = [_operand(graph, value, spread, new, scales) for value in node.inputs]
        if None in matrices:
            return False
    elif spread is node.inputs[0] and (node.op_type in ONE or _along_last_axis(node, len(sizes))):
        matrices = [_matrix(spread), *node.inputs[1:]]
    else:
        return False
    graph.insert_before(node, new)
    for i, value in enumerate(matrices):
        node.replace_input_with(i, value)
    if "axis" in node.attributes:
        node.attributes["axis"] = ir.AttrInt64("axis", 1)
    for value in node.outputs:
        _spread(graph, node, value, spread)
    return True


def _matrix(value: Any) -> Any:
    """The matrix [B * N, C] that a value [B, N, C] was made from, or none."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Reshape" or node.domain:
        return None
    before, after = sizes_of(node.inputs[0]), sizes_of(value)
    if before is None or after is None or len(before) != 2 or len(after) < 3:
        return None
    return node.inputs[0] if isinstance(after[-1], int) and before[1] == after[-1] else None


def _along_last_axis(node: ir.Node, rank: int) -> bool:
    if node.op_type not in LAST_AXIS or (
        any(v.name and v.uses() for v in node.outputs[1:]) and node.op_type != "Split"
    ):
        return False
    return node.attributes.get_int("axis", LAST_AXIS[node.op_type]) in (-1, rank - 1)


def _operand(
    graph: ir.Graph, value: Any, spread: ir.Value, new: list[ir.Node], scales: dict[tuple[Any, Sizes], ir.Value]
) -> Any:
    """A value with which the matrix gives the same result as `spread` with this one, or none."""
    wanted, sizes = sizes_of(spread), sizes_of(value)
    if wanted is None or sizes is None:
        return None
    if sizes in ((), (1,), wanted[-1:]):
        return value
    if (matrix := _matrix(value)) is not None and sizes == wanted:
        return matrix

    def op(kind: str, inputs: list[Any], sizes: Sizes, dtype: Any, **attributes: int) -> ir.Value:
        new.append(ir.node(kind, inputs, attributes=attributes, num_outputs=1))
        result = new[-1].outputs[0]
        result.shape, result.type = ir.Shape(sizes), dtype
        return result

    if sizes == wanted:
        return op("Reshape", [value, constant(graph, [-1, int(wanted[-1])])], (rows_of(wanted), wanted[-1]), value.type)
    if sizes == (wanted[0], *[1] * (len(wanted) - 1)):  # a number for each image: as many as tokens
        if (value, wanted[:-1]) not in scales:
            long = ir.TensorType(ir.DataType.INT64)
            leading = _leading(spread) or op("Shape", [spread], (len(wanted) - 1,), long, start=0, end=-1)
            target = op("Concat", [leading, constant(graph, [1])], (len(wanted),), long, axis=0)
            each = op("Expand", [value, target], (*wanted[:-1], 1), value.type)
            flat = op("Reshape", [each, constant(graph, [-1, 1])], (rows_of(wanted), 1), value.type)
            scales[value, wanted[:-1]] = flat
        return scales[value, wanted[:-1]]
    return None


def _leading(spread: Any) -> Any:
    """A value that holds the sizes of all axes but the last, if the Reshape that made `spread` reads one."""
    concat = spread.producer().inputs[1].producer()
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2:
        return None
    sizes = sizes_of(concat.inputs[0])
    return concat.inputs[0] if sizes == (len(spread.shape) - 1,) else None


def _spread(graph: ir.Graph, node: ir.Node, value: ir.Value, spread: Any) -> None:
    """Let the readers of a node's output read it with the axes of `spread`."""
    full, uses = sizes_of(value), list(value.uses())
    if full is None or not uses:
        return
    width, target = int(full[-1]), spread.producer().inputs[1]
    numbers, nodes = static(target), []
    if numbers is not None:
        target = constant(graph, [*map(int, numbers[:-1]), width])
    elif full != sizes_of(spread):
        if (leading := _leading(spread)) is None:
            nodes.append(ir.node("Shape", [spread], attributes={"start": 0, "end": -1}, num_outputs=1))
            leading = nodes[0].outputs[0]
        nodes.append(ir.node("Concat", [leading, constant(graph, [width])], attributes={"axis": 0}, num_outputs=1))
        target = nodes[-1].outputs[0]
        target.shape, target.type = ir.Shape([len(full)]), ir.TensorType(ir.DataType.INT64)
    nodes.append(ir.node("Reshape", [value, target], num_outputs=1))
    graph.insert_after(node, nodes)
    back = nodes[-1].outputs[0]
    back.shape, back.type = value.shape, value.type
    value.shape = ir.Shape([rows_of(full), width])
    back.name, value.name = value.name, f"{value.name}.rows"
    for use in uses:
        use.node.replace_input_with(use.idx, back)
