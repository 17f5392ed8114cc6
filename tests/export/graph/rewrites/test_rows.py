"""Work on single tokens is done on matrices, and its results stay."""

import numpy as np
import pytest

from support.graphs import check_rewrite
from tilewright.export.graph.rewrites.rows import rows

GAIN = ", ".join(f"{v:.4f}" for v in np.random.default_rng(0).normal(size=6))
INITIALIZERS = f"float[6] gain = {{{GAIN}}}, float two = {{2}}, int64[1] six = {{6}}"
# x [n, m, 6] is made from a matrix; the values between have names for their sizes, as the exporter writes them
HEAD = f"""g (float[k, 6] matrix, float[n, m, 6] other, float[n, 1, 1] scale, float[n, 1, 6] shift)
    => (float[n, m, 6] y) <{INITIALIZERS}, float[n, m, 6] x, float[n, m, 6] a, float[n, m, 6] b> {{
        leading = Shape <start = 0, end = -1> (other)
        sizes = Concat <axis = 0> (leading, six)
        x = Reshape (matrix, sizes)
"""
BEFORE = ["Concat", "Reshape", "Shape"]

# the rest of the graph, the operators that are left besides those before, the number of nodes
GRAPHS = {
    "an activation": ("a = Gelu (x)\n y = Neg (a)", ["Gelu", "Neg"], 1),
    "a normalization": ("a = LayerNormalization <axis = -1> (x, gain)\n y = Neg (a)", ["LayerNormalization", "Neg"], 1),
    "a normalization along the last axis by number": (
        "a = RMSNormalization <axis = 2> (x, gain)\n y = Neg (a)",
        ["Neg", "RMSNormalization"],
        1,
    ),
    "a product with one number for each channel, and with one": (
        "a = Mul (gain, x)\n b = Mul (a, two)\n y = Neg (b)",
        ["Mul", "Mul", "Neg"],
        2,
    ),
    "a sum with itself": ("a = Add (x, x)\n y = Neg (a)", ["Add", "Neg"], 1),
    "a sum with another value": ("a = Add (other, x)\n y = Neg (a)", ["Add", "Neg", "Reshape"], 1),
    "a product with a number for each image": (
        "a = Mul (x, scale)\n b = Sub (a, x)\n y = Neg (b)",
        ["Concat", "Expand", "Mul", "Neg", "Reshape", "Sub"],
        2,
    ),
    "a sum with a row for each image stays": ("a = Add (x, shift)\n y = Neg (a)", ["Add", "Neg"], 0),
    "halves of every token": (
        "p, q = Split <axis = 2, num_outputs = 2> (x)\n a = Concat <axis = 2> (q, p)\n y = Neg (a)",
        ["Concat", "Concat", "Neg", "Reshape", "Split"],
        1,
    ),
    "halves of the tokens stay": (
        "p, q = Split <axis = 1, num_outputs = 2> (x)\n a = Concat <axis = 1> (q, p)\n y = Neg (a)",
        ["Concat", "Neg", "Split"],
        0,
    ),
    "an output of the graph stays": ("y = Neg (x)", ["Neg"], 0),
}


@pytest.mark.parametrize(("rest", "left", "count"), GRAPHS.values(), ids=GRAPHS)
def test_results_stay(rest, left, count):
    check_rewrite(
        HEAD + rest + "}", rows, sorted([*left, *BEFORE]), count, [{"n": 1, "m": 4, "k": 4}, {"n": 3, "m": 2, "k": 6}]
    )
