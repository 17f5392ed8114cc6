"""Rotary positions are one node, with the results of the many."""

import pytest

from support.graphs import check_rewrite
from tilewright.export.graph.rewrites.rotary import rotary

GRAPH = """g (float[b, 3, n, 4] x, float[n, 2] angles) => (float[b, 3, n, 4] y)
    <int64[2] twice = {1, 2}, float[n, 4] tile, float[b, 3, n, 4] r> {
        tile = Tile (angles, twice)
        cos = Cos (tile)
        sin = Sin (tile)
        first, second = Split <axis = 3, num_outputs = 2> (x)
        minus = Neg (second)
        swapped = Concat <axis = -1> (minus, first)
        plain = Mul (x, cos)
        turned = Mul (swapped, sin)
        r = Add (plain, turned)
        y = Neg (r)
    }"""
NEW = ["Concat", "Concat", "Cos", "Expand", "Expand", "Neg", "RotaryEmbedding", "Shape", "Shape", "Sin"]
OLD = ["Add", "Concat", "Cos", "Mul", "Mul", "Neg", "Neg", "Sin", "Split", "Tile"]
# graph, the operators that are left, the number of new nodes; each change is one that keeps or breaks the pattern
GRAPHS = {
    "as the library writes it": (GRAPH, NEW, 1),
    "products and sums the other way round": (
        GRAPH.replace("(x, cos)", "(cos, x)").replace("(plain, turned)", "(turned, plain)"),
        NEW,
        1,
    ),
    "angles side by side": (
        GRAPH.replace("Tile (angles, twice)", "Concat <axis = -1> (angles, angles)"),
        NEW,
        1,
    ),
    "the other half is negative": (
        GRAPH.replace("Neg (second)", "Neg (first)").replace("(minus, first)", "(second, minus)"),
        OLD,
        0,
    ),
    "halves in their order": (GRAPH.replace("(minus, first)", "(first, minus)"), OLD, 0),
    "sines where cosines belong": (GRAPH.replace("(x, cos)", "(x, sin)"), [o for o in OLD if o != "Cos"], 0),
    "halves of other values": (
        GRAPH.replace("(minus, first)", "(minus, other)").replace("minus =", "other = Abs (first)\n minus ="),
        sorted([*OLD, "Abs"]),
        0,
    ),
}


@pytest.mark.parametrize(("text", "left", "count"), GRAPHS.values(), ids=GRAPHS)
def test_results_stay(text, left, count):
    check_rewrite(text, rotary, left, count, [{"b": 1, "n": 5}, {"b": 3, "n": 2}])
