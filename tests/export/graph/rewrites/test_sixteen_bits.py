"""Products compute in bfloat16 or float16, and nothing else does."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from support.graphs import numbers, parsed
from tilewright.export.graph.rewrites.sixteen_bits import TYPES, in_16_bits

W = ", ".join(f"{v:.4f}" for v in np.random.default_rng(0).normal(size=16))
HEAD = f"g (float[n, 4] x) => (float[n, 4] y) <float[4, 4] w = {{{W}}}, float[4] b = {{1, 2, 3, 4}}> {{ "
GRAPHS = {  # the nodes, the products, and the operators afterwards
    "a product": ("y = MatMul (x, w)", 1, ["Cast", "Cast", "MatMul", "Cast"]),
    "a product and a norm": (
        "a = MatMul (x, w)\n s = Softmax (a)\n y = Gemm (s, w, b)",
        2,
        ["Cast", "Cast", "MatMul", "Cast", "Softmax", "Cast", "Cast", "Gemm", "Cast"],
    ),
    "two products in a row": (  # what lies between them is not widened and narrowed again
        "a = MatMul (x, w)\n y = MatMul (a, w)",
        2,
        ["Cast", "Cast", "MatMul", "MatMul", "Cast"],
    ),
    "one input of two products": (
        "a = MatMul (x, w)\n c = MatMul (x, w)\n y = Add (a, c)",
        2,
        ["Cast", "Cast", "MatMul", "Cast", "MatMul", "Cast", "Add"],
    ),
    "sums": ("a = Add (x, b)\n y = Sin (a)", 0, ["Add", "Sin"]),
}


def read_operators(model: ir.Model) -> list[str]:
    read = {v for node in model.graph for v in node.inputs} | set(model.graph.outputs)
    return [node.op_type for node in model.graph if any(v in read for v in node.outputs)]


@pytest.mark.parametrize(("precision", "bits"), [("bfloat16", 8), ("float16", 11)])
@pytest.mark.parametrize(("text", "products", "left"), GRAPHS.values(), ids=GRAPHS)
def test_products_and_nothing_else_are_in_16_bits(text, products, left, precision, bits):
    before, after = parsed(HEAD + text + "}"), parsed(HEAD + text + "}")
    assert in_16_bits(after, precision) == products and sorted(read_operators(after)) == sorted(left)
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(after), strict_mode=True)
    onnx.checker.check_model(proto, full_check=True)
    feed = numbers(before, {"n": 3})
    (exact,), (short,) = (ReferenceEvaluator(ir.to_proto(m)).run(None, feed) for m in (before, after))
    error = np.linalg.norm(short - exact) / np.linalg.norm(exact)
    assert (0 < error < 2.0 ** (2 - bits)) if products else error == 0
    assert short.dtype == exact.dtype == np.float32


def test_it_has_nothing_to_do_a_second_time():
    model = parsed(HEAD + "y = MatMul (x, w) }")
    assert in_16_bits(model, "bfloat16") == 1 and in_16_bits(model, "bfloat16") == 0


def test_tables_of_angles_stay_in_float32_and_codebooks_too():
    text = """<ir_version: 10, opset_import: ["" : 23, "tilewright" : 1]>
        g (float[1, n, 4] x, float[4, 4] w, float[n, 2] cos, float[n, 2] sin, float[8, 4] book) => (float[1, n, 4] y) {
            q = tilewright.QkvNormRope_without_c (x, w, cos, sin)
            y = tilewright.CodebookNearest (q, book)
        }
        <domain: "tilewright", opset_import: ["" : 23]> QkvNormRope_without_c (x, w, cos, sin) => (q) {
            q = MatMul (x, w)
        }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    node = model.graph[0]
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    assert in_16_bits(model, "bfloat16") == 1
    node = next(n for n in model.graph if n.op_type.startswith("Qkv"))
    assert [v.dtype for v in node.inputs] == [ir.DataType.BFLOAT16] * 2 + [ir.DataType.FLOAT] * 2
    codebook = next(n for n in model.graph if n.op_type == "CodebookNearest")
    assert [v.dtype for v in codebook.inputs] == [ir.DataType.FLOAT] * 2


@pytest.mark.parametrize("precision", TYPES)
def test_behind_quantised_numbers_the_scale_becomes_short_and_no_cast_stands_before_the_product(precision):
    text = """g (float[n, 4] x) => (float[n, 4] y) <float s = {0.02}, int8 z = {0},
        float[4] t = {0.01, 0.02, 0.03, 0.04},
        int8[4, 4] w = {9, 1, -7, 3, 5, -2, 4, 8, -6, 2, 7, 1, 3, -9, 6, 5}> {
            q = QuantizeLinear (x, s, z)
            b = DequantizeLinear (q, s, z)
            v = DequantizeLinear <axis = 1> (w, t)
            a = MatMul (b, v)
            c = MatMul (b, v)
            y = Add (a, c)
        }"""
    before, after = parsed(text), parsed(text)
    assert in_16_bits(after, precision) == 2
    assert sorted(read_operators(after)) == sorted(
        ["Cast", "QuantizeLinear", *["DequantizeLinear"] * 2, *["MatMul", "Cast"] * 2, "Add"]
    )
    for node in after.graph:
        if node.op_type.endswith("uantizeLinear"):
            assert node.inputs[1].dtype == TYPES[precision]
        if node.op_type == "MatMul":
            assert [value.producer().op_type for value in node.inputs] == ["DequantizeLinear"] * 2
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(ir.to_proto(after), strict_mode=True), full_check=True)
    feed = numbers(before, {"n": 3})
    (exact,), (short,) = (ReferenceEvaluator(ir.to_proto(m)).run(None, feed) for m in (before, after))
    assert 0 < np.linalg.norm(short - exact) / np.linalg.norm(exact) < 2**-5
