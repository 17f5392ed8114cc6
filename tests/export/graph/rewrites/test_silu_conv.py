"""Norm, SiLU, convolution and residual as one node: what is taken, what is left, and that it means the same."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tilewright.export.graph.rewrites.group_norm import group_norm
from tilewright.export.graph.rewrites.silu_conv import silu_conv

BLOCK = """
    n = GroupNormalization <num_groups = 2> (x, weight, shift)
    s = Sigmoid (n)
    o = Mul ({silu})
    c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [{stride}, {stride}], dilations = [1, 1]>
        (o, kernel{bias})
    {last}
"""
VARIANTS = {
    "bias": ({"bias": ", bias"}, "SiluConv_without_residual"),
    "residual": ({"bias": ", bias", "last": "y = Add (x, c)"}, "SiluConv"),
    "residual first": ({"last": "y = Add (c, x)"}, "SiluConv_without_bias"),
    "neither": ({}, "SiluConv_without_bias_residual"),
    "gate first": ({"silu": "s, n"}, "SiluConv_without_bias_residual"),
    "the sum of two is no residual of one size": (
        {"last": "r = ReduceMean <keepdims = 1> (x) y = Add (r, c)"},
        "SiluConv_without_bias_residual",
    ),
}
LEFT = {
    "a stride": {"stride": 2},
    "what the norm gives is read again": {"last": "y = Add (n, c)"},
    "what SiLU gives is read again": {"last": "y = Add (o, c)"},
    "a square is no SiLU": {"silu": "s, s"},
}


def graph(**changes: object) -> ir.Model:
    words = {"silu": "n, s", "stride": 1, "bias": "", "last": "y = Identity (c)"} | changes
    random = np.random.default_rng(0)
    shapes = {"weight": (4,), "shift": (4,), "kernel": (4, 4, 3, 3), "bias": (4,)}
    values = {name: random.normal(size=shape) for name, shape in shapes.items()}
    dims = {name: ", ".join(map(str, shape)) for name, shape in shapes.items()}
    given = ", ".join(
        f"float[{dims[name]}] {name} = {{{', '.join(f'{v:.6f}' for v in values[name].ravel())}}}" for name in shapes
    )
    text = f"""
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[b, 4, h, w] x) => (float[b, 4, p, q] y) <{given}, float[b, 4, h, w] c> {{ {BLOCK.format(**words)} }}
    """
    return ir.from_proto(onnx.parser.parse_model(text))


def run(model: ir.Model) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": np.random.default_rng(1).normal(size=(2, 4, 6, 5)).astype(np.float32)})[0]


@pytest.mark.parametrize(("changes", "name"), VARIANTS.values(), ids=VARIANTS)
def test_the_block_is_one_node_that_gives_the_same(changes, name):
    expected = run(graph(**changes))
    model = graph(**changes)
    assert group_norm(model) == 1 and silu_conv(model) == 1
    (node,) = [node for node in model.graph if node.domain == "tilewright"]
    assert node.op_type == name and None not in node.inputs
    assert not {"Conv", "Sigmoid"} & {node.op_type for node in model.graph}
    np.testing.assert_allclose(run(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", LEFT.values(), ids=LEFT)
def test_what_is_something_else_is_left_as_it_is(changes):
    model = graph(**changes)
    group_norm(model)
    before = [node.op_type for node in model.graph]
    assert silu_conv(model) == 0 and [node.op_type for node in model.graph] == before
