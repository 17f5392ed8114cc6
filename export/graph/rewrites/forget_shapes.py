"""Dropping the shapes of values inside a graph.

Tools infer these shapes themselves, with their own names for free sizes. ONNX Runtime's quantizer transposes weights
and fails if the graph still has the old shape of a weight. Types stay, as onnx infers none after a GroupNormalization.
"""

import onnx_ir as ir

__all__ = ["forget_shapes"]


def forget_shapes(model: ir.Model) -> None:
    """Drop the shapes of all values except inputs and outputs. The tensor of an initializer has its own shape."""
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    for value in model.graph.initializers.values():
        value.shape = value.type = None
