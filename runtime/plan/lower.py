"""Lower a program over an image to nodes, and what each node waits for. Pure: no arrays, and nothing runs.

A node is the smallest piece of work: one moment of a pass (once, a step, or last) on one tile. The nodes of a pass at
one moment form a block. A rule between two blocks says which nodes wait: for the same tile, for every tile, or for the
tiles beneath their own. So a few dozen blocks describe a graph of a million nodes.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise

from tilewright.runtime.bundle.program import Call, Pass, Program, Tiles
from tilewright.runtime.plan.tiles import TilePlan, moved

__all__ = ["Beneath", "Block", "Graph", "Node", "Wait", "beneath", "lower", "moves", "regions"]


@dataclass(frozen=True)
class Node:
    """One pass, one moment, one tile; the blocks and tiles of the nodes that come before it."""

    pass_name: str
    section: str  # shared | once | each | last
    step: int
    tile: int
    waits: tuple[tuple[int, int], ...]


Interval = tuple[int, int]


@dataclass(frozen=True)
class Rectangles:
    """Rows times columns, each a start and an end in output pixels."""

    rows: tuple[Interval, ...]
    columns: tuple[Interval, ...]


class Beneath:
    """Which rectangles of a plan lie beneath those of another: a range of rows times a range of columns."""

    def __init__(self, above: TilePlan | Rectangles, below: TilePlan) -> None:
        readers, writers = rectangles(above), rectangles(below)
        self.rows, self.columns = _touched(readers.rows, writers.rows), _touched(readers.columns, writers.columns)
        self.back_rows, self.back_columns = (
            _touched(writers.rows, readers.rows),
            _touched(writers.columns, readers.columns),
        )

    def below(self, tile: int) -> list[int]:
        """The tiles beneath this one, in tile order."""
        return _product(tile, self.rows, self.columns, len(self.back_columns))

    def above(self, tile: int) -> list[int]:
        """The tiles that this one lies beneath, in tile order."""
        return _product(tile, self.back_rows, self.back_columns, len(self.columns))

    def count_below(self, tile: int) -> int:
        """How many tiles lie beneath this one."""
        row, column = divmod(tile, len(self.columns))
        return len(self.rows[row]) * len(self.columns[column])

    def count_above(self, tile: int) -> int:
        """Beneath how many tiles this one lies."""
        row, column = divmod(tile, len(self.back_columns))
        return len(self.back_rows[row]) * len(self.back_columns[column])


def rectangles(plan: TilePlan | Rectangles) -> Rectangles:
    """The rectangles of a plan's tiles."""
    if isinstance(plan, Rectangles):
        return plan
    rows = tuple((top, top + plan.tile_height) for top in plan.tops)
    return Rectangles(rows, tuple((left, left + plan.tile_width) for left in plan.lefts))


def regions(plan: TilePlan) -> Rectangles:
    """For every tile the part of the image that it is the last to reach, in tile order."""
    return Rectangles(
        tuple(pairwise((*plan.tops, plan.height))),
        tuple(pairwise((*plan.lefts, plan.width))),
    )


@lru_cache(256)
def beneath(above: TilePlan | Rectangles, below: TilePlan) -> Beneath:
    """The relation of two plans, computed once."""
    return Beneath(above, below)


def _touched(readers: tuple[Interval, ...], writers: tuple[Interval, ...]) -> tuple[range, ...]:
    """For each interval the range of those that it shares a pixel with; starts and ends both rise."""
    starts, ends = [start for start, _ in writers], [end for _, end in writers]
    return tuple(range(bisect_right(ends, start), bisect_left(starts, end)) for start, end in readers)


def _product(tile: int, rows: tuple[range, ...], columns: tuple[range, ...], width: int) -> list[int]:
    row, column = divmod(tile, len(columns))
    return [r * width + c for r in rows[row] for c in columns[column]]


@dataclass(frozen=True)
class Wait:
    """What the nodes of a block wait for in an earlier one: the same tile, every tile, or those beneath."""

    block: int
    rule: str  # same | every | beneath
    beneath: Beneath | None = None

    def tiles(self, tile: int, size: int) -> Collection[int]:
        """The tiles of the earlier block, which has so many."""
        if self.beneath is not None:
            return self.beneath.below(tile)
        return (tile,) if self.rule == "same" else range(size)


@dataclass(frozen=True)
class Block:
    """The nodes of one pass at one moment: one node for each tile."""

    number: int
    place: int  # index of the pass in the program
    section: str  # shared | once | each | last
    step: int  # the row of the schedule's tables
    calls: tuple[Call, ...]
    size: int  # number of nodes
    waits: tuple[Wait, ...]
    reads: tuple[tuple[str, int | None], ...]  # grid, and the block that wrote it; none: its initial values
    writes: tuple[str, ...]  # grids
    private: bool  # its tiles do not read each other
    batch: int  # nodes that one call may take
    plan: TilePlan  # where its tiles lie


@dataclass(frozen=True)
class Graph:
    """All blocks of a program over an image."""

    program: Program
    plans: Mapping[str, TilePlan]  # pass -> where its tiles lie, if they do not move
    steps: Mapping[str, int]  # pass -> how many steps
    blocks: tuple[Block, ...]
    last_writer: Mapping[str, int]  # grid -> the block that writes it last
    of_pass: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # pass -> its blocks, in order

    @cached_property
    def tile_blocks(self) -> tuple[tuple[int, ...], ...]:
        """For each pass its blocks with a node for each tile: all but that of the shared calls."""
        numbers = (self.of_pass[p.name] for p in self.program.passes)
        return tuple(tuple(n for n in blocks if self.blocks[n].section != "shared") for blocks in numbers)

    @cached_property
    def followers(self) -> tuple[tuple[tuple[int, Wait], ...], ...]:
        """For each block the later ones that wait for it, and how."""
        later: list[list[tuple[int, Wait]]] = [[] for _ in self.blocks]
        for block in self.blocks:
            for wait in block.waits:
                later[wait.block].append((block.number, wait))
        return tuple(map(tuple, later))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """For each block the nodes on the longest path from it to the end."""
        ranks = [0] * len(self.blocks)
        for block in reversed(self.blocks):
            ranks[block.number] = 1 + max((ranks[n] for n, _ in self.followers[block.number]), default=0)
        return tuple(ranks)

    @cached_property
    def read_later(self) -> tuple[set[str], ...]:
        """For each pass the names that later passes read."""
        passes = self.program.passes
        return tuple({name for p in passes[place + 1 :] for name in p.reads()} for place in range(len(passes)))

    @cached_property
    def readers(self) -> Mapping[tuple[str, int], tuple[tuple[int, Beneath], ...]]:
        """For what a block wrote on a grid, the blocks that read it, and how their tiles lie over it."""
        readers: dict[tuple[str, int], list[tuple[int, Beneath]]] = {}
        for block in self.blocks:
            for grid, writer in block.reads:
                if writer is not None:
                    over = beneath(block.plan, self.blocks[writer].plan)
                    readers.setdefault((grid, writer), []).append((block.number, over))
        return {key: tuple(blocks) for key, blocks in readers.items()}

    def count(self) -> int:
        """How many nodes there are."""
        return sum(block.size for block in self.blocks)

    def nodes(self) -> Iterator[Node]:
        """Every node by itself, in an order in which they could run."""
        for block in self.blocks:
            name = self.program.passes[block.place].name
            for tile in range(block.size):
                waits = [(w.block, t) for w in block.waits for t in w.tiles(tile, self.blocks[w.block].size)]
                yield Node(name, block.section, block.step, tile, tuple(sorted(set(waits))))


def lower(
    program: Program, plans: Mapping[str, TilePlan], steps: Mapping[str, int], jitter: int | None = None
) -> Graph:
    """The blocks of a program for these tile plans and numbers of steps.

    `jitter`: the seed by which tiles move from step to step, in passes that join them after every step.
    """
    return _Lowering(program, plans, steps, jitter).graph()


def moves(program: Program, p: Pass) -> bool:
    """Whether the tiles of a pass may move: they are joined after every step, and keep no state of their own."""
    return bool(p.tiles and not p.state and p.writes("each") & program.grids.keys())


class _Lowering:
    def __init__(
        self, program: Program, plans: Mapping[str, TilePlan], steps: Mapping[str, int], jitter: int | None
    ) -> None:
        self.program, self.plans, self.steps, self.jitter = program, plans, steps, jitter
        self.blocks: list[Block] = []
        self.grid_writer: dict[str, int] = {}
        # a value belongs to the tiles of a pass, or to the whole job (key None)
        self.value_writer: dict[tuple[Tiles | None, str], int] = {}
        self.value_readers: dict[tuple[Tiles | None, str], set[int]] = {}

    def graph(self) -> Graph:
        of_pass = {}
        for place, p in enumerate(self.program.passes):
            first = len(self.blocks)
            self._lower_pass(place, p)
            of_pass[p.name] = tuple(range(first, len(self.blocks)))
        return Graph(self.program, self.plans, self.steps, tuple(self.blocks), dict(self.grid_writer), of_pass)

    def _lower_pass(self, place: int, p: Pass) -> None:
        grids = self.program.grids.keys()
        joined, first = bool(p.writes("each") & grids), len(self.blocks)
        shared = self._shared_calls(p) if p.tiles else ()
        if shared:
            self._add(place, p, "shared", 0, shared, {}, None)
        once = tuple(call for call in p.once if not any(call is s for s in shared))
        moments = [("once", 0, once)] if once or p.state else []
        moments += [("each", step, p.each) for step in range(self.steps.get(p.name, 0) if p.each else 0)]
        moments += [("last", max(0, self.steps.get(p.name, 0) - 1), p.last)] if p.last else []
        before, previous = dict(self.grid_writer), None
        for section, step, calls in moments:
            previous = self._add(place, p, section, step, calls, dict(self.grid_writer) if joined else before, previous)
            if joined:
                self.grid_writer |= dict.fromkeys(self.blocks[previous].writes, previous)
        if not joined:
            for block in self.blocks[first:]:
                self.grid_writer |= dict.fromkeys(block.writes, block.number)

    def _shared_calls(self, p: Pass) -> tuple[Call, ...]:
        """The calls of `once` that read nothing of a tile: one run serves all tiles."""
        of_tiles = (
            self.program.grids.keys() | {n for tiles, n in self.value_writer if tiles == p.tiles} | p.state.keys()
        )
        shared = []
        for call in p.once:
            if call.shared(of_tiles):
                shared.append(call)
            else:
                of_tiles = of_tiles | set(call.outputs.values())
        return tuple(shared)

    def _add(
        self,
        place: int,
        p: Pass,
        section: str,
        step: int,
        calls: tuple[Call, ...],
        written: Mapping[str, int],
        previous: int | None,
    ) -> int:
        """Add a block; it reads grids as they were `written`, and goes on from the `previous` block of its pass."""
        number, alone, plan = len(self.blocks), section == "shared", self.plans[p.name]
        if self.jitter is not None and section == "each" and moves(self.program, p):
            plan = moved(plan, self.program.multiple_px, self.jitter, step)
        grids = self.program.grids
        names = {source.lstrip("@") for call in calls for source in call.inputs.values() if source[0] not in "#$~"}
        targets = {target for call in calls for target in call.outputs.values()}
        reads = sorted(name for name in names & grids.keys() if name != "image")
        waits = {} if previous is None else {(previous, "same"): Wait(previous, "same")}
        for grid in reads:
            if (writer := written.get(grid)) is not None:
                over = beneath(plan, self.blocks[writer].plan)
                waits[writer, "beneath"] = Wait(writer, "beneath", over)
        scopes = (None,) if alone or p.tiles is None else (p.tiles, None)
        for name in (names | targets) - grids.keys():
            for scope in scopes:
                if (writer := self.value_writer.get((scope, name))) is None:
                    continue
                if self.blocks[writer].place != place or self.blocks[writer].section == "shared":
                    self._wait(waits, writer, "same" if scope else "every")
                if name in names:
                    self.value_readers.setdefault((scope, name), set()).add(number)
                    break
        home = scopes[0]
        for name in (targets | (p.state.keys() if section == "once" else set())) - grids.keys():
            for reader in self.value_readers.pop((home, name), set()) - {number}:  # they read what is written over now
                if self.blocks[reader].place != place:
                    self._wait(waits, reader, "same" if home else "every")
            self.value_writer[home, name] = number
        size = 1 if alone else plan.count
        private = bool(p.tiles) and not (p.writes("each") & grids.keys()) and bool(p.each)
        block = Block(
            number,
            place,
            section,
            step,
            calls,
            size,
            tuple(waits.values()),
            tuple((grid, written.get(grid)) for grid in reads),
            tuple(sorted(targets & grids.keys())),
            private,
            1 if alone or p.tiles is None else p.tiles.batch,
            plan,
        )
        self.blocks.append(block)
        return number

    def _wait(self, waits: dict[tuple[int, str], Wait], block: int, rule: str) -> None:
        waits.setdefault((block, rule), Wait(block, rule))
