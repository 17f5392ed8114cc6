"""Slices that together are a whole axis become one Split."""

from itertools import pairwise
from typing import Any

import onnx_ir as ir

from tilewright.export.graph.sizes import constant, sizes_of, static

__all__ = ["split"]


def split(model: ir.Model) -> int:
    """Rewrite in place; returns the number of new nodes."""
    parts: dict[tuple[Any, int], dict[tuple[int, int], ir.Node]] = {}
    for node in model.graph:
        if (part := _part(node)) is not None:
            value, axis, start, end = part
            parts.setdefault((value, axis), {})[start, end] = node
    new = 0
    for (value, axis), nodes in parts.items():
        ends = sorted(nodes)
        whole = ends[0][0] == 0 and ends[-1][1] == sizes_of(value)[axis]  # type: ignore[index]
        if len(ends) > 1 and whole and all(a[1] == b[0] for a, b in pairwise(ends)):
            _replace(model.graph, value, axis, [(end - start, nodes[start, end]) for start, end in ends])
            new += 1
    return new


def _part(node: ir.Node) -> tuple[Any, int, int, int] | None:
    """What a Slice with step 1 along one axis of known size takes: the value, the axis, its start and its end."""
    if node.op_type != "Slice" or node.domain or len(node.inputs) < 4 or node.outputs[0].is_graph_output():
        return None
    numbers = [static(value) for value in node.inputs[1:]]
    sizes = sizes_of(node.inputs[0])
    if sizes is None or any(n is None or n.size != 1 for n in numbers):
        return None
    start, end, axis, *step = (int(n.item()) for n in numbers if n is not None)
    axis %= len(sizes)
    size = sizes[axis]
    if not isinstance(size, int) or step not in ([], [1]):
        return None
    start, end = (max(0, n + size if n < 0 else min(n, size)) for n in (start, end))
    return (node.inputs[0], axis, start, end) if start < end else None


def _replace(graph: ir.Graph, value: ir.Value, axis: int, parts: list[tuple[int, ir.Node]]) -> None:
    lengths = constant(graph, [length for length, _ in parts])
    new = ir.node("Split", [value, lengths], attributes={"axis": axis}, num_outputs=len(parts))
    places = {node: i for i, node in enumerate(graph)}
    graph.insert_before(min((node for _, node in parts), key=places.__getitem__), new)
    for output, (_, node) in zip(new.outputs, parts, strict=True):
        old = node.outputs[0]
        output.shape, output.type = old.shape, old.type
        output.name, old.name = old.name, None
        old.replace_all_uses_with(output)
        graph.remove(node, safe=True)
