"""A graph cut into pieces that run one after another, so that a few tensors inside it can be looked at at a time.

Looked at are the numbers that enter linear layers, convolutions, attention and other products of two activations, also
in our own ops: an engine in 8 bits stores them as 8 bits. Values that follow from weights alone are computed in each
piece that reads them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx

__all__ = ["OURS_MULTIPLY", "Observed", "Piece", "multiplied_by", "observed_tensors", "piece_model", "pieces"]

OURS = "tilewright"
OURS_MULTIPLY = {  # op -> how many of its first inputs are multiplied by weights or by each other; the axis of channels
    "SiluConv": (1, 1),
    "ConcatProject": (2, -1),
    "QkvNormRope": (2, -1),
    "CodebookFromHidden": (1, -1),
    "JointAttention": (6, None),
}
Observed = dict[str, int | None]  # tensor -> the axis of its channels, if it meets weights that have as many rows


@dataclass(frozen=True)
class Piece:
    """Some nodes of a graph, in order."""

    nodes: tuple[onnx.NodeProto, ...]
    weights: frozenset[str]  # initializers that they read
    reads: tuple[str, ...]  # tensors of earlier pieces, and inputs of the graph
    writes: tuple[str, ...]  # tensors that are looked at, that later pieces read, or that the graph returns
    ended: frozenset[str]  # tensors that nothing reads after this piece


def observed_tensors(graph: onnx.GraphProto) -> Observed:
    """The tensors to look at, in the order in which they are first read."""
    fixed, observed = _fixed(graph), Observed()
    for node in graph.node:
        for place, axis in _entrances(node, fixed):
            if (tensor := node.input[place]) and tensor not in fixed:
                observed.setdefault(tensor, axis)
    return observed


def multiplied_by(graph: onnx.GraphProto) -> dict[tuple[str, int], list[str]]:
    """For each weight, the tensors that it is multiplied by, in order. A node may multiply several: 0, 1, ..."""
    fixed, tensors = _fixed(graph), dict[tuple[str, int], list[str]]()
    for node in graph.node:
        entering = [node.input[place] for place, _ in _entrances(node, fixed)]
        weights = _behind(graph, fixed, [name for name in node.input if name and name in fixed])[1] if entering else ()
        for weight in weights:
            for place, tensor in enumerate(entering):
                tensors.setdefault((weight, place), []).append(tensor)
    return tensors


def _entrances(node: onnx.NodeProto, fixed: Mapping[str, Any]) -> Iterator[tuple[int, int | None]]:
    """The inputs of a node that are looked at, each with the axis of its channels."""
    if node.domain == OURS:
        op = node.op_type.partition("_without_")[0]
        count, axis = OURS_MULTIPLY.get(op, (0, None))
        yield from ((place, axis) for place in range(count))
    elif node.domain:
        return
    elif node.op_type == "Attention":
        yield from ((place, None) for place in range(3))
    elif node.op_type in ("Conv", "ConvTranspose"):
        yield 0, 1 if node.input[1] in fixed else None
    elif node.op_type in ("MatMul", "Gemm"):
        turned = {a.name: a.i for a in node.attribute}
        yield 0, (-2 if turned.get("transA") else -1) if node.input[1] in fixed else None
        yield 1, (-1 if turned.get("transB") else -2) if node.input[0] in fixed else None


def pieces(graph: onnx.GraphProto, observed: Iterable[str], each: int) -> list[Piece]:
    """The pieces of a graph. A piece ends as soon as it has made so many of the observed tensors."""
    fixed, looked_at = _fixed(graph), set(observed)
    groups: list[list[onnx.NodeProto]] = [[]]
    made = 0
    for node in graph.node:
        if node.output[0] in fixed:
            continue
        if made >= each:
            groups.append([])
            made = 0
        groups[-1].append(node)
        made += len(looked_at & set(node.output))
    results = [value.name for value in graph.output]
    last_use = {name: place for place, nodes in enumerate(groups) for node in nodes for name in _reads(node)}
    last_use |= dict.fromkeys(results, len(groups))
    cut = []
    for place, nodes in enumerate(groups):
        outputs = {name for node in nodes for name in node.output if name}
        needed = {name for node in nodes for name in _reads(node)}
        returned = {name for name in results if name in fixed} if place == len(groups) - 1 else set[str]()
        before, weights = _behind(graph, fixed, needed | returned)
        writes = {name for name in outputs if name in looked_at or last_use.get(name, place) > place} | returned
        cut.append(
            Piece(
                (*before, *nodes),
                frozenset(weights),
                tuple(sorted(needed - outputs - fixed.keys())),
                tuple(sorted(writes)),
                frozenset(name for name in (needed | outputs) - fixed.keys() if last_use.get(name, place) <= place),
            )
        )
    return cut


def piece_model(model: onnx.ModelProto, piece: Piece, kinds: Mapping[str, int]) -> onnx.ModelProto:
    """A piece as a graph of its own. `kinds`: the ONNX types of the tensors that it reads."""
    known = {value.name: value for value in model.graph.input}
    inputs = [known.get(name) or onnx.helper.make_tensor_value_info(name, kinds[name], None) for name in piece.reads]
    outputs = [onnx.ValueInfoProto(name=name) for name in piece.writes]  # ONNX Runtime infers their types
    weights = [tensor for tensor in model.graph.initializer if tensor.name in piece.weights]
    graph = onnx.helper.make_graph(piece.nodes, model.graph.name, inputs, outputs, weights)
    return onnx.helper.make_model(
        graph, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version
    )


def _fixed(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto | None]:
    """The tensors that do not depend on the graph's inputs; those that are no weights with the node that makes them."""
    fixed: dict[str, onnx.NodeProto | None] = {tensor.name: None for tensor in graph.initializer}
    for node in graph.node:
        if all(name in fixed for name in _reads(node)):
            fixed |= dict.fromkeys(node.output, node)
    return fixed


def _behind(
    graph: onnx.GraphProto, fixed: Mapping[str, onnx.NodeProto | None], names: Iterable[str]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes and weights that these tensors follow from, as far as they do not depend on the graph's inputs."""
    todo, seen = list(names), set[str]()
    while todo:
        if (name := todo.pop()) in fixed and name not in seen:
            seen.add(name)
            node = fixed[name]
            todo += [] if node is None else _reads(node)
    nodes = [node for node in graph.node if seen.intersection(node.output) and node.output[0] in fixed]
    return nodes, {name for name in seen if fixed[name] is None}


def _reads(node: onnx.NodeProto) -> list[str]:
    """The tensors that a node reads, also inside its branches."""
    graphs = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    inside = []
    for graph in graphs:
        own = {value.name for value in (*graph.input, *graph.initializer)}
        own |= {name for inner in graph.node for name in inner.output}
        inside += [name for inner in graph.node for name in _reads(inner) if name not in own]
        inside += [value.name for value in graph.output if value.name not in own]
    return [name for name in (*node.input, *inside) if name]
