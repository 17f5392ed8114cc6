"""Slices that are a whole axis together become one Split."""

import pytest

from support.graphs import check_rewrite
from tilewright.export.graph.rewrites.split import split


def slices(*parts: tuple[int, int], axis: int = 1, step: int = 1) -> str:
    """A graph that cuts these parts from an axis with 12 places, in this order."""
    named = {f"p{i}": part for i, part in enumerate(parts)}
    starts = "".join(
        f", int64[1] s{i} = {{{start}}}, int64[1] e{i} = {{{end}}}" for i, (start, end) in enumerate(parts)
    )
    cuts = "".join(f"p{i} = Slice (x, s{i}, e{i}, axis, step)\n n{i} = Neg (p{i})\n" for i in range(len(named)))
    return f"""g (float[n, 12, 2] x) => (float[n, k, 2] y)
        <int64[1] axis = {{{axis}}}, int64[1] step = {{{step}}}{starts}> {{
            {cuts}
            y = Concat <axis = 1> ({", ".join(f"n{i}" for i in range(len(named)))})
        }}"""


GRAPHS = {
    "three of different lengths, out of order": (slices((8, 12), (0, 6), (6, 8)), 1),
    "counted from the end, and far past it": (slices((0, -5), (7, 1 << 40)), 1),
    "an axis counted from the end": (slices((0, 5), (5, 12), axis=-2), 1),
    "a gap": (slices((0, 5), (6, 12)), 0),
    "an overlap": (slices((0, 7), (6, 12)), 0),
    "every second place": (slices((0, 6), (6, 12), step=2), 0),
}


@pytest.mark.parametrize(("text", "count"), GRAPHS.values(), ids=GRAPHS)
def test_results_stay(text, count):
    parts = text.count("Slice (")
    others = ["Concat", *["Neg"] * parts]
    check_rewrite(
        text, split, sorted([*others, *(["Split"] if count else ["Slice"] * parts)]), count, [{"n": 1}, {"n": 3}]
    )


def test_a_part_that_is_cut_twice_is_cut_once_more():
    left = ["Concat", "Neg", "Neg", "Neg", "Slice", "Split"]
    check_rewrite(slices((0, 5), (5, 12), (0, 5)), split, left, 1, [{"n": 2}])


def test_a_free_axis_stays():
    text = """g (float[n, m] x) => (float[n, k] y)
        <int64[1] axis = {1}, int64[1] zero = {0}, int64[1] two = {2}, int64[1] end = {99}> {
            a = Slice (x, two, end, axis)
            b = Slice (x, zero, two, axis)
            y = Concat <axis = 1> (a, b)
        }"""
    check_rewrite(text, split, ["Concat", "Slice", "Slice"], 0, [{"n": 1, "m": 5}, {"n": 2, "m": 2}])
