"""Fold constants and shapes, merge equal nodes, drop dead nodes. Weights are not touched."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    OutputFixPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants

from tilewright.kernels.face import DOMAIN

__all__ = ["fold"]

ROUNDS = 4
LARGEST_INPUT, LARGEST_RESULT = 8_192, 65_536  # elements; larger constants are cheaper to compute than to store


def fold(model: ir.Model) -> None:
    """Simplify a graph in place. Weights keep their names and their references."""
    weights = {n: v for n, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}
    references = {name: value.const_value for name, value in weights.items()}
    # a pass that sees a value reads it, and may store a transposed copy
    for value in weights.values():
        value.const_value = None
    InlinePass(lambda function: function.domain != DOMAIN)(model)
    for _ in range(ROUNDS):
        with np.errstate(all="ignore"):  # the unused branch of a Where may divide by zero
            folded = fold_constants(
                model, onnx_shape_inference=True, input_size_limit=LARGEST_INPUT, output_size_limit=LARGEST_RESULT
            )
        Sequential(IdentityEliminationPass(), RemoveUnusedNodesPass())(model)
        if not folded.modified:
            break
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _merge_constants(model.graph)
    Sequential(
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
        OutputFixPass(),
        NameFixPass(),
    )(model)
    for name, value in model.graph.initializers.items():
        if name in references:
            value.const_value = references[name]


def _merge_constants(graph: ir.Graph) -> None:
    """Keep one of equal small constants, so that equal nodes have equal inputs."""
    kept: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.size > LARGEST_INPUT or value.is_graph_output():
            continue
        array = tensor.numpy()
        first = kept.setdefault((tensor.dtype, array.shape, array.tobytes()), value)
        if first is not value:
            value.replace_all_uses_with(first)
            del graph.initializers[name]
