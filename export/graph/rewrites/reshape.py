"""Reshapes without arithmetic: the target is a constant, and of several in a row one is left.

The exporter computes the sizes of a Reshape's result, one node for each size. In most cases the result has the same
sizes as the input in some places, numbers in others, and one size that is left over: [0, 0, 4, 8] or [-1, 16, 32].
"""

from typing import Any

import onnx_ir as ir

from tilewright.export.graph.sizes import constant, sizes_of, static, target_of

__all__ = ["reshape"]

KINDS = {"Reshape", "Squeeze", "Unsqueeze"}


def reshape(model: ir.Model) -> int:
    """Rewrite the nodes in place; returns the number of those that changed. Nodes without readers stay."""
    shapes: dict[tuple[Any, ...], ir.Value] = {}  # computed sizes, and numbers after them -> the value that holds both
    return sum(_rewrite(model.graph, node, shapes) for node in list(model.graph) if _is_one(node))


def _is_one(node: ir.Node | None) -> bool:
    return node is not None and node.op_type in KINDS and not node.domain


def _rewrite(graph: ir.Graph, node: ir.Node, shapes: dict[tuple[Any, ...], ir.Value]) -> bool:
    output, result = node.outputs[0], sizes_of(node.outputs[0])
    if result is None:
        return False
    source: Any = node.inputs[0]
    while _is_one(source.producer()):  # a value before, as far back as one Reshape leads from
        before = source.producer().inputs[0]
        sizes = sizes_of(before)
        if sizes is None or (sizes != result and target_of(sizes, result) is None):
            break
        source = before
    sizes = sizes_of(source)
    if sizes == result and not output.is_graph_output():
        output.replace_all_uses_with(source)
        graph.remove(node, safe=True)
        return True
    joined = source is not node.inputs[0]
    target = None if sizes is None else target_of(sizes, result)
    if target is None or (node.op_type != "Reshape" and not joined):
        return False
    shape = constant(graph, target)
    if (before := _computed(source)) is not None and 0 not in target[before[1] :]:
        leading, axes = before
        if target[:axes] == [0] * axes:  # the sizes that were computed for the Reshape before, and others after them
            key = (leading, *target[axes:])
            if key not in shapes:
                parts = [leading, constant(graph, target[axes:])]
                concat = ir.node("Concat", parts, attributes={"axis": 0}, num_outputs=1)
                graph.insert_before(node, concat)
                shapes[key] = concat.outputs[0]
                shapes[key].shape, shapes[key].type = ir.Shape([len(target)]), leading.type
            shape, source = shapes[key], source.producer().inputs[0]
    if node.op_type == "Reshape" and node.inputs[1] is shape and not joined and "allowzero" not in node.attributes:
        return False
    new = ir.node("Reshape", [source, shape], num_outputs=1)
    graph.insert_before(node, new)
    value = new.outputs[0]
    value.shape, value.type = output.shape, output.type
    value.name, output.name = output.name, None
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True


def _computed(value: Any) -> tuple[Any, int] | None:
    """The leading sizes of a value, as the Reshape that made it computes them with one number more; and their count."""
    node = value.producer()
    concat = node.inputs[1].producer() if _is_one(node) and node.op_type == "Reshape" else None
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2 or static(concat.inputs[1]) is None:
        return None
    sizes = sizes_of(concat.inputs[0])
    return (concat.inputs[0], int(sizes[0])) if sizes is not None and isinstance(sizes[0], int) else None
