"""A graph with fewer nodes and the same results, for every target. Weights stay as they are in their files."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tilewright.export.graph.rewrites.fold import fold
from tilewright.export.graph.rewrites.gemm_add import gemm_add
from tilewright.export.graph.rewrites.linear import linear
from tilewright.export.graph.rewrites.no_op import no_op
from tilewright.export.graph.rewrites.reshape import reshape
from tilewright.export.graph.rewrites.rows import rows
from tilewright.export.graph.rewrites.split import split

__all__ = ["tidy"]


def tidy(model: ir.Model) -> None:
    """Fold a graph in place, and rewrite what every target runs faster or reads more easily."""
    fold(model)
    for rewrite in (no_op, reshape, split, linear, rows, gemm_add, reshape, no_op):
        rewrite(model)
        RemoveUnusedNodesPass()(model)  # a value with one reader may go, and a dead reader would count
    fold(model)
