"""One node for group norm's scale and shift, SiLU, a 3x3 convolution and a residual; it has a native kernel.

    y = conv3x3(silu(x * scale + shift)) + bias + residual         stride 1, zeros around SiLU's result

Without the kernel, the node's function runs the original operators.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tilewright.export.graph.ops import give_function
from tilewright.kernels.face import DOMAIN, Face

__all__ = ["FACE", "silu_conv"]

PLAIN = {"strides": [1, 1], "dilations": [1, 1], "pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}


def _body(inputs: frozenset[str]) -> str:
    bias = "bias" if "bias" in inputs else '""'
    return f"""
        scaled = Mul(x, scale)
        shifted = Add(scaled, shift)
        gate = Sigmoid(shifted)
        open = Mul(shifted, gate)
        {"summed" if "residual" in inputs else "y"} = Conv<pads = [1, 1, 1, 1]>(open, weight, {bias})
        {"y = Add(residual, summed)" if "residual" in inputs else ""}
    """


FACE = Face("SiluConv", ("x", "scale", "shift", "weight", "bias?", "residual?"), ("y",), _body)


def silu_conv(model: ir.Model) -> int:
    """Rewrite a graph in place, after `group_norm`; returns the number of new nodes."""
    convolutions = [node for node in model.graph if node.op_type == "Conv" and _is_plain(node)]
    return sum(_rewrite(model, node) for node in convolutions)


def _is_plain(node: ir.Node) -> bool:
    attributes, weight = node.attributes, node.inputs[1]
    sizes = {name: list(attributes[name].as_ints()) for name in PLAIN if name in attributes}
    of_floats = weight is not None and weight.dtype == ir.DataType.FLOAT
    return sizes == PLAIN and attributes.get_int("group", 1) == 1 and of_floats


def _rewrite(model: ir.Model, conv: ir.Node) -> bool:
    matched = _scale_and_shift(conv)
    if matched is None:
        return False
    output, inputs, last = conv.outputs[0], [*matched, *conv.inputs[1:]], conv
    uses = list(output.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not output.is_graph_output():
        last = uses[0].node
        other: Any = last.inputs[1 - uses[0].idx]
        if other.shape != output.shape:
            last = conv
        else:
            inputs += [*[None] * (5 - len(inputs)), other]
    old = last.outputs[0]
    node = ir.node(FACE.name, inputs, domain=DOMAIN, num_outputs=1)
    new = node.outputs[0]
    new.shape, new.type = old.shape, old.type
    model.graph.insert_before(last, node)
    give_function(model, node, FACE)
    new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    RemoveUnusedNodesPass()(model)
    return True


def _scale_and_shift(conv: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x, scale and shift, if the convolution is the only reader of silu(x * scale + shift)."""
    product = _producer(conv.inputs[0], "Mul", 1)
    for shifted, gate in _both_ways(product):
        add, sigmoid = _producer(shifted, "Add", 2), _producer(gate, "Sigmoid", 1)
        if add is None or sigmoid is None or sigmoid.inputs[0] is not shifted:
            continue
        for scaled, shift in _both_ways(add):
            for x, scale in _both_ways(_producer(scaled, "Mul", 1)):
                if _a_channel_each(scale) and _a_channel_each(shift):
                    return x, scale, shift
    return None


def _producer(value: Any, kind: str, uses: int) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type == kind and len(value.uses()) == uses else None


def _both_ways(node: ir.Node | None) -> list[Any]:
    return [] if node is None else [node.inputs, node.inputs[::-1]]


def _a_channel_each(value: Any) -> bool:
    """Whether a value is [B, C, 1, 1], as `group_norm` makes scale and shift."""
    node = value.producer()
    shape = node.inputs[1].const_value if node is not None and node.op_type == "Reshape" else None
    return shape is not None and bool(np.array_equal(shape.numpy()[2:], [1, 1]) and shape.numpy()[0] == -1)
