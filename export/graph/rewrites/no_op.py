"""Removing nodes that change nothing: x * 1, x + 0, an Expand to the same sizes, a Transpose and its inverse."""

from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.export.graph.sizes import sizes_of, static

__all__ = ["no_op"]

NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}


def no_op(model: ir.Model) -> int:
    """Remove the nodes in place; returns their number."""
    removed = 0
    for node in list(model.graph):
        if node.domain or len(node.outputs) != 1 or not node.inputs or node.inputs[0] is None:
            continue
        _join_transposes(node)
        source: Any = _unchanged(node)
        if source is None or node.outputs[0].is_graph_output():
            continue
        node.outputs[0].replace_all_uses_with(source)
        model.graph.remove(node, safe=True)
        removed += 1
    return removed


def _unchanged(node: ir.Node) -> ir.Value | None:
    """The input that the node's output equals, or none."""
    inputs: Any = node.inputs
    kind, output = node.op_type, node.outputs[0]
    if kind in NEUTRAL:
        sides = [(0, 1), (1, 0)] if kind in ("Add", "Mul") else [(0, 1)]
        for one, other in sides:
            numbers, sizes = static(inputs[other]), sizes_of(inputs[one])
            if numbers is None or sizes is None or numbers.size != 1 or numbers.ndim > len(sizes):
                continue
            if numbers.item() == NEUTRAL[kind]:
                return inputs[one]
    order = _order(node)
    same = sizes_of(inputs[0]) is not None and sizes_of(inputs[0]) == sizes_of(output)
    unchanged = (
        (kind == "Transpose" and order is not None and order == sorted(order))
        or (kind == "Concat" and len(inputs) == 1)
        or (kind == "Cast" and inputs[0].dtype == output.dtype is not None)
        or (kind == "Expand" and same)
        or (kind == "Slice" and same and _forward(node))
    )
    return inputs[0] if unchanged else None


def _forward(node: ir.Node) -> bool:
    steps = static(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
    return steps is not None and bool((steps == 1).all())


def _order(node: Any) -> list[int] | None:
    """The order of axes that a Transpose gives, if the node is one and says it."""
    is_one = node is not None and node.op_type == "Transpose" and not node.domain and "perm" in node.attributes
    return list(node.attributes["perm"].as_ints()) if is_one else None


def _join_transposes(node: Any) -> None:
    """Let a Transpose of a Transpose read the first one's input."""
    first = node.inputs[0].producer()
    outer, inner = _order(node), _order(first)
    if outer is not None and inner is not None:
        node.attributes["perm"] = ir.AttrInt64s("perm", [inner[axis] for axis in outer])
        node.replace_input_with(0, first.inputs[0])
