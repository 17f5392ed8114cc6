"""Matrix products, convolutions and attention in bfloat16 or float16, and everything else in float32.

There are Casts between them. A backend that takes types as they are written fuses the Casts into its kernels. Norms,
sums and angles keep the digits that the short type has not. Choices from a codebook stay in float32 too.

A product in 8 bits reads numbers behind DequantizeLinear. A Cast there would keep TensorRT from fusing them, so the
scale becomes short, as the result has the type of the scale.
"""

from typing import Any

import onnx_ir as ir

from tilewright.kernels.face import DOMAIN

__all__ = ["TYPES", "in_16_bits"]

PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"}
OURS = ("ConcatProject", "JointAttention", "QkvNormRope")
TABLES = {"cos", "sin"}  # inputs of ours that may stay in float32
FLOAT = ir.DataType.FLOAT
TYPES = {"bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16}


def in_16_bits(model: ir.Model, precision: str) -> int:
    """Rewrite a graph in place, and return the number of nodes that compute in this short type now."""
    shortened, count = _Shortened(model.graph, TYPES[precision]), 0
    for node in list(shortened.graph):
        if not _short(node):
            continue
        formal = _names(model, node)
        wide = [
            (i, value)
            for i, value in enumerate(node.inputs)
            if value is not None and _type(value) == FLOAT and formal.get(i) not in TABLES
        ]
        if not wide and all(_type(value) != FLOAT for value in node.outputs):
            continue
        count += 1
        for i, value in wide:
            if not shortened.dequantised(value, node):
                node.replace_input_with(i, shortened.cast(value, node))
        for value in [value for value in node.outputs if _type(value) == FLOAT]:
            shortened.widen(node, value)
    return count


class _Shortened:
    """A graph whose products compute in a short type."""

    def __init__(self, graph: Any, kind: ir.DataType) -> None:
        self.graph, self.kind = graph, kind
        self.short: dict[ir.Value, ir.Value] = {}  # a value -> the same one in the short type

    def cast(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """The Cast of a value, which all its readers share."""
        if value not in self.short:
            self.short[value] = _cast(value, self.kind, self._named(value.name))
            cast, producer = self.short[value].producer(), value.producer()
            if producer is None:
                self.graph.insert_before(before, cast)
            else:
                self.graph.insert_after(producer, cast)
        return self.short[value]

    def dequantised(self, value: ir.Value, before: ir.Node) -> bool:
        """Give a DequantizeLinear, and the QuantizeLinear before it, a short scale; whether the value comes from one.

        All readers of the value must compute in the short type.
        """
        back = value.producer()
        if back is None or back.op_type != "DequantizeLinear" or not all(_short(use.node) for use in value.uses()):
            return False
        scale, codes = back.inputs[1], back.inputs[0]
        numbers = None if scale is None else ir.convenience.get_const_tensor(scale)
        if scale is None or codes is None or numbers is None:
            return False
        if scale not in self.short:
            tensor = ir.tensor(numbers.numpy().astype(self.kind.numpy()), name=self._named(scale.name))
            new = ir.Value(name=tensor.name, const_value=tensor, shape=scale.shape, type=ir.TensorType(self.kind))
            self.graph.register_initializer(new)
            self.short[scale] = new
        back.replace_input_with(1, self.short[scale])
        value.type = ir.TensorType(self.kind)
        there = codes.producer()
        if there is not None and there.op_type == "QuantizeLinear" and there.inputs[0] is not None:
            there.replace_input_with(0, self.cast(there.inputs[0], there))
            there.replace_input_with(1, self.short[scale])
        return True

    def widen(self, node: ir.Node, value: ir.Value) -> None:
        """Let a node write the short type, and all readers of its value read a Cast of it."""
        name, uses = value.name, tuple(value.uses())
        wide = _cast(value, FLOAT, str(name))
        value.name, value.type = self._named(name), ir.TensorType(self.kind)
        for use in uses:
            use.node.replace_input_with(use.idx, wide)
        for i, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[i] = wide
        self.graph.insert_after(node, wide.producer())
        self.short[wide] = value

    def _named(self, name: str | None) -> str:
        return f"{name}.{self.kind.name.lower()}"


def _short(node: ir.Node) -> bool:
    return (node.domain in ("", "ai.onnx") and node.op_type in PRODUCTS) or (
        node.domain == DOMAIN and node.op_type.startswith(OURS)
    )


def _names(model: ir.Model, node: ir.Node) -> dict[int, str]:
    """The inputs of one of our nodes by place, as its function names them."""
    function = model.functions.get(node.op_identifier())
    return {} if function is None else {i: str(value.name) for i, value in enumerate(function.inputs)}


def _type(value: ir.Value) -> ir.DataType | None:
    return value.dtype if value.dtype is not None or value.const_value is None else value.const_value.dtype


def _cast(value: ir.Value, kind: ir.DataType, name: str) -> ir.Value:
    node = ir.node("Cast", [value], attributes={"to": kind.value}, num_outputs=1)
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(kind)
    return node.outputs[0]
