"""Leave shapes between a graph's ends to the tools that read it.

A tool infers them again, with names of its own for the free sizes. ONNX Runtime's quantizer turns weights around and
stops where a graph still says the shape that a weight had. Types stay: onnx infers none behind a GroupNormalization.
"""

import onnx_ir as ir

__all__ = ["forget_shapes"]


def forget_shapes(model: ir.Model) -> None:
    """Drop the shapes of all values but inputs and outputs; an initializer says its own."""
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    for value in model.graph.initializers.values():
        value.shape = value.type = None
