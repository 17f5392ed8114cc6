"""Reshapes get constant targets and join, wherever one constant gives the sizes."""

import pytest

from support.graphs import check_rewrite
from tilewright.export.graph.rewrites.reshape import reshape

# graph, the operators that are left, how many nodes change, the targets of the Reshapes
GRAPHS = {
    "heads apart, by arithmetic": (
        """g (float[n, m, 12] x) => (float[n, m, 3, 4] y) {
            n = Shape <start = 0, end = 1> (x)
            m = Shape <start = 1, end = 2> (x)
            heads = Constant <value_ints = [3, 4]> ()
            to = Concat <axis = 0> (n, m, heads)
            y = Reshape <allowzero = 1> (x, to)
        }""",
        ["Reshape"],
        1,
        [[0, 0, 3, 4]],
    ),
    "heads together, next to tokens": (
        """g (float[n, m, 3, 4] x) => (float[n, m, 12] y) {
            n = Shape <start = 0, end = 1> (x)
            free = Constant <value_ints = [-1, 12]> ()
            to = Concat <axis = 0> (n, free)
            y = Reshape (x, to)
        }""",
        ["Reshape"],
        1,
        [[0, 0, 12]],
    ),
    "several in a row": (
        """g (float[n, 12] x) => (float[n, 3, 4, 1] y) <float[n, 6, 2] a, float[n, 3, 4] b> {
            first = Constant <value_ints = [0, 6, 2]> ()
            a = Reshape (x, first)
            second = Constant <value_ints = [0, 3, 4]> ()
            b = Reshape (a, second)
            last = Constant <value_ints = [3]> ()
            y = Unsqueeze (b, last)
        }""",
        ["Reshape"],
        3,
        [[0, 3, 4, 1]],
    ),
    "there and back": (
        """g (float[n, m, 12] x) => (float[n, m, 12] y) <float[n, m, 3, 4] a, float[n, m, 12] b> {
            first = Constant <value_ints = [0, 0, 3, 4]> ()
            a = Reshape (x, first)
            second = Constant <value_ints = [0, 0, 12]> ()
            b = Reshape (a, second)
            y = Neg (b)
        }""",
        ["Neg"],
        2,
        [],
    ),
    "two sizes that are left over need their arithmetic": (
        """g (float[k, 12] x, float[n, m] like) => (float[n, m, 12] y) {
            sizes = Shape (like)
            width = Constant <value_ints = [12]> ()
            to = Concat <axis = 0> (sizes, width)
            y = Reshape (x, to)
        }""",
        ["Concat", "Constant", "Reshape", "Shape"],
        0,
        [],
    ),
    "two sizes that were computed for the Reshape before": (
        """g (float[k, 12] x, float[n, m] like) => (float[n, m, 3, 4] y)
        <float[n, m, 12] a, int64[1] width = {12}> {
            sizes = Shape (like)
            to = Concat <axis = 0> (sizes, width)
            a = Reshape (x, to)
            heads = Constant <value_ints = [0, 0, 3, 4]> ()
            y = Reshape (a, heads)
        }""",
        ["Concat", "Reshape", "Shape"],
        1,
        [],
    ),
    "one Unsqueeze stays": (
        """g (float[n, 12] x) => (float[n, 12, 1] y) {
            last = Constant <value_ints = [2]> ()
            y = Unsqueeze (x, last)
        }""",
        ["Constant", "Unsqueeze"],
        0,
        [],
    ),
}


@pytest.mark.parametrize(("text", "left", "count", "targets"), GRAPHS.values(), ids=GRAPHS)
def test_the_target_is_a_constant(text, left, count, targets):
    sizes = [{"n": 1, "m": 5, "k": 5}, {"n": 3, "m": 2, "k": 6}]
    model = check_rewrite(text, reshape, left, count, sizes)
    constants = [node.inputs[1].const_value for node in model.graph if node.op_type == "Reshape"]
    assert [tensor.numpy().tolist() for tensor in constants if tensor is not None] == targets
