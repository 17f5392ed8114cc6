"""Making weights plain initializers: a weight followed by Cast, Transpose or the like is computed once and stored.

Quantizers look for the weight of a MatMul among the initializers. In the portable graph a Transpose follows the weight,
because the graph reads the bytes of the user's files and does not copy them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

__all__ = ["MOVES", "computed", "fold_weights"]

MOVES = {"Cast", "Concat", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
Array = npt.NDArray[Any]


def fold_weights(
    model: ir.Model, read: Callable[[ir.Value], Array], store: Callable[[str, Array], ir.TensorProtocol]
) -> int:
    """Compute and store the moved weights, one at a time, and use the results; returns their number.

    `read` gives the numbers of an initializer. `store` writes an array and gives the tensor that refers to it.
    """
    graph: Any = model.graph
    moved = _moved(graph)
    ends = [v for v in moved if v.is_graph_output() or any(use.node.outputs[0] not in moved for use in v.uses())]
    for value in ends:
        sources = [v for v in _sources(value, moved) if isinstance(v.const_value, ir.ExternalTensor)]
        name = _free(graph, f"{sources[0].name}.folded")
        array = np.ascontiguousarray(computed(value, read, model.opset_imports[""]))
        tensor = store(name, array)
        folded = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(folded)
        for use in list(value.uses()):
            use.node.replace_input_with(use.idx, folded)
    _drop(graph, moved)
    return len(ends)


def _moved(graph: Any) -> dict[ir.Value, ir.Node]:
    """Every value that is a weight with its numbers moved or cast -> the node that computes it."""
    moved: dict[ir.Value, ir.Node] = {}
    for node in graph:
        inputs = [v for v in node.inputs if v is not None]
        constant = all(v in moved or v.is_initializer() for v in inputs)
        weight = any(v in moved or isinstance(v.const_value, ir.ExternalTensor) for v in inputs)
        if node.op_type in MOVES and not node.domain and constant and weight:
            moved |= dict.fromkeys(node.outputs, node)
    return {value: node for value, node in moved.items() if not any(o.is_graph_output() for o in node.outputs)}


def _sources(value: Any, moved: dict[ir.Value, ir.Node]) -> list[Any]:
    """The initializers that a value is computed from."""
    if value not in moved:
        return [value]
    return [source for v in moved[value].inputs if v is not None for source in _sources(v, moved)]


def computed(value: Any, read: Callable[[ir.Value], Array], opset: int) -> Array:
    """The numbers of a value that follows from initializers alone. `read` gives the numbers of an initializer."""
    if (node := value.producer()) is None:
        return read(value)
    inputs = {str(v.name): computed(v, read, opset) for v in node.inputs if v is not None}
    results: Any = ReferenceEvaluator(ir.to_proto(node), opsets={"": opset}).run(None, inputs)
    return np.asarray(results[node.outputs.index(value)])


def _free(graph: Any, name: str) -> str:
    number, used = 1, graph.initializers
    while (free := name if number == 1 else f"{name}.{number}") in used:
        number += 1
    return free


def _drop(graph: Any, moved: dict[ir.Value, ir.Node]) -> None:
    """Remove nodes that are not needed any more, and the weights that only they read."""
    nodes = dict.fromkeys(moved.values())
    sources = {v for node in nodes for v in node.inputs if v is not None and v.is_initializer()}
    graph.remove(list(nodes), safe=True)
    for value in sources:
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[value.name]
