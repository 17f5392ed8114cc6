"""Nodes that change nothing go, and those that only look like it stay."""

import pytest

from support.graphs import check_rewrite
from tilewright.export.graph.rewrites.no_op import no_op

# graph, the operators that are left, how many nodes go
GRAPHS = {
    "a division by one and a product with one": (
        """g (float[n, 4] x) => (float[n, 4] y) <float one = {1}, float[1] first = {1}> {
            a = Div (x, one)
            b = Mul (first, a)
            y = Neg (b)
        }""",
        ["Neg"],
        2,
    ),
    "a sum with zero and a difference": (
        """g (float[n, 4] x) => (float[n, 4] y) <float zero = {0}> {
            a = Add (zero, x)
            b = Sub (a, zero)
            y = Neg (b)
        }""",
        ["Neg"],
        2,
    ),
    "one minus x, one over x and x times two stay": (
        """g (float[n, 4] x) => (float[n, 4] y) <float zero = {0}, float one = {1}, float two = {2}> {
            a = Sub (zero, x)
            b = Div (one, a)
            y = Mul (b, two)
        }""",
        ["Div", "Mul", "Sub"],
        0,
    ),
    "a product with one that adds an axis stays": (
        """g (float[n] x) => (float[1, n] y) <float[1, 1] one = {1}> {
            a = Mul (x, one)
            y = Neg (a)
        }""",
        ["Mul", "Neg"],
        0,
    ),
    "an Expand to the same sizes, but not to others": (
        """g (float[n, 4] x) => (float[m, n, 4] y) {
            to = Shape (x)
            a = Expand (x, to)
            two = Constant <value_ints = [2]> ()
            more = Concat <axis = 0> (two, to)
            y = Expand (a, more)
        }""",
        ["Concat", "Constant", "Expand", "Shape"],
        1,
    ),
    "a Transpose and its inverse": (
        """g (float[n, 3, 4, 5] x) => (float[n, 3, 4, 5] y) {
            a = Transpose <perm = [0, 2, 3, 1]> (x)
            b = Transpose <perm = [0, 3, 1, 2]> (a)
            y = Neg (b)
        }""",
        ["Neg"],
        1,
    ),
    "two Transposes that are one": (
        """g (float[n, 3, 4, 5] x) => (float[4, 5, n, 3] y) {
            a = Transpose <perm = [0, 2, 3, 1]> (x)
            b = Transpose <perm = [1, 2, 0, 3]> (a)
            y = Neg (b)
        }""",
        ["Neg", "Transpose"],
        0,
    ),
    "a Cast to the same type": (
        """g (float[n, 4] x) => (float[n, 4] y) {
            a = Cast <to = 1> (x)
            y = Neg (a)
        }""",
        ["Neg"],
        1,
    ),
    "a Slice of all, but not one that turns around": (
        """g (float[n, 4] x) => (float[n, 4] y)
        <int64[1] zero = {0}, int64[1] end = {4}, int64[1] axis = {1}, int64[1] last = {3}, int64[1] back = {-1},
         int64[1] before = {-9}> {
            a = Slice (x, zero, end, axis)
            y = Slice (a, last, before, axis, back)
        }""",
        ["Slice"],
        1,
    ),
    "a node that makes an output of the graph stays": (
        """g (float[n, 4] x) => (float[n, 4] y) <float one = {1}> { y = Mul (x, one) }""",
        ["Mul"],
        0,
    ),
}


@pytest.mark.parametrize(("text", "left", "count"), GRAPHS.values(), ids=GRAPHS)
def test_results_stay_and_nodes_go(text, left, count):
    check_rewrite(text, no_op, left, count, [{"n": 1}, {"n": 3}])
