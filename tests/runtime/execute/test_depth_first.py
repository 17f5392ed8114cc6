"""A job that asks for it finishes what is begun first, so that only the front of its picture is in memory."""

import pytest

from support.walks import program_of
from tilewright.runtime.execute.queue import Queue, Work
from tilewright.runtime.execute.walk import layout

ROWS, COLUMNS = 12, 4


def order(name: str, depth_first: bool) -> tuple[list[tuple[str, int]], int]:
    """The nodes of a tall picture in the order in which one device runs them, and how many tiles it has."""
    program = program_of(name)
    tiles = next(p.tiles for p in program.passes if p.tiles)
    assert tiles is not None
    pitch = tiles.px - tiles.overlap_px
    graph, _ = layout(program, ROWS * pitch + tiles.overlap_px, COLUMNS * pitch + tiles.overlap_px, tiles.px, None, 3)
    queue, ran = Queue(), []
    work = Work(graph, frozenset(range(len(graph.blocks))), lambda block, tile: block.number, None, depth_first)
    queue.add(work)
    while batch := queue.take(0):
        ran += [(program.passes[block.place].name, tile) for _, block, tile in batch.nodes]
        queue.complete(batch)
    assert work.done()
    return ran, ROWS * COLUMNS


@pytest.mark.parametrize(
    ("name", "first", "last"), [("in-token", "encode", "decode"), ("toksr", "tokenise", "detokenise")]
)
def test_a_picture_becomes_final_from_the_top_while_its_rest_has_not_begun(name: str, first: str, last: str) -> None:
    waits = {}
    for depth_first in (False, True):
        ran, count = order(name, depth_first)
        begun = done = most = 0
        finals = []
        for pass_name, tile in ran:
            begun += pass_name == first
            if pass_name == last:
                finals.append(tile)
                done += 1
            most = max(most, begun - done)
        assert begun == done == count
        assert all(abs(place - tile) <= 3 * COLUMNS + 1 for place, tile in enumerate(finals))
        waits[depth_first] = most
    assert waits[False] == count  # all are encoded before the first is decoded
    assert waits[True] < count
