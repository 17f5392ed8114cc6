"""Attention on tokens gives what attention on heads gave."""

import pytest

from support.graphs import check_rewrite
from tilewright.export.graph.rewrites.heads import heads


def attention(inputs: str, extra: str = "", rest: str = "t = Transpose <perm = [0, 2, 1, 3]> (a)\n y = Neg (t)") -> str:
    """A graph with one Attention; q is read as heads, k and v too."""
    return f"""g (float[b, n, 3, 4] q, float[b, m, 3, 4] k, float[b, m, 3, 5] v, float[b, 1, n, m] mask)
        => (float[b, n, 3, 5] y) <float[b, n, 3, 5] t, float[b, 3, n, 5] a> {{
            qt = Transpose <perm = [0, 2, 1, 3]> (q)
            kt = Transpose <perm = [0, 2, 1, 3]> (k)
            vt = Transpose <perm = [0, 2, 1, 3]> (v)
            a = Attention {extra} ({inputs})
            {rest}
        }}"""


LEFT = ["Attention", "Neg", "Reshape", "Reshape", "Reshape", "Reshape"]
OLD = ["Attention", "Neg", "Transpose", "Transpose", "Transpose", "Transpose"]
GRAPHS = {
    "of three inputs": (attention("qt, kt, vt"), LEFT, 1),
    "with a mask and a scale": (attention("qt, kt, vt, mask", "<scale = 0.25>"), LEFT, 1),
    "with queries that were never tokens": (
        attention("p, kt, vt").replace("kt =", "p = Neg (qt)\n kt =", 1),
        sorted([*OLD, "Neg"]),
        0,
    ),
    "with a result that is read as heads too": (
        attention("qt, kt, vt", rest="t = Transpose <perm = [0, 2, 1, 3]> (a)\n s = Neg (a)\n"
                  "u = Transpose <perm = [0, 2, 1, 3]> (s)\n y = Add (t, u)"),
        sorted([*OLD, "Add", "Transpose"]),
        0,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "left", "count"), GRAPHS.values(), ids=GRAPHS)
def test_results_stay(text, left, count):
    check_rewrite(text, heads, left, count, [{"b": 1, "n": 3, "m": 2}, {"b": 2, "n": 2, "m": 5}])


def test_grouped_heads_stay_grouped():
    text = attention("qt, kt, vt").replace("float[b, n, 3, 4] q", "float[b, n, 6, 4] q").replace("3, 5] y", "6, 5] y")
    text = text.replace("<float[b, n, 3, 5] t, float[b, 3, n, 5] a>", "<float[b, n, 6, 5] t, float[b, 6, n, 5] a>")
    check_rewrite(text, heads, LEFT, 1, [{"b": 2, "n": 2, "m": 5}])
