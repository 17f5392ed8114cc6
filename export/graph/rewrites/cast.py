"""Weights stored in another type than the graph computes in: a Cast after each of them."""

from typing import Any

import onnx_ir as ir

__all__ = ["cast"]


def cast(model: ir.Model) -> None:
    """Give every weight the type of its bytes, and cast it to the type of its use."""
    graph: Any = model.graph
    place = {node: i for i, node in enumerate(graph)}
    for name, weight in list(graph.initializers.items()):
        stored, computed = weight.const_value.dtype, weight.dtype
        if not isinstance(weight.const_value, ir.ExternalTensor) or stored == computed:
            continue
        first = min(
            (use.node for use in weight.uses()), key=place.__getitem__
        )  # late, so that few casts are alive at once
        node = ir.node("Cast", [weight], attributes={"to": computed.value}, num_outputs=1)
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = f"{name}.cast", weight.shape, computed
        weight.replace_all_uses_with(node.outputs[0])
        node.replace_input_with(0, weight)
        graph.insert_before(first, node)
        weight.dtype = stored
