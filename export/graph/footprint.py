"""The working memory of a graph as a function of the tile's size and of the number of tiles in a call.

Shapes in a graph are expressions of the free sizes. They are evaluated for two sizes, and a walk in the order of
execution counts the most bytes alive at once; a line over the number of pixels goes through the two results. The
scores of attention grow with the square of the pixels and are added. The sum is an upper bound, since the two need not
peak together.
"""

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from tilewright.kernels.face import DOMAIN
from tilewright.runtime.bundle.manifest import Memory

__all__ = ["footprint", "peak_alive"]

SAME_MEMORY = {"Reshape", "Squeeze", "Unsqueeze"}
BLOCK = 16  # channels that a convolution computes at once
OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}
FUNCTIONS: dict[str, Callable[..., float]] = {
    "Max": max,
    "Min": min,
    "CeilToInt": math.ceil,
    "FloatTrueDiv": operator.truediv,
    "ToFloat": float,
}


def footprint(model: ir.Model, sizes_at: Callable[[int], Mapping[str, int]]) -> Memory:
    """The memory a graph needs. `sizes_at(side)` gives the free sizes for a square of this side in output pixels."""
    small, large = 256**2, 1024**2
    alive = [peak_alive(model, sizes_at(side)) for side in (256, 1024)]
    both = peak_alive(model, {**sizes_at(256), "batch": 2})
    per_px = (alive[1] - alive[0]) / (large - small)
    constant = max(0, alive[0] - round(per_px * small))
    per_tile = min(constant, max(0, both - alive[0] - round(per_px * small)))
    at_small, at_large = (max(_scores(node, sizes_at(side)) for node in model.graph) for side in (256, 1024))
    if at_small == at_large:  # the engine's tiles have a fixed size
        return Memory(constant - per_tile, per_tile + at_large, _short(per_px), 0.0, _copied(model))
    return Memory(constant - per_tile, per_tile, _short(per_px), _short(at_large / large**2), _copied(model))


def _copied(model: ir.Model) -> int:
    """Bytes of the weights of convolutions. ONNX Runtime keeps them in another order, for the CPU's registers."""
    weights = {weight for node in model.graph for weight in _convolved(model, node) if weight.is_initializer()}
    return sum(4 * int(np.prod(weight.shape.numpy())) for weight in weights if weight.shape is not None)


def _convolved(model: ir.Model, node: ir.Node) -> Iterator[ir.Value]:
    """The weights of the convolutions in a node."""
    if node.op_type == "Conv" and node.domain == "":
        weight = node.inputs[1]
        if weight is not None:
            yield weight
    elif function := model.functions.get(node.op_identifier()):
        inputs = list(function.inputs)
        for inner in function:
            for weight in _convolved(model, inner):
                outer = node.inputs[inputs.index(weight)] if weight in inputs else None
                if outer is not None:
                    yield outer


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def peak_alive(model: ir.Model, sizes: Mapping[str, int]) -> int:
    """The most bytes of activations alive at once, for these values of the free sizes."""
    nodes = list(model.graph)
    last_use = {_block(value): i for i, node in enumerate(nodes) for value in node.inputs if value is not None}
    outputs = {_block(value) for value in model.graph.outputs}
    held = partial(_held, sizes=sizes)
    alive = sum(_bytes(value, sizes) for value in model.graph.inputs)
    peak = alive
    for i, node in enumerate(nodes):
        alive += sum(held(value) for value in node.outputs if _block(value) is value)
        peak = max(peak, alive + _inside(node, sizes))
        blocks = {_block(v) for v in (*node.inputs, *node.outputs) if v is not None}
        ended = {block for block in blocks if last_use.get(block, i) == i} - outputs
        alive -= sum(held(value) for value in ended if value.producer() is not None)
    return peak


def _block(value: ir.Value) -> ir.Value:
    """The value in whose memory a value lies. A Reshape copies nothing."""
    producer = value.producer()
    while producer is not None and producer.op_type in SAME_MEMORY and producer.inputs[0] is not None:
        value = producer.inputs[0]
        producer = value.producer()
    return value


def _held(value: ir.Value, sizes: Mapping[str, int]) -> int:
    """Bytes of a value. ONNX Runtime pads the channels that a convolution writes, to fill the CPU's registers."""
    producer, size = value.producer(), _bytes(value, sizes)
    if producer is None or producer.op_type != "Conv" or len(shape := _shape(value, sizes)) != 4 or not shape[1]:
        return size
    return size // shape[1] * (-(-shape[1] // BLOCK) * BLOCK)


def _inside(node: ir.Node, sizes: Mapping[str, int]) -> int:
    """Bytes inside one of our nodes while its function runs: as many as its inputs and outputs, and all scores."""
    if node.domain != DOMAIN:
        return 0
    again = sum(_bytes(value, sizes) for value in (*node.inputs, *node.outputs) if value is not None)
    if not node.op_type.startswith("Codebook"):
        return again
    chosen, codebook = node.outputs[0], node.inputs[-1]
    return again + int(np.prod(_shape(chosen, sizes), dtype=np.float64)) * _shape(codebook, sizes)[1] * 4


def _scores(node: ir.Node, sizes: Mapping[str, int]) -> int:
    """Bytes of attention's scores while it runs."""
    if node.domain == DOMAIN and node.op_type == "JointAttention":
        text, image = (_shape(node.inputs[i], sizes) for i in (0, 3))
        return 4 * text[0] * text[1] * (text[2] + image[2]) ** 2
    if node.op_type != "Attention":
        return 0
    query, key = (_shape(value, sizes) for value in node.inputs[:2])
    if "q_num_heads" in node.attributes:  # on tokens, whose channels are those of all heads
        return (
            4 * node.attributes["q_num_heads"].as_int() * math.prod(query[:2]) * key[1] if query[1:] and key[1:] else 0
        )
    return 4 * query[0] * query[1] * query[2] * key[2] if len(query) == len(key) == 4 else 0


def _bytes(value: ir.Value, sizes: Mapping[str, int]) -> int:
    if value.is_initializer() or value.dtype is None:
        return 0
    return int(np.prod(_shape(value, sizes), dtype=np.float64) * value.dtype.itemsize)


def _shape(value: ir.Value | None, sizes: Mapping[str, int]) -> list[int]:
    if value is None or value.shape is None:
        return [0]  # a value inside one decomposed operator; only the values around it count
    return [d if isinstance(d, int) else _evaluate(str(d.value), sizes) for d in value.shape]


def _evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    def value_of(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](value_of(node.operand))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return FUNCTIONS[node.func.id](*map(value_of, node.args))
        raise KeyError(ast.dump(node))

    try:
        return int(value_of(ast.parse(expression, mode="eval").body))
    except (KeyError, SyntaxError):
        return 0  # the size depends on values, not on the picture
