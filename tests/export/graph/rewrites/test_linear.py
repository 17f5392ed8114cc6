"""A product with a transposed weight is a Gemm that reads the weight as it lies."""

import numpy as np
import pytest

from support.graphs import check_rewrite, parsed
from tilewright.export.graph.rewrites.linear import linear

W = ", ".join(f"{v:.4f}" for v in np.random.default_rng(0).normal(size=20))
V = ", ".join(f"{v:.4f}" for v in np.random.default_rng(1).normal(size=20))
WEIGHTS = f"<float[5, 4] w = {{{W}}}, float[5, 4] v = {{{V}}}>"
PRODUCT = "t = Transpose <perm = [1, 0]> (w)\n y = MatMul (x, t)"

# graph, the operators that are left, the number of Gemms
GRAPHS = {
    "a matrix": (f"g (float[n, 4] x) => (float[n, 5] y) {WEIGHTS} {{ {PRODUCT} }}", ["Gemm"], 1),
    "one more axis of known size": (
        f"g (float[n, 3, 4] x) => (float[n, 3, 5] y) {WEIGHTS} {{ {PRODUCT} }}",
        ["Gemm", "Reshape", "Reshape"],
        1,
    ),
    "two free axes": (
        f"g (float[n, m, 4] x) => (float[n, m, 5] y) {WEIGHTS} {{ {PRODUCT} }}",
        ["Concat", "Gemm", "Reshape", "Reshape", "Shape"],
        1,
    ),
    "two products of values with the same sizes share the arithmetic": (
        f"""g (float[n, m, 4] x) => (float[n, m, 5] y) {WEIGHTS} {{
            t = Transpose <perm = [1, 0]> (w)
            a = MatMul (x, t)
            minus = Neg (x)
            s = Transpose <perm = [1, 0]> (v)
            b = MatMul (minus, s)
            y = Add (a, b)
        }}""",
        ["Add", "Concat", "Concat", "Gemm", "Gemm", "Neg", "Reshape", "Reshape", "Reshape", "Reshape", "Shape"],
        2,
    ),
    "a weight of two products": (
        f"""g (float[n, 4] x) => (float[n, 5] y) {WEIGHTS} {{
            t = Transpose <perm = [1, 0]> (w)
            a = MatMul (x, t)
            minus = Neg (x)
            b = MatMul (minus, t)
            y = Mul (a, b)
        }}""",
        ["Gemm", "Gemm", "Mul", "Neg"],
        2,
    ),
    "a stack of matrices stays": (
        """g (float[n, 3, 4] x, float[n, 5, 4] k) => (float[n, 3, 5] y) {
            t = Transpose <perm = [0, 2, 1]> (k)
            y = MatMul (x, t)
        }""",
        ["MatMul", "Transpose"],
        0,
    ),
    "a weight that is not transposed stays": (
        f"g (float[n, 5] x) => (float[n, 4] y) {WEIGHTS} {{ y = MatMul (x, w) }}",
        ["MatMul"],
        0,
    ),
}


@pytest.mark.parametrize(("text", "left", "count"), GRAPHS.values(), ids=GRAPHS)
def test_results_stay(text, left, count):
    check_rewrite(text, linear, left, count, [{"n": 1, "m": 5}, {"n": 3, "m": 2}])


def test_the_weight_is_read_as_it_lies():
    model = parsed(GRAPHS["two free axes"][0])
    weight = model.graph.initializers["w"]
    assert linear(model) == 1
    (gemm,) = (node for node in model.graph if node.op_type == "Gemm")
    assert gemm.inputs[1] is weight and gemm.attributes["transB"].as_int() == 1
