"""A Gemm does the sum that follows it."""

import numpy as np
import pytest

from support.graphs import check_rewrite
from tilewright.export.graph.rewrites.gemm_add import gemm_add

W = ", ".join(f"{v:.4f}" for v in np.random.default_rng(0).normal(size=20))
HEAD = f"""g (float[n, 4] x, float[n, 5] other, float[n, 1] column) => (float[n, 5] y)
    <float[5, 4] w = {{{W}}}, float[5] bias = {{1, 2, 3, 4, 5}}, float[5] more = {{5, 4, 3, 2, 1}}> {{
        a = Gemm <transB = 1> (x, w)
"""

# the rest of the graph, the operators that are left, the number of sums
GRAPHS = {
    "a bias": ("y = Add (a, bias)", ["Gemm"], 1),
    "a bias in front": ("b = Add (bias, a)\n y = Neg (b)", ["Gemm", "Neg"], 1),
    "a matrix": ("y = Add (other, a)", ["Gemm"], 1),
    "the matrix of another Gemm": (
        "b = Gemm <transB = 1> (x, w, bias)\n c = Neg (b)\n y = Add (a, c)",
        ["Gemm", "Gemm", "Neg"],
        1,
    ),
    "the second sum stays": ("b = Add (a, bias)\n y = Add (b, more)", ["Add", "Gemm"], 1),
    "a product that is read twice stays": ("b = Add (a, bias)\n y = Mul (a, b)", ["Add", "Gemm", "Mul"], 0),
    "a column stays": ("y = Add (a, column)", ["Add", "Gemm"], 0),
    "a difference stays": ("y = Sub (a, bias)", ["Gemm", "Sub"], 0),
}


@pytest.mark.parametrize(("rest", "left", "count"), GRAPHS.values(), ids=GRAPHS)
def test_results_stay(rest, left, count):
    check_rewrite(HEAD + rest + "}", gemm_add, left, count, [{"n": 1}, {"n": 3}])
