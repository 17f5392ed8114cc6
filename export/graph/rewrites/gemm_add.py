"""A sum with the result of a Gemm, done by the Gemm: a bias, or the other half of a low-rank update."""

from typing import Any

import onnx_ir as ir

from tilewright.export.graph.sizes import sizes_of

__all__ = ["gemm_add"]


def gemm_add(model: ir.Model) -> int:
    """Rewrite in place; returns the number of sums that went into a Gemm."""
    return sum(_rewrite(model.graph, node) for node in list(model.graph) if node.op_type == "Add" and not node.domain)


def _rewrite(graph: ir.Graph, add: ir.Node) -> bool:
    inputs: Any = add.inputs
    for product, term in (inputs, inputs[::-1]):
        gemm, sizes = product.producer(), sizes_of(product)
        if gemm is None or gemm.op_type != "Gemm" or len(gemm.inputs) != 2 or len(product.uses()) != 1:
            continue
        if product.is_graph_output() or sizes is None or sizes_of(term) not in (sizes, sizes[-1:]):
            continue
        new = ir.node("Gemm", [*gemm.inputs, term], attributes=gemm.attributes, num_outputs=1)
        graph.insert_before(add, new)
        old, value = add.outputs[0], new.outputs[0]
        value.shape, value.type = old.shape, old.type
        value.name, old.name = old.name, None
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        for node in (add, gemm):
            graph.remove(node, safe=True)
        return True
    return False
