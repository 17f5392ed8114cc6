"""What the nodes of a job read and write: parts of grids, values of tiles, values of the job.

No grid is stored as a whole. What is stored are the parts that tiles wrote, each multiplied by its ramps. A crop adds
the parts that overlap it, in tile order, so the bytes do not depend on which tile finished first. A part is dropped
once its last reader has run.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tilewright.runtime.bundle.program import Pass, Tiles, state_shape
from tilewright.runtime.errors import UsageError
from tilewright.runtime.execute.finished import Key
from tilewright.runtime.plan.lower import Beneath, Block, Graph, beneath, regions
from tilewright.runtime.plan.noise import normal
from tilewright.runtime.plan.passes import table_for_tokens
from tilewright.runtime.plan.tiles import Tile, TilePlan, weights

__all__ = ["Floats", "Image", "Outputs", "Values", "on_host"]

Floats = npt.NDArray[np.float32]
Rectangle = tuple[int, int, int, int]  # top, left, bottom, right in output pixels


def on_host(value: Any) -> Any:
    """A value as a NumPy array, fetched from the device that holds it."""
    holder = getattr(value, "holder", None)
    return value if holder is None else holder.get(value)


class Image(Protocol):
    """The padded input [3, H, W] in [0, 1], read by crops."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width."""

    def crop(self, top: int, left: int, height: int, width: int) -> Floats:
        """The planes of a rectangle."""


class Table:
    """A schedule's numbers: all as one row [1, steps, ...], and a row [1, ...] for each step."""

    def __init__(self, numbers: Any) -> None:
        self.whole, self.rows = numbers[None], tuple(numbers[step, None] for step in range(len(numbers)))


@dataclass
class Outputs:
    """What one node wrote, before it is committed."""

    parts: dict[str, Any] = field(default_factory=dict)  # grid -> the tile's part
    values: dict[str, Any] = field(default_factory=dict)


class Values:
    """The data of a job while its nodes run. Only one thread may call `commit` at a time; others may read meanwhile."""

    def __init__(
        self,
        graph: Graph,
        image: Image,
        seed: int,
        constants: Mapping[str, Any],
        tables: Mapping[str, Mapping[str, "Table"]],
        on_final: Callable[[int, int, Floats], None],
    ) -> None:
        self.graph, self.image, self.seed, self.constants, self.tables = graph, image, seed, constants, tables
        self.on_final = on_final
        self.inputs: dict[str, Any] = {}
        self.job: dict[str, Any] = {}
        self.tiles: dict[tuple[Tiles | str, int], dict[str, Any]] = {}
        self.parts: dict[tuple[str, int], dict[int, Any]] = {}
        # grid, block -> tile -> nodes that have yet to read its part
        self.uses: dict[tuple[str, int], dict[int, int]] = {}
        self.reusable: set[tuple[str, int]] = set()  # parts that a further round may read
        self.ramps: dict[tuple[TilePlan, int], Any] = {}
        last = graph.blocks[graph.last_writer["result"]]
        self.final = last.number
        self.regions: Beneath = beneath(regions(last.plan), last.plan)
        # region of the result that has not been handed on -> parts that it lacks
        self.waiting: dict[int, int] = {}
        self.runs: Collection[int] = ()  # the blocks of this round
        self.done = [bytearray(block.size) for block in graph.blocks]  # block -> 1 for each tile whose node is done

    def begin(self, runs: Collection[int], *, keep: bool) -> None:
        """Prepare a round of these blocks: drop what they will write again."""
        for number in runs:
            self.done[number] = bytearray(self.graph.blocks[number].size)
            for grid in self.graph.blocks[number].writes:
                self.parts.pop((grid, number), None)
        self.go_on(runs, range(self.graph.blocks[self.final].size), keep=keep)

    def go_on(self, runs: Collection[int], regions: Collection[int], *, keep: bool) -> None:
        """Prepare the rest of a round, from the nodes that are done. These regions have not been handed on."""
        self.runs, done = frozenset(runs), self.done[self.final]
        self.reusable = set(self.graph.last_writer.items()) if keep else set()
        if self.final not in self.runs:
            self.reusable.add(("result", self.final))  # its parts are reported again
            regions = ()
        self.waiting = {i: sum(not done[part] for part in self.regions.below(i)) for i in regions}
        self.uses = {}
        for key in list(self.parts):  # written in earlier rounds, or before an interruption
            self.uses[key] = {tile: self._readers(key, tile) for tile in self.parts[key]}
            for tile, uses in list(self.uses[key].items()):
                if not uses and key not in self.reusable:
                    del self.uses[key][tile], self.parts[key][tile]

    def live(self) -> dict[Key, Any]:
        """All values that a node has yet to read, and that cannot be computed anew."""
        names = {p.tiles or p.name: p.name for p in self.graph.program.passes}
        parts = {("part", *key, tile): part for key, tiles in self.parts.items() for tile, part in tiles.items()}
        of_tiles = {
            ("tile", names[tiles], tile, name): value
            for (tiles, tile), values in self.tiles.items()
            for name, value in values.items()
        }
        return parts | of_tiles | {("job", name): value for name, value in self.job.items()}

    def take(self, live: Mapping[Key, Any]) -> None:
        """Store such values."""
        tiles = {p.name: p.tiles or p.name for p in self.graph.program.passes}
        for (kind, *place), value in live.items():
            values: dict[Any, Any] = self.job
            if kind == "part":
                values = self.parts.setdefault((str(place[0]), int(place[1])), {})
            elif kind == "tile":
                values = self.tiles.setdefault((tiles[str(place[0])], int(place[1])), {})
            values[place[-1]] = value

    def feed(self, block: Block, tile: int, source: str, outputs: Outputs) -> tuple[Any, bool]:
        """The row [1, ...] behind a source, as `program` spells them, and whether it belongs to the tile."""
        p, name = self.graph.program.passes[block.place], source[1:]
        if source[0] == "#":
            return self.constants[name], False
        if source[0] == "$":
            return self.inputs[name], False
        if source[0] == "~":
            stream = {"once": 0, "each": 1 + block.step, "last": 2 + block.step}[block.section]
            return self._noise(p, block, tile, name, stream), True
        if source[0] == "@":
            return self._row(p, block, tile, name, outputs)
        if source == "image" or source in self.graph.program.grids:
            return self.crop(block, tile, source), True
        if found := self._value(p, tile, source, outputs):
            return found
        raise LookupError(f"pass {p.name!r}, {block.section}: no value {source!r}")

    def _value(self, p: Pass, tile: int, name: str, outputs: Outputs) -> tuple[Any, bool] | None:
        """A value of this node, of its tile or of the job, and whether it belongs to the tile."""
        tile_values = self._tile_values(p, tile)
        for values, of_tile in ((outputs.values, p.tiles is not None), (tile_values, True), (self.job, False)):
            if name in values:
                return values[name], of_tile
        return None

    def begun(self, block: Block, tile: int) -> dict[str, Any]:
        """The state that a tile starts its pass with."""
        p = self.graph.program.passes[block.place]
        return {name: self._initial(p, block, tile, name) for name in p.state} if block.section == "once" else {}

    def crop(self, block: Block, tile: int, grid: str) -> Any:
        """A grid [1, C, H, W] under a tile, as it was before the block; a single part stays on its device."""
        rectangle = _rectangle(block.plan.tiles[tile])
        top, left, bottom, right = rectangle
        if grid == "image":
            return np.ascontiguousarray(self.image.crop(top, left, bottom - top, right - left)[None])
        writer = dict(block.reads)[grid]
        if writer is None:
            return self._blank(grid, rectangle)[None]
        over = beneath(block.plan, self.graph.blocks[writer].plan)
        return self._gather(grid, writer, rectangle, over.below(tile))

    def commit(self, block: Block, tile: int, outputs: Outputs) -> list[int]:
        """Store what a node wrote, drop what no node will read, and return the regions of the result now final."""
        p = self.graph.program.passes[block.place]
        for name, value in outputs.values.items():
            if block.section == "shared" or (p.tiles is None and name not in p.state):
                self.job[name] = value
            else:
                self.tiles.setdefault((p.tiles or p.name, tile), {})[name] = value
        for grid, part in outputs.parts.items():
            uses = self._readers((grid, block.number), tile)
            if uses or (grid, block.number) in self.reusable:
                self.parts.setdefault((grid, block.number), {})[tile] = part
                self.uses.setdefault((grid, block.number), {})[tile] = uses
        self._release(block, tile)
        self.done[block.number][tile] = 1
        if block.number != self.final:
            return []
        for region in self.regions.above(tile):
            self.waiting[region] -= 1
        return [region for region in self.regions.above(tile) if not self.waiting[region]]

    def region(self, region: int) -> tuple[int, int, Floats]:
        """A final region of the result: its place and its values."""
        rectangle = self._region(region)
        px = self.graph.program.grids["result"].px
        whole = self._gather("result", self.final, rectangle, self.regions.below(region))
        return rectangle[0] // px, rectangle[1] // px, on_host(whole)[0]

    def _region(self, region: int) -> Rectangle:
        plan = self.graph.blocks[self.final].plan
        row, column = divmod(region, len(plan.lefts))
        top, bottom = (*plan.tops, plan.height)[row : row + 2]
        left, right = (*plan.lefts, plan.width)[column : column + 2]
        return top, left, bottom, right

    def all_handed_on(self, waiting: Collection[int]) -> list[Rectangle]:
        """The rectangles of the result, in its pixels, that have been handed on if these regions have not."""
        px, regions = self.graph.program.grids["result"].px, range(self.graph.blocks[self.final].size)
        rectangles = (self._region(region) for region in regions if region not in waiting)
        return [(top // px, left // px, bottom // px, right // px) for top, left, bottom, right in rectangles]

    def handed_on(self, region: int) -> None:
        """Drop the parts that only this region has yet to read."""
        del self.waiting[region]
        for part in self.regions.below(region):
            self._used("result", self.final, part)

    def weighted(self, block: Block, grid: str, tile: int, part: Any) -> Any:
        """A part times its tile's ramps, ready to be added; a part that overlaps no other tile stays as it is."""
        plan = block.plan
        if _alone(plan, tile):
            return part
        rows, columns = self._ramps(plan, self.graph.program.grids[grid].px)
        row, column = divmod(tile, len(plan.lefts))
        product = on_host(part) * columns[column]
        product *= rows[row][:, None]
        return product

    def forget(self, place: int, tile: int, names: Collection[str]) -> None:
        """Drop these values of a tile."""
        p = self.graph.program.passes[place]
        values = self.tiles.get((p.tiles or p.name, tile), {})
        for name in names & values.keys():
            del values[name]

    def names_in_tile(self, tiles: Tiles, tile: int) -> Collection[str]:
        """The names of a tile's values."""
        return self.tiles.get((tiles, tile), {}).keys()

    def result(self) -> Floats:
        """The whole grid `result` [3, H, W] of a round that kept it."""
        plan = self.graph.blocks[self.final].plan
        whole = self._gather("result", self.final, (0, 0, plan.height, plan.width), range(len(plan.tiles)))
        return np.ascontiguousarray(on_host(whole)[0])

    def _readers(self, key: tuple[str, int], tile: int) -> int:
        """How many nodes of this round, and regions of the result, have yet to read the part of a tile."""
        readers = [(self.done[n], over) for n, over in self.graph.readers.get(key, ()) if n in self.runs]
        nodes = sum(not done[reader] for done, over in readers for reader in over.above(tile))
        regions = self.regions.above(tile) if key == ("result", self.final) else ()
        return nodes + sum(region in self.waiting for region in regions)

    def _tile_values(self, p: Pass, tile: int) -> Mapping[str, Any]:
        return self.tiles.get((p.tiles or p.name, tile), {})

    def _release(self, block: Block, tile: int) -> None:
        for grid, writer in block.reads:
            if writer is None:
                continue
            over = beneath(block.plan, self.graph.blocks[writer].plan)
            for part in over.below(tile):
                self._used(grid, writer, part)

    def _used(self, grid: str, writer: int, part: int) -> None:
        uses = self.uses.get((grid, writer))
        if uses is None or part not in uses:  # written in an earlier round, whose parts are kept
            return
        uses[part] -= 1
        if uses[part] <= 0 and (grid, writer) not in self.reusable:
            del uses[part], self.parts[grid, writer][part]

    def _gather(self, grid: str, writer: int, rectangle: Rectangle, parts: Sequence[int]) -> Any:
        """A rectangle of a grid [1, C, H, W]: the parts that overlap it, added in tile order."""
        plan, written = self.graph.blocks[writer].plan, self.parts[grid, writer]
        px, channels = self.graph.program.grids[grid].px, self.graph.program.grids[grid].channels
        if len(parts) == 1 and _rectangle(plan.tiles[parts[0]]) == rectangle:
            return written[parts[0]]
        top, left, bottom, right = (side // px for side in rectangle)
        whole = np.zeros((1, channels, bottom - top, right - left), np.float32)
        for i in parts:
            t, e, b, r = (side // px for side in _rectangle(plan.tiles[i]))
            rows, columns = slice(max(t, top), min(b, bottom)), slice(max(e, left), min(r, right))
            place = whole[:, :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            place += on_host(written[i])[:, :, rows.start - t : rows.stop - t, columns.start - e : columns.stop - e]
        return whole

    def _blank(self, grid: str, rectangle: Rectangle) -> Floats:
        """A rectangle of a grid that no pass has written: noise or zeros."""
        spec = self.graph.program.grids[grid]
        top, left, bottom, right = (side // spec.px for side in rectangle)
        if spec.init == "noise":
            return self._field(0, 0, spec.channels, top, left, bottom - top, right - left)
        return np.zeros((spec.channels, bottom - top, right - left), np.float32)

    def _field(self, region: int, stream: int, channels: int, top: int, left: int, rows: int, columns: int) -> Floats:
        return normal(
            self.seed, region=region, stream=stream, channels=channels, top=top, left=left, height=rows, width=columns
        )

    def _ramps(self, plan: TilePlan, px: int) -> Any:
        if (plan, px) not in self.ramps:
            self.ramps[plan, px] = weights(plan, px)
        return self.ramps[plan, px]

    def _initial(self, p: Pass, block: Block, tile: int, name: str) -> Any:
        state, here = p.state[name], block.plan.tiles[tile]
        if state.init == "noise":
            return self._noise(p, block, tile, name, 0)
        shape = (1, *state_shape(state, here.height, here.width))
        return np.full(shape, 1.0 if state.init == "ones" else 0.0, np.float32)

    def _noise(self, p: Pass, block: Block, tile: int, name: str, stream: int) -> Any:
        """For a grid the noise of the whole image under the tile; for a state a field of the tile's own."""
        here = block.plan.tiles[tile]
        if grid := self.graph.program.grids.get(name):
            px = grid.px
            rows, columns = here.height // px, here.width // px
            return self._field(0, stream, grid.channels, here.top // px, here.left // px, rows, columns)[None]
        channels, rows, columns = state_shape(p.state[name], here.height, here.width)
        return self._field(1 + tile, stream, channels, 0, 0, rows, columns)[None]

    def _row(self, p: Pass, block: Block, tile: int, name: str, outputs: Outputs) -> tuple[Any, bool]:
        """This step's row of a table; the whole table outside `each`."""
        tables = self.tables[p.name]
        if name in tables:
            return (tables[name].whole if block.section != "each" else tables[name].rows[block.step]), False
        here = block.plan.tiles[tile]
        if table := table_for_tokens(p, name, here.height * here.width, self.constants):
            name = table
        value, of_tile = self._value(p, tile, name, outputs) or (self.constants[name], False)
        whole = on_host(value)
        rows, steps = whole.shape[1], len(next(iter(tables.values())).rows)
        if rows != steps:  # a table for another number of steps has other sigmas
            raise UsageError(f"table {name!r} has {rows} rows for {steps} steps; use --steps {rows}")
        return whole[:, block.step], of_tile


def _rectangle(tile: Tile) -> Rectangle:
    return tile.top, tile.left, tile.top + tile.height, tile.left + tile.width


def _alone(plan: TilePlan, tile: int) -> bool:
    """Whether a tile shares no pixel with another."""
    return beneath(plan, plan).count_below(tile) == 1
