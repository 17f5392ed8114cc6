"""Rotary positions as one node.

A library writes x * cos + (-b, a) * sin for heads x [B, H, N, D] whose halves are a and b. The two tables [N, D] are
one of [N, D / 2] twice, side by side. RotaryEmbedding reads [B, N, D / 2].
"""

from typing import Any

import onnx_ir as ir

from tilewright.export.graph.sizes import constant, sizes_of, static

__all__ = ["rotary"]


def rotary(model: ir.Model) -> int:
    """Rewrite in place, after `split`; returns the number of new nodes. Nodes without readers stay."""
    tables: dict[tuple[Any, ...], ir.Value] = {}
    return sum(_rewrite(model.graph, node, tables) for node in list(model.graph) if _is(node, "Add"))


def _is(node: Any, kind: str) -> bool:
    return node is not None and node.op_type == kind and not node.domain


def _rewrite(graph: ir.Graph, add: ir.Node, tables: dict[tuple[Any, ...], ir.Value]) -> bool:
    inputs: Any = add.inputs
    products: list[Any] = [value.producer() for value in inputs]
    if not all(_is(product, "Mul") for product in products):
        return False
    for plain, turned in (products, products[::-1]):
        for x, cos in _both_ways(plain):
            for swapped, sin in _both_ways(turned):
                half = _half(cos, "Cos")
                sizes = sizes_of(x)
                if half is None or half is not _half(sin, "Sin") or not _swaps(swapped, x) or sizes is None:
                    continue
                if len(sizes) != 4 or sizes[2:] != sizes_of(cos):
                    continue
                both = [_table(graph, add, kind, half, x, tables) for kind in ("Cos", "Sin")]
                new = ir.node("RotaryEmbedding", [x, *both], num_outputs=1)
                graph.insert_before(add, new)
                old, value = add.outputs[0], new.outputs[0]
                value.shape, value.type = old.shape, old.type
                value.name, old.name = old.name, None
                old.replace_all_uses_with(value, replace_graph_outputs=True)
                graph.remove(add, safe=True)
                return True
    return False


def _both_ways(node: Any) -> list[Any]:
    return [tuple(node.inputs), tuple(node.inputs[::-1])]


def _half(table: Any, kind: str) -> Any:
    """The angles [N, D / 2], if a table is the cosine or sine of these angles twice."""
    function = table.producer()
    twice: Any = function.inputs[0].producer() if _is(function, kind) else None
    if _is(twice, "Concat") and len(twice.inputs) == 2 and twice.attributes["axis"].as_int() in (-1, 1):
        return twice.inputs[0] if twice.inputs[0] is twice.inputs[1] else None
    repeats = static(twice.inputs[1]) if _is(twice, "Tile") else None
    return twice.inputs[0] if repeats is not None and repeats.tolist() == [1, 2] else None


def _swaps(value: Any, x: Any) -> bool:
    """Whether a value is (-b, a), for the halves a and b of the last axis of x."""
    concat = value.producer()
    if not _is(concat, "Concat") or len(concat.inputs) != 2 or concat.attributes["axis"].as_int() not in (-1, 3):
        return False
    negative, a = concat.inputs[0].producer(), concat.inputs[1]
    halves = a.producer()
    if not _is(negative, "Neg") or not _is(halves, "Split") or halves.inputs[0] is not x or len(halves.outputs) != 2:
        return False
    first, second = halves.outputs
    equal = sizes_of(first) is not None and sizes_of(first) == sizes_of(second)
    last = halves.attributes.get_int("axis", 0) in (-1, 3)
    return a is first and negative.inputs[0] is second and equal and last


def _table(
    graph: ir.Graph, before: ir.Node, kind: str, half: Any, x: Any, tables: dict[tuple[Any, ...], ir.Value]
) -> ir.Value:
    """The cosines or sines of angles, for every image of x."""
    images = sizes_of(x)[0]  # type: ignore[index]
    if (key := (kind, half, images)) not in tables:
        number, long = len(tables), ir.TensorType(ir.DataType.INT64)
        function = ir.node(kind, [half], num_outputs=1)
        batch = ir.node("Shape", [x], attributes={"start": 0, "end": 1}, num_outputs=1)
        target = ir.node("Concat", [batch.outputs[0], constant(graph, [1, 1])], attributes={"axis": 0}, num_outputs=1)
        expand = ir.node("Expand", [function.outputs[0], target.outputs[0]], num_outputs=1)
        graph.insert_before(before, [function, batch, target, expand])
        shapes = ((function, half.shape), (expand, ir.Shape([images, *half.shape])))
        for node, shape in shapes:
            node.outputs[0].shape, node.outputs[0].type = shape, half.type
        for node, length in ((batch, 1), (target, 3)):
            node.outputs[0].shape, node.outputs[0].type = ir.Shape([length]), long
        for i, node in enumerate((function, batch, target, expand)):
            node.outputs[0].name = f"rotary_{number}.{i}"
        tables[key] = expand.outputs[0]
    return tables[key]
