"""Rules about QuantizeLinear (Q) and DequantizeLinear (DQ): what TensorRT fuses, and what it refuses."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from tilewright.export.lint.graph import Complaint, Graph, dims, type_of
from tilewright.export.lint.table import TABLE

__all__ = ["attention_all_or_none", "one_eight_bit_type", "quantize_linear", "weights_directly"]

QDQ = {"QuantizeLinear", "DequantizeLinear"}
BETWEEN = {"Cast", "Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}  # operator -> the place of its weight


def quantize_linear(graph: Graph) -> Iterator[Complaint]:
    """Every Q and DQ is symmetric, has constant positive scales of a fitting type and shape, and stands in a pair."""
    for node in graph.nodes:
        if node.op_type in QDQ and not node.domain:
            before = _quantize(node)
            told = before is not None and before.inputs[1:] == node.inputs[1:]  # both share scale and zero point
            faults = [] if told else [*_zero_point(graph, node), *_scale(graph, node)]
            for fault in (*faults, *_pairing(node)):
                yield Complaint(*fault, node)


def _place(node: ir.Node, i: int) -> ir.Value | None:
    return node.inputs[i] if i < len(node.inputs) else None


def _quantized_type(node: ir.Node) -> str | None:
    """The type of the quantized values of a Q or DQ."""
    if node.op_type == "DequantizeLinear":
        return type_of(node.inputs[0])
    zero = type_of(_place(node, 2))
    return zero or type_of(node.outputs[0])


def _zero_point(graph: Graph, node: ir.Node) -> Iterator[tuple[str, str]]:
    kind, zero = _quantized_type(node), _place(node, 2)
    if kind is not None and kind not in TABLE.quantized:
        yield f"it quantizes to {kind}, and TensorRT to {', '.join(sorted(TABLE.quantized))}", "use INT8 or FP8"
    if zero is not None:
        numbers = graph.array(zero)
        if numbers is None:
            yield f"its zero point {zero.name!r} is computed", "give a zero point of zeros as a constant, or none"
        elif np.any(numbers.astype(np.float32) != 0):
            yield f"its zero point {zero.name!r} is not zero", "quantize symmetrically: the zero point must be 0"


def _scale(graph: Graph, node: ir.Node) -> Iterator[tuple[str, str]]:
    x, scale = node.inputs[:2]
    if scale is None or x is None:
        return
    numbers = graph.array(scale)
    if numbers is None:
        yield f"its scale {scale.name!r} is computed", "calibrate, and give the scale as a constant"
        return
    values = numbers.astype(np.float32)
    if not np.all(np.isfinite(values) & (values > 0)):
        yield f"its scale {scale.name!r} is not positive", "calibrate again: a scale must be finite and above 0"
    quantize = _quantize(node)
    origin = x if quantize is None else quantize.inputs[0]
    if numbers.size > 1 and origin not in graph.constants:
        yield f"an activation has {numbers.size} scales", "quantize activations with one scale for the tensor"
    elif numbers.size > 1 and numbers.ndim == 1:
        yield from _channels(node, dims(x), numbers.size)
    if node.op_type == "QuantizeLinear" and type_of(x) in ("FP16", "BF16") and type_of(scale) != type_of(x):
        yield f"its scale is {type_of(scale)}, and its input {type_of(x)}", f"store the scale as {type_of(x)}"
    yield from _opset(graph, node, type_of(scale), numbers.ndim)


def _quantize(node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear before a DequantizeLinear."""
    if node.op_type == "QuantizeLinear" or node.inputs[0] is None:
        return None
    producer = node.inputs[0].producer()
    return producer if producer is not None and producer.op_type == "QuantizeLinear" else None


def _channels(node: ir.Node, shape: list[int | None] | None, scales: int) -> Iterator[tuple[str, str]]:
    """A weight has a scale for each of its output channels."""
    if shape is None:
        return
    axis = _axis(node, len(shape))
    if shape[axis] not in (None, scales):
        yield f"its {scales} scales do not fit axis {axis} of {shape[axis]}", "give a scale for each output channel"
        return
    for use in node.outputs[0].uses():
        reader = use.node
        if reader.domain or WEIGHTED.get(reader.op_type) != use.idx:
            continue
        if reader.op_type == "Conv" or (reader.op_type == "Gemm" and reader.attributes.get_int("transB", 0) == 1):
            outputs = 0
        else:
            outputs = len(shape) - 1 if reader.op_type == "MatMul" else 1
        if axis != outputs:
            yield (
                f"its scales are for axis {axis} of a weight whose output channels are axis {outputs}",
                f"give a scale for each output channel, with axis {outputs}",
            )


def _axis(node: ir.Node, rank: int) -> int:
    axis = node.attributes.get_int("axis", 1)
    return (1 if axis is None else axis) % max(1, rank)


def _opset(graph: Graph, node: ir.Node, scale: str | None, rank: int) -> Iterator[tuple[str, str]]:
    kind, typed = _quantized_type(node), "output_dtype" in node.attributes
    needed = 19 if scale in ("FP16", "BF16") or kind == "FP8" else 13
    if kind in ("INT4", "FP4") or rank > 1 or (typed and node.op_type == "QuantizeLinear"):
        needed = 21
    if typed and node.op_type == "DequantizeLinear":
        needed = 23
    if graph.opset < needed:
        yield f"it needs opset {needed}, and the graph is of {graph.opset}", f"export the graph in opset {needed}"


def _pairing(node: ir.Node) -> Iterator[tuple[str, str]]:
    others = [use.node for use in node.outputs[0].uses() if use.node.op_type != "DequantizeLinear"]
    if node.op_type == "QuantizeLinear" and others:
        yield (
            f"its result goes to {others[0].op_type}, and not to a DequantizeLinear",
            "place QuantizeLinear and DequantizeLinear next to each other",
        )


def weights_directly(graph: Graph) -> Iterator[Complaint]:
    """A DQ feeds its matrix product or convolution directly, and biases are not quantized."""
    for node in graph.nodes:
        if node.domain:
            continue
        if node.op_type in WEIGHTED:
            for i in (0, 1):
                if passed := _passed(_place(node, i)):
                    yield Complaint(
                        f"a {passed.op_type} is between DequantizeLinear and {node.op_type}, so they do not fuse",
                        "store the weight as it is read" if i else f"move the {passed.op_type} before QuantizeLinear",
                        passed,
                    )
            bias = _place(node, 2)
            producer = bias.producer() if bias is not None else None
            if producer is not None and producer.op_type == "DequantizeLinear":
                yield Complaint("its bias is quantized", "keep biases in the graph's own type", node)


def _passed(value: ir.Value | None) -> ir.Node | None:
    """The node that moves or casts a dequantized value before its reader, if there is one."""
    first = value.producer() if value is not None else None
    node = first
    while node is not None and node.op_type in BETWEEN and not node.domain and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    dequantized = node is not None and node.op_type == "DequantizeLinear" and node is not first
    return first if dequantized else None


def one_eight_bit_type(graph: Graph) -> Iterator[Complaint]:
    """A network is INT8 or FP8: GPUs before Blackwell refuse both in one."""
    first: dict[str, ir.Node] = {}
    for node in graph.nodes:
        if node.op_type in QDQ and not node.domain and (kind := _quantized_type(node)) in ("INT8", "FP8"):
            first.setdefault(str(kind), node)
    if len(first) == 2:
        kind, node = list(first.items())[1]
        yield Complaint(
            f"it is {kind}, and {next(iter(first))} is used before; GPUs before Blackwell take one of them",
            "quantize the whole graph to one type",
            node,
        )


def attention_all_or_none(graph: Graph) -> Iterator[Complaint]:
    """Of an attention Q, K, V and the result of Softmax are quantized, or none: otherwise it does not fuse."""
    for node in graph.nodes:
        if node.domain:
            continue
        if node.op_type == "Attention":
            parts = {name: _place(node, i) for i, name in enumerate("QKV")}
        elif node.op_type == "Softmax" and (found := _matrix_products(node)):
            scores, mixed, weights = found
            parts = {"Q": scores.inputs[0], "K": scores.inputs[1], "V": mixed.inputs[1], "Softmax": weights}
        else:
            continue
        quantized = [name for name, value in parts.items() if _dequantized(value)]
        if 0 < len(quantized) < len(parts):
            rest = ", ".join(name for name in parts if name not in quantized)
            yield Complaint(
                f"{', '.join(quantized)} of its attention is quantized, and {rest} is not, so it does not fuse",
                "quantize all of Q, K, V and the result of Softmax, or none",
                node,
            )


def _dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _matrix_products(softmax: ir.Node) -> tuple[ir.Node, ir.Node, ir.Value] | None:
    """The products before and after a Softmax, and the value that goes into the second."""
    before = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
    while before is not None and before.op_type in ("Add", "Cast", "Div", "Mul", "Where"):
        products = [v.producer() for v in before.inputs if v is not None]
        before = next((p for p in products if p is not None and p.op_type not in ("Constant", "Shape")), None)
    value = softmax.outputs[0]
    for _ in range(2):
        reader = next((use.node for use in value.uses()), None)
        if reader is None or reader.op_type not in QDQ:
            break
        value = reader.outputs[0]
    after = next((use.node for use in value.uses() if use.node.op_type == "MatMul" and use.idx == 0), None)
    if before is None or before.op_type != "MatMul" or after is None:
        return None
    return before, after, value
