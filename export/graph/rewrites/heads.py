"""Attention on tokens [B, N, H * D] instead of heads [B, H, N, D], for backends that need no copies for it.

The exporter reshapes and transposes queries, keys, values and the result. ONNX Runtime on the CPU reads the heads where
they lie among the channels. TensorRT takes heads only, so this is not for every target.
"""

from typing import Any

import onnx_ir as ir

from tilewright.export.graph.sizes import constant, sizes_of

__all__ = ["heads"]

TO_HEADS = [0, 2, 1, 3]  # and back


def heads(model: ir.Model) -> int:
    """Rewrite in place; returns the number of Attentions that changed. Nodes without readers stay."""
    return sum(_rewrite(model.graph, node) for node in list(model.graph) if node.op_type == "Attention")


def _rewrite(graph: ir.Graph, attention: ir.Node) -> bool:
    inputs: Any = attention.inputs
    output = attention.outputs[0]
    sources = [_transposed(value) for value in inputs[:3]]
    readers = [use.node for use in output.uses()]
    extra = any(v is not None for v in inputs[4:]) or any(
        v.uses() or v.is_graph_output() for v in attention.outputs[1:]
    )
    if None in sources or extra or output.is_graph_output() or not all(_transposed(n.outputs[0]) for n in readers):
        return False
    sizes = [sizes_of(source) for source in sources]
    if any(s is None or not isinstance(s[2], int) or not isinstance(s[3], int) for s in sizes):
        return False
    tokens, counts = [], [int(s[2]) for s in sizes]  # type: ignore[index]
    for source, s in zip(sources, sizes, strict=True):
        width = int(s[2]) * int(s[3])  # type: ignore[index]
        tokens.append(_reshaped(graph, attention, source, [0, 0, width], [*s[:2], width]))  # type: ignore[index]
    numbers = {"q_num_heads": counts[0], "kv_num_heads": counts[1]}
    new = ir.node("Attention", [*tokens, *inputs[3:4]], attributes=dict(attention.attributes), num_outputs=1)
    for name, number in numbers.items():
        new.attributes[name] = ir.AttrInt64(name, number)
    graph.insert_before(attention, new)
    result, last = new.outputs[0], int(sizes[2][3])  # type: ignore[index]
    first = sizes[0]
    assert first is not None
    result.type, result.shape = output.type, ir.Shape([*first[:2], counts[0] * last])
    apart = _reshaped(graph, attention, result, [0, 0, counts[0], last], [*first[:2], counts[0], last])
    for reader in readers:
        old = reader.outputs[0]
        old.replace_all_uses_with(apart)
    graph.remove([*readers, attention], safe=True)
    return True


def _transposed(value: Any) -> Any:
    """The tokens with heads [B, N, H, D] behind a value [B, H, N, D], or the other way round."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Transpose" or value.is_graph_output():
        return None
    return node.inputs[0] if list(node.attributes["perm"].as_ints()) == TO_HEADS else None


def _reshaped(graph: ir.Graph, before: ir.Node, value: Any, target: list[int], sizes: list[Any]) -> ir.Value:
    node = ir.node("Reshape", [value, constant(graph, target)], num_outputs=1)
    graph.insert_before(before, node)
    node.outputs[0].type, node.outputs[0].shape = value.type, ir.Shape(sizes)
    return node.outputs[0]
